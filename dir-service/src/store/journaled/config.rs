//! The bounds of a journaled store.

/// How a journaled store is kept. All sizes in bytes.
#[derive(Clone, Debug)]
pub struct JournaledConfig {
    /// Size of the journal's files, which are filled with zeros before they are used. 16 MiB; at least 2 MiB, so that
    /// the largest plan fits.
    pub segment_bytes: u32,
    /// Most plans that become durable with one sync. 1,024.
    pub batch_plans_max: usize,
    /// Most bytes of such plans; one larger plan goes alone. 4 MiB.
    pub batch_bytes_max: usize,
    /// Most plans that wait to be committed; more are refused as overload. 8,192.
    pub queue_plans_max: usize,
    /// Most bytes of such plans. 64 MiB.
    pub queue_bytes_max: usize,
    /// Recent plans whose revisions stay readable. 10,000; fewer when they exceed `keep_bytes`.
    pub keep_plans: usize,
    /// Memory for recent plans, roughly. 64 MiB. Commits wait at twice this when the index cannot follow.
    pub keep_bytes: usize,
    /// Most plans that go to the index in one transaction. 4,096.
    pub apply_plans: usize,
    /// Bytes of plans after which the index makes itself durable: what a restart replays. 64 MiB.
    pub checkpoint_bytes: u64,
    /// The same, in plans. 200,000.
    pub checkpoint_plans: u64,
    /// Bytes of older journal that are kept for file servers that fell behind. 64 MiB.
    pub journal_keep_bytes: u64,
    /// Size of the journal beyond which checkpoints that are being sent no longer hold it back. 1 GiB.
    pub journal_hold_bytes_max: u64,
    /// Room on the disk that the index must leave: below it, commits are refused until there is more. 32 MiB.
    pub index_reserve_bytes: u64,
}

impl Default for JournaledConfig {
    fn default() -> Self {
        Self {
            segment_bytes: 16 * 1024 * 1024,
            batch_plans_max: 1_024,
            batch_bytes_max: 4 * 1024 * 1024,
            queue_plans_max: 8_192,
            queue_bytes_max: 64 * 1024 * 1024,
            keep_plans: 10_000,
            keep_bytes: 64 * 1024 * 1024,
            apply_plans: 4_096,
            checkpoint_bytes: 64 * 1024 * 1024,
            checkpoint_plans: 200_000,
            journal_keep_bytes: 64 * 1024 * 1024,
            journal_hold_bytes_max: 1024 * 1024 * 1024,
            index_reserve_bytes: 32 * 1024 * 1024,
        }
    }
}
