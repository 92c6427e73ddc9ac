//! How many entries a page of a directory holds.

use cairn_proto::limits::PAGE_BYTES_MAX;

/// A page that is being filled: it ends before the entry that would be too much, and never before the first.
#[derive(Debug, Default)]
pub struct PageFill {
    entries: usize,
    bytes: usize,
}

impl PageFill {
    /// Whether an entry that takes so many bytes in the answer belongs to the page too. After the first `false` the
    /// page is full.
    pub fn takes(&mut self, bytes: usize) -> bool {
        if self.entries > 0 && self.bytes.saturating_add(bytes) > PAGE_BYTES_MAX {
            return false;
        }
        self.entries += 1;
        self.bytes = self.bytes.saturating_add(bytes);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_as_long_as_fits() {
        let mut fill = PageFill::default();
        let taken = (0..100_000).take_while(|_| fill.takes(1_000)).count();
        assert_eq!(taken, PAGE_BYTES_MAX / 1_000);
        let mut fill = PageFill::default();
        assert!(fill.takes(PAGE_BYTES_MAX));
        assert!(!fill.takes(1));
    }

    #[test]
    fn a_page_that_leads_on_holds_something() {
        let mut fill = PageFill::default();
        assert!(fill.takes(usize::MAX));
        assert!(!fill.takes(usize::MAX));
    }
}
