//! `SessionService.Grant`: chunk ids to write under.

use super::{
    resolve::resolve,
    session::{admit_one, living},
    view::View,
};
use crate::{directory::Directory, sessions::Possession, store::CommitError};
use cairn_core::{plan::Plan, record, session};
use cairn_proto::{
    Error, Reason, Result,
    id::{GrantId, GroupId, ServerId, SessionId},
    path::FilePath,
    v1,
};

/// Conflicts before a call gives up; only the end of the session conflicts with it.
const ATTEMPTS_MAX: u32 = 8;
/// Servers that a caller may ask to avoid.
const AVOID_MAX: usize = 1_024;

/// Hands out chunk ids in an elected group.
///
/// # Errors
/// As the contract says.
pub async fn grant(directory: &Directory, request: v1::GrantRequest) -> Result<v1::GrantResponse> {
    let session_id = SessionId(request.session_id);
    directory.sessions.check(session_id)?;
    let count = session::grant_count(request.count)?;
    if request.avoid_server_ids.len() > AVOID_MAX {
        return Err(Error::limit(format!("at most {AVOID_MAX} servers can be avoided")));
    }
    let avoid: Vec<ServerId> = request.avoid_server_ids.iter().copied().map(ServerId).collect();
    let path = match request.path.as_str() {
        "" => None,
        path => Some(FilePath::parse(path)?),
    };
    admit_one(directory, session_id, Possession::Grant).await?;
    directory.cluster.pace().await;
    for _ in 0..ATTEMPTS_MAX {
        let view = View::new(directory.store.clone());
        let replication = match &path {
            Some(path) => resolve(&view, path).await?.replication,
            None => 0,
        };
        let owner = living(directory, &view, session_id).await?;
        let mut plan = Plan::new();
        session::require(&mut plan, session_id, owner.revision);
        let grant = Offer { session: session_id, replication, avoid: &avoid, count };
        let grant = give(directory, &mut plan, GrantId(directory.ids.next().await?), &grant).await?;
        match directory.store.commit(plan).await {
            Ok(_) => return Ok(v1::GrantResponse { grant: Some(grant) }),
            // Unknown: perhaps a grant that nobody uses was made; it closes with the session.
            Err(CommitError::Conflict | CommitError::Unknown(_)) => {}
            Err(CommitError::Refused(error)) => return Err(error),
        }
    }
    Err(Error::new(Reason::Conflict, "the grant could not be made: try again").retry_after_ms(50))
}

/// What a grant is to be.
pub(super) struct Offer<'a> {
    pub session: SessionId,
    /// Of the file or directory it is for; 0: the cluster's.
    pub replication: u32,
    pub avoid: &'a [ServerId],
    pub count: u32,
}

/// Gives a grant in a plan, in a group elected for it.
///
/// # Errors
/// `TOO_FEW_SERVERS`.
pub(super) async fn give(
    directory: &Directory,
    plan: &mut Plan,
    id: GrantId,
    offer: &Offer<'_>,
) -> Result<v1::Grant> {
    let replication = match offer.replication {
        0 => directory.cluster.replication_default(),
        factor => factor,
    };
    let (group_id, group) = directory.cluster.elect(replication, offer.avoid).await?;
    let record = record::Grant {
        group: group_id.0,
        session: offer.session.0,
        count: offer.count,
        ..record::Grant::default()
    };
    session::give(plan, id, &record);
    Ok(to_wire(directory, id, group_id, &group, &record))
}

fn to_wire(
    directory: &Directory,
    id: GrantId,
    group_id: GroupId,
    group: &record::Group,
    grant: &record::Grant,
) -> v1::Grant {
    let group = directory.cluster.group(group_id).unwrap_or_else(|| v1::Group {
        id: group_id.0,
        scheme: Some(v1::Scheme { replicas: group.replicas, min_copies: group.min_copies }),
        seats: (0..)
            .zip(&group.seats)
            .map(|(number, server)| v1::Seat { number, server_id: *server })
            .collect(),
        primary_id: group.primary,
        epoch: group.epoch,
        former_ids: group.former.clone(),
    });
    let members = directory.cluster.members(std::slice::from_ref(&group));
    v1::Grant {
        id: id.0,
        group: Some(group),
        members,
        count: grant.count,
        session_id: grant.session,
        ..v1::Grant::default()
    }
}
