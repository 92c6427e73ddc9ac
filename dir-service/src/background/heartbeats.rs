//! Silence, seats and roles, and telling file servers what changed before it counts.

use crate::directory::Directory;
use cairn_proto::{
    Reason,
    id::{Revision, ServerId},
    v1,
};
use std::{sync::Arc, time::Duration};

/// Lets time pass over all servers and acts on what follows.
pub async fn run(directory: Arc<Directory>) {
    let cluster = &directory.cluster;
    let timing = &directory.config.timing;
    let pause = Duration::from_millis(timing.heartbeat_interval_ms.min(timing.background_interval_ms).max(1));
    loop {
        if let Err(error) = cluster.step().await {
            tracing::debug!(%error, "seats could not be settled, trying again");
        }
        let _ = tokio::time::timeout(pause, cluster.seated.notified()).await;
    }
}

/// Tells every server of a changed topology. Heartbeat answers carry it too, for those that could not be told.
pub async fn tell(directory: Arc<Directory>) {
    let cluster = &directory.cluster;
    let pause = Duration::from_millis(directory.config.timing.heartbeat_interval_ms.max(1));
    loop {
        let (servers, topology) = {
            let state = cluster.state.lock();
            let servers: Vec<v1::Server> =
                state.to_tell().into_iter().filter_map(|id| state.server(id)).collect();
            (servers, state.topology(&cluster.cluster_id, cluster.generation.0))
        };
        let told = servers.into_iter().map(|server| {
            let topology = topology.clone();
            async move {
                let request = v1::AdoptRequest { topology: Some(topology) };
                let answer = cluster
                    .peers
                    .replica(&server, |mut client| async move { client.adopt(request).await })
                    .await;
                match answer {
                    Ok(answer) => {
                        let mut state = cluster.state.lock();
                        state.acknowledged(ServerId(server.id), Revision(answer.revision));
                    }
                    // An older life of the process: it registers anew soon.
                    Err(error) if error.reason == Reason::WrongCluster => {}
                    Err(error) => {
                        tracing::debug!(server = server.id, %error, "could not be told the topology")
                    }
                }
            }
        });
        futures::future::join_all(told).await;
        let _ = tokio::time::timeout(pause, cluster.adopting.notified()).await;
    }
}
