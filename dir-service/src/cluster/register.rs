//! File servers introduce themselves and give signs of life.
//!
//! A disk says who a server is. Two processes on copies of one disk would overwrite each other's standing, so the
//! second is refused: at another address while the first is still heard, or once a life that was superseded speaks
//! up again.

use super::{Behind, Cluster, change::Change, state::Member};
use crate::store::KeyRange;
use cairn_core::{cluster::server::Standing, key, record};
use cairn_proto::{
    Error, Reason, Result,
    id::{Revision, ServerId},
    v1,
};

/// Most endpoints of a server.
const ENDPOINTS_MAX: usize = 16;
/// Longest zone, address or identity.
const TEXT_BYTES_MAX: usize = 255;
/// Ended lives that are remembered of a server.
const SUPERSEDED_MAX: usize = 8;
/// Times that a registration is written while others change the same records: each directory of a store writes it.
const REGISTER_ATTEMPTS: u32 = 4;
/// Heartbeats that a server may miss before another process may take its place at another address.
const MISSED_HEARTBEATS: u64 = 3;

impl Cluster {
    /// A file server makes itself known.
    ///
    /// # Errors
    /// As `ClusterService.Register`; `UNAVAILABLE` while the process before is still heard; `REBUILDING` when the
    /// server knows a later state than this store has.
    pub async fn register(&self, request: v1::RegisterRequest) -> Result<v1::RegisterResponse> {
        check(&request)?;
        self.check_pristine(&request).await?;
        self.check_cluster(&request.cluster_id)?;
        self.check_not_behind((request.generation, request.term), &request.journals, request.server_id)?;
        let _changing = self.changing.lock().await;
        let mut attempts = 0;
        let (id, went_back) = loop {
            if let Some(registered) = self.write_registered(&request).await? {
                break registered;
            }
            attempts += 1;
            if attempts == REGISTER_ATTEMPTS {
                return Err(Error::unavailable("the cluster's records changed meanwhile: try again"));
            }
        };
        let now_ms = self.now_ms();
        let mut state = self.state.lock();
        let state = &mut *state;
        state.deaths.back(id);
        state.copies.started(id);
        if let Some(member) = state.servers.get_mut(&id) {
            member.standing.register(now_ms);
            if went_back.is_some() {
                member.went_back = went_back;
            }
            member.usage = request.usage.unwrap_or_default();
            member.journals = request.journals;
            // It tells with its next heartbeat which topology it keeps.
            member.topology_revision = Revision(0);
            member.challenger = None;
            member.verified_ms = None;
            member.compare_ms = 0;
        }
        tracing::info!(server = id.0, zone = %request.zone, "a file server registered");
        self.stirred.notify_one();
        self.seated.notify_one();
        Ok(v1::RegisterResponse {
            cluster_id: self.cluster_id.clone(),
            server_id: id.0,
            generation: self.generation.0,
            heartbeat_interval_ms: self.config.timing.heartbeat_interval_ms,
            topology: Some(state.topology(&self.cluster_id, self.generation.0)),
            rebuilding: false,
            life: self.serving_life(),
            directories: self.directories(),
        })
    }

    /// Writes what a file server says of itself, where that is new. Answers its id, and what an operator should know;
    /// `None` when others changed the records meanwhile.
    async fn write_registered(
        &self,
        request: &v1::RegisterRequest,
    ) -> Result<Option<(ServerId, Option<String>)>> {
        let id = match self.identify(request)? {
            Some(id) => id,
            None if request.server_id != 0 => ServerId(request.server_id),
            None => ServerId(self.ids.next().await?),
        };
        self.check_copy(id, request)?;
        let record = {
            let state = self.state.lock();
            let known = state.servers.get(&id).map(|member| &member.record);
            let record = record::Server {
                disk_id: request.disk_id.clone(),
                endpoints: request
                    .endpoints
                    .iter()
                    .map(|endpoint| record::Endpoint { uri: endpoint.uri.clone(), scope: endpoint.scope })
                    .collect(),
                zone: request.zone.clone(),
                draining: known.is_some_and(|known| known.draining),
                gone: known.is_some_and(|known| known.gone),
                total_bytes: request.usage.as_ref().map_or(0, |usage| usage.total_bytes),
                incarnation: request.incarnation.clone(),
                starts: request.starts,
            };
            (known != Some(&record)).then_some(record)
        };
        let went_back = self.went_back(id, request);
        if let Some(record) = record
            && self.try_apply(Change { servers: vec![(id, record)], ..Change::default() }).await?.is_none()
        {
            return Ok(None);
        }
        Ok(Some((id, went_back)))
    }

    /// Whether a disk is an older copy of itself: it was started more often, or kept more, than it knows. What it held and
    /// lost counts as missing as soon as its inventory is compared, as after every registration.
    fn went_back(&self, id: ServerId, request: &v1::RegisterRequest) -> Option<String> {
        let state = self.state.lock();
        let member = state.servers.get(&id)?;
        let known = &member.record;
        if known.incarnation == request.incarnation {
            return None;
        }
        let of_ours = |journals: &[v1::JournalCopy]| {
            let ours = journals.iter().find(|copy| copy.generation == self.generation.0);
            ours.map_or(0, |copy| copy.durable_revision)
        };
        let (kept, keeps) = (of_ours(&member.journals), of_ours(&request.journals));
        let is_ours = request.generation == self.generation.0;
        let signs = [
            (request.starts != 0 && request.starts <= known.starts, "start", known.starts, request.starts),
            (keeps != 0 && keeps < kept, "revision of the journal", kept, keeps),
            (
                is_ours
                    && request.topology_revision != 0
                    && request.topology_revision < member.topology_revision.0,
                "revision of the topology",
                member.topology_revision.0,
                request.topology_revision,
            ),
        ];
        let (_, what, before, now) = signs.into_iter().find(|(is_sign, ..)| *is_sign)?;
        let why = format!(
            "its disk is an older copy of itself ({what} {now} after {before}): what it kept since is missing until it is \
             copied again"
        );
        tracing::error!(server = id.0, "{why}");
        Some(why)
    }

    fn check_cluster(&self, cluster_id: &str) -> Result<()> {
        if cluster_id.is_empty() || cluster_id == self.cluster_id {
            return Ok(());
        }
        Err(Error::new(
            Reason::WrongCluster,
            format!(
                "the disk belongs to cluster {cluster_id}, this directory serves {}: start it with that cluster's \
                 directory, or with an empty disk",
                self.cluster_id
            ),
        ))
    }

    /// A store that is older than what file servers know must not serve: it would hand out what was given away
    /// already.
    fn check_not_behind(
        &self,
        (generation, term): (u64, u64),
        journals: &[v1::JournalCopy],
        server: u64,
    ) -> Result<()> {
        let ours = self.generation.0;
        let own_term = self.serving_life().map_or(0, |life| life.term);
        if generation == ours && own_term != 0 && term > own_term {
            let why = format!(
                "server {server} follows a later start of the directory, of term {term} after {own_term}"
            );
            tracing::error!(%why, "this directory was superseded");
            self.give_way(Behind {
                reason: why.clone(),
                cluster_id: self.cluster_id.clone(),
                rebuild: false,
            });
            return Err(Error::new(Reason::Rebuilding, format!("this directory was superseded: {why}"))
                .retry_after_ms(self.config.timing.heartbeat_interval_ms));
        }
        let known = journals.iter().filter(|copy| copy.cluster_id == self.cluster_id);
        let later = known.map(|copy| (copy.generation, copy.durable_revision)).max();
        let durable = self.durable_revision();
        let why = if generation > ours {
            format!("server {server} knows generation {generation}, this store is of generation {ours}")
        } else if let Some((generation, revision)) = later
            && (generation, revision) > (ours, durable)
        {
            format!(
                "server {server} carries the journal of generation {generation} up to revision {revision}, this \
                 store is of generation {ours} at revision {durable}"
            )
        } else {
            return Ok(());
        };
        tracing::error!(%why, "an older copy of the directory's store was mounted");
        self.give_way(Behind { reason: why.clone(), cluster_id: self.cluster_id.clone(), rebuild: true });
        Err(Error::new(Reason::Rebuilding, format!("the directory's store is an older copy: {why}"))
            .retry_after_ms(self.config.timing.heartbeat_interval_ms))
    }

    /// Ends this directory's service.
    pub(crate) fn give_way(&self, reason: Behind) {
        self.behind.send_if_modified(|behind| {
            let first = behind.is_none();
            behind.get_or_insert(reason);
            first
        });
    }

    /// A cluster that was formed because nobody knew one yet, and holds nothing, gives way to one that turns up late.
    async fn check_pristine(&self, request: &v1::RegisterRequest) -> Result<()> {
        let other = &request.cluster_id;
        let carries = request.journals.iter().any(|copy| copy.cluster_id == *other);
        // A store that is shared was chosen by whoever started its directories: it gives way to none.
        if other.is_empty() || *other == self.cluster_id || !carries || self.membership.is_some() {
            return Ok(());
        }
        let inodes = KeyRange::prefix(key::inodes());
        let (_, page) = self.store.scan(inodes, 2, None).await?;
        if page.entries.len() > 1 {
            return Ok(());
        }
        let reason =
            format!("a file server of cluster {other} appeared, and the new cluster holds nothing yet");
        self.give_way(Behind { reason: reason.clone(), cluster_id: other.clone(), rebuild: true });
        Err(Error::new(Reason::Rebuilding, reason).retry_after_ms(self.config.timing.heartbeat_interval_ms))
    }

    /// The server of a disk, when it is known.
    fn identify(&self, request: &v1::RegisterRequest) -> Result<Option<ServerId>> {
        let state = self.state.lock();
        let by_disk = state.servers.iter().find(|(_, member)| member.record.disk_id == request.disk_id);
        let by_disk = by_disk.map(|(id, _)| *id);
        if request.server_id == 0 {
            // The answer to its first registration was lost.
            return Ok(by_disk);
        }
        let id = ServerId(request.server_id);
        let other = state.servers.get(&id).filter(|member| member.record.disk_id != request.disk_id);
        if other.is_some() || by_disk.is_some_and(|known| known != id) {
            return Err(Error::invalid(format!(
                "disk {} says that it is server {id}, which the directory knows with another disk: do not copy \
                 disks; start with an empty one",
                request.disk_id
            )));
        }
        Ok(state.servers.contains_key(&id).then_some(id))
    }

    fn check_copy(&self, id: ServerId, request: &v1::RegisterRequest) -> Result<()> {
        let now_ms = self.now_ms();
        let mut state = self.state.lock();
        let Some(member) = state.servers.get_mut(&id) else { return Ok(()) };
        if member.record.incarnation == request.incarnation {
            return Ok(());
        }
        if member.superseded.contains(&request.incarnation) {
            return Err(copied(id, &request.disk_id));
        }
        let same_address = member.record.endpoints.len() == request.endpoints.len()
            && member
                .record
                .endpoints
                .iter()
                .zip(&request.endpoints)
                .all(|(known, new)| known.uri == new.uri);
        let silent_ms = member.standing.silent_ms(now_ms);
        let interval_ms = self.config.timing.heartbeat_interval_ms;
        if !same_address && member.standing.was_heard() && silent_ms < MISSED_HEARTBEATS * interval_ms {
            match &member.challenger {
                Some((challenger, since_ms)) if *challenger == request.incarnation => {
                    if now_ms - silent_ms > *since_ms {
                        return Err(copied(id, &request.disk_id));
                    }
                }
                _ => member.challenger = Some((request.incarnation.clone(), now_ms)),
            }
            return Err(Error::unavailable(format!(
                "server {id} was heard at another address {silent_ms} ms ago: waiting whether it lives"
            ))
            .retry_after_ms(interval_ms));
        }
        let ended = std::mem::take(&mut member.record.incarnation);
        member.supersede(ended);
        Ok(())
    }

    /// A sign of life.
    ///
    /// # Errors
    /// `NOT_FOUND`: register again; `INVALID_ARGUMENT` for a copied disk; `WRONG_CLUSTER`.
    pub fn heartbeat(&self, request: v1::HeartbeatRequest) -> Result<v1::HeartbeatResponse> {
        self.check_cluster(&request.cluster_id)?;
        self.check_not_behind((request.generation, request.term), &request.journals, request.server_id)?;
        let (id, now_ms) = (ServerId(request.server_id), self.now_ms());
        let mut state = self.state.lock();
        let unknown = || Error::not_found(format!("file server {id} is not registered: register again"));
        let member: &mut Member = state.servers.get_mut(&id).ok_or_else(unknown)?;
        if member.superseded.contains(&request.incarnation) {
            return Err(copied(id, &member.record.disk_id));
        }
        // Known from the records alone: it registers anew, and tells what it carries.
        let known = member.standing.was_heard() && member.record.incarnation == request.incarnation;
        if !known || !member.standing.hear(now_ms) {
            return Err(unknown());
        }
        if let Some(usage) = request.usage {
            member.usage = usage;
        }
        member.scrub = request.scrub.or(member.scrub);
        member.journals = request.journals;
        if request.leaving {
            member.standing.leave();
        }
        let shown = member.standing.state();
        for chunk in &request.bad_chunks {
            state.copies.suspect(id, chunk.into());
        }
        if !request.bad_chunks.is_empty() {
            self.stirred.notify_one();
        }
        if request.leaving {
            self.seated.notify_one();
        }
        state.acknowledged(id, Revision(request.topology_revision));
        let topology = (request.topology_revision != state.revision.0)
            .then(|| state.topology(&self.cluster_id, self.generation.0));
        Ok(v1::HeartbeatResponse {
            generation: self.generation.0,
            state: shown as i32,
            topology,
            life: self.serving_life(),
            directories: self.directories(),
        })
    }

    /// Servers and groups, when the caller knows something else.
    pub fn topology(&self, known_revision: u64) -> v1::TopologyResponse {
        let state = self.state.lock();
        if known_revision != 0 && known_revision == state.revision.0 {
            return v1::TopologyResponse {
                revision: state.revision.0,
                cluster_id: self.cluster_id.clone(),
                generation: self.generation.0,
                term: state.term,
                ..Default::default()
            };
        }
        state.topology(&self.cluster_id, self.generation.0)
    }
}

/// What can be checked without knowing anything.
pub(crate) fn check(request: &v1::RegisterRequest) -> Result<()> {
    let too_long = |text: &str| text.len() > TEXT_BYTES_MAX;
    if request.disk_id.is_empty() || request.incarnation.is_empty() {
        return Err(Error::invalid(
            "a file server registers with the identity of its disk and of its process",
        ));
    }
    if request.endpoints.is_empty() || request.endpoints.len() > ENDPOINTS_MAX {
        return Err(Error::invalid(format!(
            "a file server has 1 to {ENDPOINTS_MAX} addresses, not {}",
            request.endpoints.len()
        )));
    }
    let texts = [&request.cluster_id, &request.disk_id, &request.incarnation, &request.zone];
    if texts.into_iter().any(|text| too_long(text)) || request.endpoints.iter().any(|one| too_long(&one.uri))
    {
        return Err(Error::limit(format!(
            "names and addresses of a file server have at most {TEXT_BYTES_MAX} bytes"
        )));
    }
    for endpoint in &request.endpoints {
        let is_socket = endpoint.uri.strip_prefix("unix:").is_some_and(|path| !path.is_empty());
        if !is_socket && cairn_proto::net::authority(&endpoint.uri).is_err() {
            return Err(Error::invalid(format!(
                "'{}' is not an address: write http://host:port or unix:/path",
                endpoint.uri
            )));
        }
    }
    if request.server_id != 0 && request.cluster_id.is_empty() {
        return Err(Error::invalid(
            "a disk with a server's id belongs to a cluster: its identity is damaged",
        ));
    }
    Ok(())
}

fn copied(id: ServerId, disk: &str) -> Error {
    Error::invalid(format!(
        "two processes run as server {id} on copies of disk {disk}: stop one of them, and start it with an empty disk"
    ))
    .on(id.to_string())
}

impl Member {
    /// For tests and first registrations: a member that was heard now.
    pub fn registered(record: record::Server, revision: Revision, now_ms: u64) -> Self {
        Self::new(record, revision, Standing::registered(now_ms))
    }

    /// A life of its process has ended.
    pub(super) fn supersede(&mut self, ended: String) {
        if !ended.is_empty() && !self.superseded.contains(&ended) {
            self.superseded.push(ended);
        }
        if self.superseded.len() > SUPERSEDED_MAX {
            self.superseded.remove(0);
        }
    }
}
