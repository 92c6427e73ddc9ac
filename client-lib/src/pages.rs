//! Answers that come in pages, from a directory that may be at fault: pages that lead nowhere are an error, and no loop
//! without an end.

use cairn_proto::{Error, Result};

/// Pages without an entry in a row. A directory that is well sends none, or one behind the last entry.
const EMPTY_MAX: u32 = 16;

/// Follows the tokens of a call's pages.
#[derive(Debug, Default)]
pub(crate) struct Pages {
    asked: String,
    empty: u32,
}

impl Pages {
    /// The token to ask for the next page with, after one with so many entries; `None` at the end.
    ///
    /// # Errors
    /// `INTERNAL` when the page leads to itself, or too many held nothing.
    pub fn next(&mut self, token: String, entries: usize) -> Result<Option<String>> {
        if token.is_empty() {
            return Ok(None);
        }
        self.empty = if entries == 0 { self.empty + 1 } else { 0 };
        if token == self.asked || self.empty > EMPTY_MAX {
            return Err(Error::internal(
                "the directory answers with pages that lead nowhere: it is at fault, look at its log",
            ));
        }
        self.asked.clone_from(&token);
        Ok(Some(token))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_proto::Reason;

    #[test]
    fn pages_end_or_lead_on() {
        let mut pages = Pages::default();
        assert_eq!(pages.next("a".into(), 3).unwrap().as_deref(), Some("a"));
        assert_eq!(pages.next("b".into(), 0).unwrap().as_deref(), Some("b"));
        assert_eq!(pages.next(String::new(), 0).unwrap(), None);
        assert_eq!(pages.next("b".into(), 3).unwrap_err().reason, Reason::Internal, "it leads to itself");
        let mut pages = Pages::default();
        let led = (0..100).take_while(|number| pages.next(number.to_string(), 0).is_ok()).count();
        assert_eq!(led, EMPTY_MAX as usize);
    }
}
