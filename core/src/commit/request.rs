//! Receipts and edits as they come in become values that cannot be wrong by themselves.

use super::{COMMIT_EDITS_MAX, COMMIT_RECEIPTS_MAX, Receipt};
use crate::layout::{Edit, NewChunk};
use cairn_proto::{
    Error, Result,
    convert::{chunk_id, chunk_length},
    id::{GroupId, ServerId},
    v1,
};
use std::collections::BTreeSet;

/// Receipts of a request, each chunk once.
///
/// # Errors
/// `INVALID_ARGUMENT`, or `LIMIT_EXCEEDED` for too many or too long chunks.
pub fn receipts(receipts: &[v1::Receipt]) -> Result<Vec<Receipt>> {
    if receipts.len() > COMMIT_RECEIPTS_MAX {
        return Err(Error::limit(format!(
            "a commit has at most {COMMIT_RECEIPTS_MAX} receipts, not {}",
            receipts.len()
        )));
    }
    let mut seen = BTreeSet::new();
    receipts
        .iter()
        .map(|receipt| {
            let id = chunk_id(receipt.chunk.as_ref())?;
            if !seen.insert(id) {
                return Err(Error::invalid(format!("chunk {id} has two receipts")));
            }
            let chunk = NewChunk {
                id,
                group: GroupId(receipt.group_id),
                length: chunk_length(receipt.length)?,
                checksum: receipt.checksum,
            };
            // 0 stands for an empty seat and is nobody.
            let holders =
                receipt.holder_ids.iter().filter(|holder| **holder != 0).map(|holder| ServerId(*holder));
            Ok(Receipt { chunk, holders: holders.collect() })
        })
        .collect()
}

/// Edits of a request.
///
/// # Errors
/// `INVALID_ARGUMENT` for an edit that says nothing, `LIMIT_EXCEEDED` for too many.
pub fn edits(edits: &[v1::Edit]) -> Result<Vec<Edit>> {
    if edits.len() > COMMIT_EDITS_MAX {
        return Err(Error::limit(format!(
            "a commit has at most {COMMIT_EDITS_MAX} edits, not {}",
            edits.len()
        )));
    }
    edits
        .iter()
        .map(|edit| match &edit.edit {
            Some(v1::edit::Edit::Write(write)) => Ok(Edit::Write {
                offset: write.offset,
                length: write.length,
                chunk: write.receipt_index as usize,
                chunk_offset: write.chunk_offset,
            }),
            Some(v1::edit::Edit::Append(append)) => Ok(Edit::Append { chunk: append.receipt_index as usize }),
            Some(v1::edit::Edit::Truncate(truncate)) => Ok(Edit::Truncate { length: truncate.length }),
            Some(v1::edit::Edit::Punch(punch)) => {
                Ok(Edit::Punch { offset: punch.offset, length: punch.length })
            }
            None => Err(Error::invalid("an edit is empty: give write, append, truncate or punch")),
        })
        .collect()
}
