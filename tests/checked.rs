//! CHECKED: a flipped bit in a replica is never served, is reported, and is healed from a good copy.

use cairn_tests::{checks::checked, seed};
use cluster::Cluster;

#[tokio::test(flavor = "multi_thread")]
async fn checked_flipped_bits_are_not_served_and_are_healed() {
    assert_eq!(checked::flipped_bits(Cluster::builder(), seed("CHECKED_SEED"), 12).await, Ok(()));
}

#[tokio::test(flavor = "multi_thread")]
async fn checked_a_bad_record_hides_nothing_behind_it() {
    assert_eq!(checked::one_bad_record_each(Cluster::builder(), seed("CHECKED_SEED")).await, Ok(()));
}

#[tokio::test(flavor = "multi_thread")]
async fn checked_the_directory_refuses_a_damaged_journal_and_can_be_rebuilt() {
    assert_eq!(checked::bad_record_of_the_directory(Cluster::builder()).await, Ok(()));
}
