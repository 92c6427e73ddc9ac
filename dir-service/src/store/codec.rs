//! Plans as bytes, for the journal and its copies on the file servers.
//!
//! ```text
//! version          u8, 1; any other is refused
//! preconditions    varint count, then each:
//!     kind         u8: 0 absent, 1 exists, 2 unchanged and absent, 3 unchanged at a revision
//!     key          varint length, bytes
//!     revision     u64 little endian; kind 3 only
//! mutations        varint count, then each:
//!     kind         u8: 0 put, 1 delete
//!     key          varint length, bytes
//!     value        varint length, bytes; puts only
//! ```
//!
//! A varint is LEB128 of at most 32 bits. Nothing may follow. Keys and values of a decoded plan share the memory of
//! the bytes it was read from. There is no checksum here: what carries these bytes has one.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use cairn_core::plan::{
    Key, Mutation, PLAN_BYTES_MAX, PLAN_MUTATIONS_MAX, PLAN_PRECONDITIONS_MAX, Plan, Precondition,
};
use cairn_proto::{Error, Result, id::Revision};

/// The version this module writes.
const VERSION: u8 = 1;

/// Most bytes of an encoded plan: its keys and values, and for each at most a kind, a revision and two lengths.
pub const ENCODED_BYTES_MAX: usize = PLAN_BYTES_MAX + 16 * (PLAN_PRECONDITIONS_MAX + PLAN_MUTATIONS_MAX + 1);

/// A plan as bytes.
pub fn encode(plan: &Plan) -> Bytes {
    let entries = 1 + plan.preconditions.len() + plan.mutations.len();
    let mut out = BytesMut::with_capacity(plan.bytes() + 16 * entries);
    out.put_u8(VERSION);
    put_varint(&mut out, plan.preconditions.len());
    for precondition in &plan.preconditions {
        let (kind, revision) = match precondition {
            Precondition::Absent(_) => (0, None),
            Precondition::Exists(_) => (1, None),
            Precondition::Unchanged(_, None) => (2, None),
            Precondition::Unchanged(_, Some(revision)) => (3, Some(revision)),
        };
        out.put_u8(kind);
        put_bytes(&mut out, precondition.key());
        if let Some(revision) = revision {
            out.put_u64_le(revision.0);
        }
    }
    put_mutations(&mut out, &plan.mutations);
    out.freeze()
}

/// A plan's mutations as bytes: what the journal keeps of an applied plan, whose preconditions held.
pub fn encode_applied(plan: &Plan) -> Bytes {
    let bytes: usize = plan.mutations.iter().map(mutation_bytes).sum();
    let mut out = BytesMut::with_capacity(bytes + 16);
    out.put_u8(VERSION);
    put_varint(&mut out, 0);
    put_mutations(&mut out, &plan.mutations);
    out.freeze()
}

/// The plan that [`encode`] wrote.
///
/// # Errors
/// `INTERNAL` for an unknown version, anything malformed, and plans beyond their bounds.
pub fn decode(bytes: &Bytes) -> Result<Plan> {
    let mut reader = Reader(bytes.clone());
    let version = reader.u8()?;
    if version != VERSION {
        return Err(Error::internal(format!(
            "a plan of the journal has version {version}; this program knows version {VERSION} only: \
             use the program that wrote it, or a newer one"
        )));
    }
    let count = reader.count(PLAN_PRECONDITIONS_MAX)?;
    let mut plan = Plan { preconditions: Vec::with_capacity(count), mutations: Vec::new() };
    for _ in 0..count {
        let kind = reader.u8()?;
        let key = reader.bytes()?;
        plan.preconditions.push(match kind {
            0 => Precondition::Absent(key),
            1 => Precondition::Exists(key),
            2 => Precondition::Unchanged(key, None),
            3 => Precondition::Unchanged(key, Some(Revision(reader.u64()?))),
            _ => return Err(malformed()),
        });
    }
    let count = reader.count(PLAN_MUTATIONS_MAX)?;
    plan.mutations.reserve(count);
    for _ in 0..count {
        let kind = reader.u8()?;
        let key = reader.bytes()?;
        plan.mutations.push(match kind {
            0 => Mutation::Put(key, reader.bytes()?),
            1 => Mutation::Delete(key),
            _ => return Err(malformed()),
        });
    }
    if reader.0.has_remaining() {
        return Err(malformed());
    }
    plan.check().map_err(|_| malformed())?;
    Ok(plan)
}

fn malformed() -> Error {
    Error::internal("a plan of the journal is malformed")
}

fn mutation_bytes(mutation: &Mutation) -> usize {
    16 + match mutation {
        Mutation::Put(key, value) => key.len() + value.len(),
        Mutation::Delete(key) => key.len(),
    }
}

fn put_mutations(out: &mut BytesMut, mutations: &[Mutation]) {
    put_varint(out, mutations.len());
    for mutation in mutations {
        match mutation {
            Mutation::Put(key, value) => {
                out.put_u8(0);
                put_bytes(out, key);
                put_bytes(out, value);
            }
            Mutation::Delete(key) => {
                out.put_u8(1);
                put_bytes(out, key);
            }
        }
    }
}

fn put_bytes(out: &mut BytesMut, bytes: &Key) {
    put_varint(out, bytes.len());
    out.put_slice(bytes);
}

/// Lengths fit 32 bits: a plan has at most [`PLAN_BYTES_MAX`] bytes.
fn put_varint(out: &mut BytesMut, value: usize) {
    let mut value = value as u32;
    while value >= 0x80 {
        out.put_u8(value as u8 | 0x80);
        value >>= 7;
    }
    out.put_u8(value as u8);
}

struct Reader(Bytes);

impl Reader {
    fn u8(&mut self) -> Result<u8> {
        self.0.try_get_u8().map_err(|_| malformed())
    }

    fn u64(&mut self) -> Result<u64> {
        self.0.try_get_u64_le().map_err(|_| malformed())
    }

    fn varint(&mut self) -> Result<usize> {
        let mut value = 0u64;
        for shift in (0..35).step_by(7) {
            let byte = self.u8()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return u32::try_from(value).map(|value| value as usize).map_err(|_| malformed());
            }
        }
        Err(malformed())
    }

    fn count(&mut self, max: usize) -> Result<usize> {
        let count = self.varint()?;
        if count > max { Err(malformed()) } else { Ok(count) }
    }

    fn bytes(&mut self) -> Result<Bytes> {
        let length = self.varint()?;
        if length > self.0.remaining() { Err(malformed()) } else { Ok(self.0.split_to(length)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn key() -> impl Strategy<Value = Bytes> {
        proptest::collection::vec(any::<u8>(), 0..200).prop_map(Bytes::from)
    }

    fn precondition() -> impl Strategy<Value = Precondition> {
        prop_oneof![
            key().prop_map(Precondition::Absent),
            key().prop_map(Precondition::Exists),
            (key(), any::<Option<u64>>())
                .prop_map(|(key, revision)| Precondition::Unchanged(key, revision.map(Revision))),
        ]
    }

    fn plan() -> impl Strategy<Value = Plan> {
        let mutation = prop_oneof![
            (key(), key()).prop_map(|(key, value)| Mutation::Put(key, value)),
            key().prop_map(Mutation::Delete)
        ];
        let preconditions = proptest::collection::vec(precondition(), 0..20);
        (preconditions, proptest::collection::vec(mutation, 0..20)).prop_map(|(preconditions, mutations)| {
            let mut plan = Plan::new();
            for precondition in preconditions {
                plan.require(precondition);
            }
            for mutation in mutations {
                plan.mutate(mutation);
            }
            plan
        })
    }

    proptest! {
        #[test]
        fn a_plan_comes_back_as_it_was(plan in plan()) {
            prop_assert_eq!(&decode(&encode(&plan)).unwrap(), &plan);
            let applied = Plan { preconditions: Vec::new(), mutations: plan.mutations.clone() };
            prop_assert_eq!(decode(&encode_applied(&plan)).unwrap(), applied);
        }

        #[test]
        fn hostile_bytes_are_refused_or_read_but_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = decode(&Bytes::from(bytes.clone()));
            let mut versioned = vec![VERSION];
            versioned.extend(bytes);
            let _ = decode(&Bytes::from(versioned));
        }

        #[test]
        fn a_damaged_plan_is_never_read_as_longer_than_it_is(plan in plan(), at in any::<usize>(), bit in 0u8..8) {
            let mut bytes = encode(&plan).to_vec();
            let at = at % bytes.len();
            bytes[at] ^= 1u8 << bit;
            if let Ok(read) = decode(&Bytes::from(bytes.clone())) {
                prop_assert!(read.bytes() <= bytes.len());
            }
        }

        #[test]
        fn a_cut_plan_is_refused(plan in plan(), cut in any::<usize>()) {
            let bytes = encode(&plan);
            prop_assert!(decode(&bytes.slice(..cut % bytes.len())).is_err());
        }
    }

    #[test]
    fn the_largest_plan_fits_its_bound_and_other_versions_are_refused() {
        let mut plan = Plan::new();
        for number in 0..PLAN_MUTATIONS_MAX {
            plan.require(Precondition::Unchanged(Key::from(vec![number as u8; 2]), Some(Revision(u64::MAX))));
            plan.put(Key::from(vec![number as u8; 3]), "");
        }
        let rest = PLAN_BYTES_MAX - plan.bytes();
        plan.put(Key::from(vec![0u8; 3]), vec![7u8; rest]);
        plan.check().unwrap();
        let bytes = encode(&plan);
        assert!(bytes.len() <= ENCODED_BYTES_MAX);
        assert_eq!(decode(&bytes).unwrap(), plan);
        let mut other = bytes.to_vec();
        other[0] = 2;
        assert!(decode(&Bytes::from(other)).unwrap_err().message().contains("version 2"));
        // A count or length far beyond what is there allocates nothing.
        assert!(decode(&Bytes::from_static(&[1, 0xff, 0xff, 0xff, 0xff, 0x0f])).is_err());
        assert!(decode(&Bytes::from_static(&[1, 1, 0, 0xff, 0xff, 0xff, 0xff, 0x0f])).is_err());
    }
}
