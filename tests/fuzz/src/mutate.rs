//! Bytes that are nearly right, and some that are not at all.

use rand::{Rng as _, RngCore as _, rngs::SmallRng, seq::IndexedRandom as _};

/// Numbers at which code breaks.
const NUMBERS: [u64; 16] = [
    0,
    1,
    2,
    7,
    8,
    127,
    128,
    255,
    256,
    4_095,
    4_096,
    65_535,
    0x7fff_ffff,
    0xffff_ffff,
    0x7fff_ffff_ffff_ffff,
    u64::MAX,
];

/// One to eight changes of one of the samples; one in 32 times plain noise.
pub fn mutate(samples: &[Vec<u8>], bytes_max: usize, random: &mut SmallRng) -> Vec<u8> {
    let mut bytes = samples.choose(random).cloned().unwrap_or_default();
    if random.random_range(0..32) == 0 {
        bytes = vec![0; random.random_range(0..=bytes_max.min(2_048))];
        random.fill_bytes(&mut bytes);
    }
    let changes = 1 << random.random_range(0..4);
    for _ in 0..random.random_range(1..=changes) {
        change(&mut bytes, samples, random);
    }
    bytes.truncate(bytes_max);
    bytes
}

fn change(bytes: &mut Vec<u8>, samples: &[Vec<u8>], random: &mut SmallRng) {
    let at = random.random_range(0..=bytes.len());
    let left = bytes.len() - at;
    // Short ranges are the likelier ones, long ones come too.
    let scale = 1usize << random.random_range(0..12);
    let len = random.random_range(0..=left.min(scale));
    match random.random_range(0..11) {
        0 | 1 if left > 0 => bytes[at] ^= 1 << random.random_range(0..8),
        2 if left > 0 => bytes[at] = random.random(),
        3 => {
            let number = NUMBERS.choose(random).copied().unwrap_or_default();
            let width = [1, 2, 4, 8][random.random_range(0..4)].min(left);
            let number = match random.random() {
                true => number.to_le_bytes(),
                false => (number << (64 - 8 * width.max(1))).to_be_bytes(),
            };
            bytes[at..at + width].copy_from_slice(&number[..width]);
        }
        4 => bytes.truncate(at),
        5 => drop(bytes.drain(at..at + len)),
        6 => {
            let copy = bytes[at..at + len].to_vec();
            let to = random.random_range(0..=bytes.len());
            bytes.splice(to..to, copy);
        }
        7 => {
            let mut noise = vec![0; scale.min(256)];
            random.fill_bytes(&mut noise);
            bytes.splice(at..at + len, noise);
        }
        8 => bytes[at..at + len].fill(random.random()),
        9 => {
            // A varint, as protobuf and plans have them.
            let mut number = NUMBERS.choose(random).copied().unwrap_or_default();
            let mut varint = Vec::new();
            while number >= 0x80 {
                varint.push(number as u8 | 0x80);
                number >>= 7;
            }
            varint.push(number as u8);
            bytes.splice(at..at + len.min(2), varint);
        }
        _ => {
            let other = samples.choose(random).map_or(&[][..], Vec::as_slice);
            let from = random.random_range(0..=other.len());
            let to = random.random_range(from..=other.len());
            bytes.splice(at..at + len, other[from..to].iter().copied());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng as _;

    #[test]
    fn mutants_differ_stay_bounded_and_come_back_with_their_seed() {
        let samples = vec![vec![7; 100], b"another sample".to_vec(), Vec::new()];
        let of = |seed| mutate(&samples, 300, &mut SmallRng::seed_from_u64(seed));
        let different = (0..1_000).filter(|seed| !samples.contains(&of(*seed))).count();
        assert!(different > 800, "{different}");
        for seed in 0..1_000 {
            assert_eq!(of(seed), of(seed));
            assert!(of(seed).len() <= 300);
        }
    }
}
