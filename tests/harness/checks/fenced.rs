//! FENCED: a former holder's token is good for nothing.

use super::{Verdict, failed, start};
use client_lib::{Client, LockOptions, Reason, WriteOptions};
use cluster::Builder;

/// Holders are paused past their leases, for which an operator's force stands; then they go on. Some find the file
/// changed, some find it locked by another, who must not be disturbed either. Each tries to commit what it had begun,
/// and to write anew with its token.
///
/// # Errors
/// When a former holder changed something, or was told anything but that its lock is lost.
///
/// # Panics
/// When there is no cluster to begin with.
pub async fn former_holder(builder: Builder, rounds: usize) -> Verdict {
    let cluster = start(builder.file_servers(3).memory(true)).await;
    let admin = cluster.client().await.expect("a client");
    for round in 0..rounds {
        let path = format!("/file-{round}");
        admin.write(&path, "before").await.expect("a write");
        let slow = cluster.client().await.expect("a client");
        let mut file = slow.open_options().write(true).open(&path).await.expect("the lock");
        file.write_at(0, vec![b'x'; 100_000]).await.expect("bytes under way");
        let token = file.token().await.expect("a handle that writes").expect("has a token");
        admin.unlock_force(&path).await.expect("an operator's force");
        let after = format!("after {round}");
        // Every other round the next holder is still at work when the former one comes back.
        let next = match round % 2 {
            0 => Some(admin.lock(&path, LockOptions::new()).await.map_err(failed("the next holder"))?),
            _ => None,
        };
        if let Some(next) = &next
            && next.token() <= token
        {
            return Err(format!("token {} was granted after {token}", next.token()));
        }
        let options = next.iter().fold(WriteOptions::new(), |options, next| options.token(next.token()));
        admin.write_with(&path, after.clone(), options).await.map_err(failed("the next writer"))?;

        refused(&slow.write_with(&path, "late", WriteOptions::new().token(token)).await, "a write")?;
        unchanged(&admin, &path, &after).await?;
        refused(&file.close().await, "a commit")?;
        unchanged(&admin, &path, &after).await?;
        if let Some(next) = next {
            admin
                .write_with(&path, "last", WriteOptions::new().token(next.token()))
                .await
                .map_err(failed("the next holder's lock was lost with the former one's"))?;
            next.unlock().await.map_err(failed("the next holder's lock was lost"))?;
        }
        slow.close().await.ok();
    }
    cluster.shutdown().await.expect("a clean end");
    Ok(())
}

fn refused<T>(outcome: &client_lib::Result<T>, what: &str) -> Verdict {
    match outcome {
        Ok(_) => Err(format!("{what} of a former holder was accepted")),
        Err(error)
            if matches!(
                error.reason,
                Reason::LockLost | Reason::SessionExpired | Reason::ConditionFailed
            ) =>
        {
            Ok(())
        }
        Err(error) => Err(format!("{what} of a former holder was refused for another reason: {error}")),
    }
}

async fn unchanged(client: &Client, path: &str, content: &str) -> Verdict {
    let read = client.read(path).await.map_err(failed(path))?;
    if read == content { Ok(()) } else { Err(format!("{path} has bytes of a former holder")) }
}
