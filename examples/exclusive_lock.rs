//! Two writers of one file: while one holds the lock the other is declined, and who lost it is fenced off.
//!
//!     cargo run -p examples --example exclusive_lock

use client_lib::{Attributes, Error, LockOptions, Reason, Result, WriteOptions};
use cluster::Cluster;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let cluster = Cluster::start(3).await?;
    let anna = cluster.client_builder().owner("anna").build()?;
    let ben = cluster.client_builder().owner("ben").build()?;

    // Anna holds the lock, so Ben is declined at once, and told who is in his way.
    let annas = anna.lock("/ledger", LockOptions::new()).await?;
    let declined = refused(ben.write("/ledger", "ben was here").await);
    assert_eq!(declined.reason, Reason::LockHeld);
    assert_eq!(declined.detail.lock.as_ref().map(|lock| lock.owner.as_str()), Some("anna"));
    println!("ben: {declined}");

    // Anna writes under her lock.
    anna.write_with("/ledger", "anna: 1", WriteOptions::new().token(&annas)).await?;

    // An operator takes the lock away (as its lease would have ended, had Anna died), and Ben gets it. His token is
    // larger than hers.
    ben.unlock_force("/ledger").await?;
    let bens = ben.lock("/ledger", LockOptions::new()).await?;
    assert!(bens.token() > annas.token());
    ben.write_with("/ledger", "ben: 2", WriteOptions::new().token(&bens)).await?;

    // Anna does not know yet. What she writes under her old token is refused, whenever it arrives.
    let fenced = refused(anna.write_with("/ledger", "anna: 3", WriteOptions::new().token(&annas)).await);
    assert_eq!(fenced.reason, Reason::LockLost);
    println!("anna: {fenced}");

    bens.unlock().await?;
    assert_eq!(anna.read("/ledger").await?, "ben: 2");
    println!("the ledger says: ben: 2");

    anna.close().await?;
    ben.close().await?;
    cluster.shutdown().await?;
    Ok(())
}

/// The refusal that has to be.
fn refused(answer: Result<Attributes>) -> Error {
    match answer {
        Err(error) => error,
        Ok(attributes) => panic!("this should have been refused, and made {attributes:?}"),
    }
}
