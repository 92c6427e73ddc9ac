//! Edits on a list of extents, one byte range at a time.

use cairn_proto::v1;

#[derive(Clone, Debug, Default)]
pub struct Content {
    pub size: u64,
    pub extents: Vec<v1::Extent>,
}

impl Content {
    pub fn apply(&mut self, edit: &v1::Edit, receipts: &[v1::Receipt]) {
        use v1::edit::Edit;
        let chunk = |index: u32| {
            let receipt = &receipts[index as usize];
            v1::ChunkRef {
                chunk: receipt.chunk,
                length: receipt.length,
                checksum: receipt.checksum,
                group_id: receipt.group_id,
            }
        };
        match edit.edit.as_ref().unwrap() {
            Edit::Write(write) => {
                self.put(write.offset, write.length, Some(chunk(write.receipt_index)), write.chunk_offset);
            }
            Edit::Append(append) => {
                let chunk = chunk(append.receipt_index);
                self.put(self.size, chunk.length, Some(chunk), 0);
            }
            Edit::Truncate(truncate) => {
                self.cut(truncate.length, u64::MAX);
                self.size = truncate.length;
            }
            Edit::Punch(punch) => self.cut(punch.offset, punch.offset + punch.length),
        }
    }

    fn put(&mut self, offset: u64, length: u64, chunk: Option<v1::ChunkRef>, chunk_offset: u64) {
        self.cut(offset, offset + length);
        self.extents.push(v1::Extent { offset, length, chunk, chunk_offset });
        self.extents.sort_by_key(|extent| extent.offset);
        self.size = self.size.max(offset + length);
    }

    fn cut(&mut self, from: u64, to: u64) {
        let mut kept = Vec::new();
        for extent in self.extents.drain(..) {
            let end = extent.offset + extent.length;
            if extent.offset < from {
                kept.push(v1::Extent { length: end.min(from) - extent.offset, ..extent });
            }
            if end > to {
                let begin = extent.offset.max(to);
                let skipped = begin - extent.offset;
                kept.push(v1::Extent {
                    offset: begin,
                    length: end - begin,
                    chunk: extent.chunk,
                    chunk_offset: extent.chunk_offset + skipped,
                });
            }
        }
        self.extents = kept;
    }
}
