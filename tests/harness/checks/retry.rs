//! RETRY: a repeated request gets the first answer.

use super::{Verdict, failed, start};
use cairn_proto::{
    Error,
    net::{Traffic, channel},
    v1::{
        self, directory_service_client::DirectoryServiceClient, session_service_client::SessionServiceClient,
    },
};
use cluster::{Builder, Cluster};
use std::{fmt::Debug, time::Duration};
use tonic::transport::Channel;

/// A session whose requests are numbered by hand.
#[derive(Clone, Debug)]
pub struct Numbered {
    /// The directory.
    pub directory: DirectoryServiceClient<Channel>,
    /// The session.
    pub session: u64,
}

impl Numbered {
    /// Opens a session.
    ///
    /// # Panics
    /// When the directory does not open one.
    pub async fn open(cluster: &Cluster) -> Self {
        let channel =
            channel(&cluster.network(), &cluster.directory_uri(), Traffic::Small).expect("an address");
        let request =
            v1::OpenRequest { ttl_ms: Duration::from_secs(60).as_millis() as u64, ..Default::default() };
        let opened = SessionServiceClient::new(channel.clone()).open(request).await.expect("a session");
        Self { directory: DirectoryServiceClient::new(channel), session: opened.into_inner().session_id }
    }

    /// The id of a request.
    pub fn id(&self, sequence: u64) -> Option<v1::RequestId> {
        Some(v1::RequestId { session_id: self.session, sequence, uuid: String::new() })
    }

    /// A request to make an empty file.
    pub fn create(&self, sequence: u64, path: &str) -> v1::CreateRequest {
        v1::CreateRequest {
            request_id: self.id(sequence),
            path: path.into(),
            kind: v1::Kind::File as i32,
            ..Default::default()
        }
    }
}

/// A file is made, renamed and deleted, and each of these requests repeated: at once, and again when all are done and
/// the directory was restarted. Each time it gets its first answer, although the name it is about is long gone.
///
/// # Errors
/// Which request got another answer.
///
/// # Panics
/// When there is no cluster to begin with.
pub async fn first_answer(builder: Builder) -> Verdict {
    let cluster = start(builder.file_servers(1).memory(true)).await;
    let numbered = Numbered::open(&cluster).await;
    let directory = || numbered.directory.clone();
    let create = numbered.create(1, "/file");
    let rename = v1::RenameRequest {
        request_id: numbered.id(2),
        from: "/file".into(),
        to: "/other".into(),
        ..Default::default()
    };
    let delete =
        v1::DeleteRequest { request_id: numbered.id(3), path: "/other".into(), ..Default::default() };

    let created = answer(directory().create(create.clone()).await)?;
    same("create", &created, answer(directory().create(create.clone()).await))?;
    let renamed = answer(directory().rename(rename.clone()).await)?;
    same("rename", &renamed, answer(directory().rename(rename.clone()).await))?;
    let deleted = answer(directory().delete(delete.clone()).await)?;
    same("delete", &deleted, answer(directory().delete(delete.clone()).await))?;

    cluster.kill_directory().await;
    cluster.restart_directory().await.map_err(failed("the directory starts again"))?;
    cluster.wait_ready().await.map_err(failed("the directory starts again"))?;
    same("create", &created, answer(directory().create(create).await))?;
    same("delete", &deleted, answer(directory().delete(delete).await))?;
    same("rename", &renamed, answer(directory().rename(rename).await))?;
    cluster.shutdown().await.expect("a clean end");
    Ok(())
}

fn answer<T>(outcome: Result<tonic::Response<T>, tonic::Status>) -> Result<T, String> {
    outcome.map(tonic::Response::into_inner).map_err(|status| Error::from(status).to_string())
}

fn same<T: PartialEq + Debug>(what: &str, first: &T, again: Result<T, String>) -> Verdict {
    match again {
        Ok(again) if again == *first => Ok(()),
        Ok(again) => Err(format!("a repeated {what} got {again:?} instead of {first:?}")),
        Err(error) => Err(format!("a repeated {what} failed: {error}")),
    }
}
