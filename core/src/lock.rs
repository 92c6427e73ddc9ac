//! Locks: who holds one, who may change what it protects.
//!
//! ```text
//!              grant(shared)                 grant(shared) by anybody
//!   free ----------------------> shared <--------+
//!    ^ |                           |  +----------+
//!    | | grant(exclusive)          | release, session end, force: the last holder leaves
//!    | v                           v
//!   exclusive --release, session end, force--> free
//! ```
//!
//! A lock belongs to its token, not to its session: a session that holds a lock and asks again is declined as anybody
//! else, so that two handles of one program exclude each other too. A token is (generation, revision of the granting
//! plan); revisions only grow within a generation and a lock's record is written by the plan that grants it, so
//! tokens grow also across delete and re-create of a name.
//!
//! A lock is on an inode, or on a name that does not exist yet (a reservation). Making the name under its reservation
//! moves the lock to the new inode ([`Place::move_to`]). Every plan that changes a name or an inode requires the lock
//! there, or its absence, to be unchanged ([`Place::require`]).

use crate::{
    key,
    plan::{Key, Plan, Precondition},
    record::{Lock, LockHolder, Record},
};
use cairn_proto::{
    Error, Reason, Result,
    id::{FencingToken, Generation, InodeId, Revision, SessionId},
    limits::LOCK_HOLDERS_MAX,
    v1,
};

/// Entries of sessions that one plan removes with a lock; more are left to the ends of those sessions, where an entry
/// that leads nowhere is dropped.
pub const ENDED_ENTRIES_MAX: usize = 64;

/// Tells how long a session lives on unless renewed, in milliseconds. Only for messages.
pub type ExpiresIn<'a> = &'a (dyn Fn(SessionId) -> u64 + Send + Sync);

/// Where a lock can be, with the one that is there.
#[derive(Clone, Debug, PartialEq)]
pub struct Place {
    key: Key,
    inode: InodeId,
    held: Option<(Lock, Revision)>,
}

/// Who asks for a lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Applicant<'a> {
    /// The session that will hold it.
    pub session: SessionId,
    /// The holder as it names itself.
    pub owner: &'a str,
    /// The path by which it asks, for messages.
    pub path: &'a str,
    /// How to exclude others.
    pub mode: v1::LockMode,
    /// The life of the store.
    pub generation: Generation,
}

impl Place {
    /// The place of an inode's lock, with what was read there.
    pub fn of_inode(inode: InodeId, held: Option<(Lock, Revision)>) -> Self {
        Self { key: key::lock(inode), inode, held }
    }

    /// The place of a reservation, with what was read there.
    pub fn of_name(parent: InodeId, name: &str, held: Option<(Lock, Revision)>) -> Self {
        Self { key: key::reservation(parent, name), inode: InodeId(0), held }
    }

    /// The place by the key of a lock or reservation; `None` for another key.
    pub fn of_key(key: &Key, held: Option<(Lock, Revision)>) -> Option<Self> {
        match key.get(4)? {
            b'l' => Some(Self::of_inode(InodeId(key::last_u64(key)?), held)),
            b'r' => {
                let (parent, name) = key::split_name(key)?;
                Some(Self::of_name(parent, name, held))
            }
            _ => None,
        }
    }

    /// The locked inode; 0 for a name that does not exist yet.
    pub fn inode(&self) -> InodeId {
        self.inode
    }

    /// The key of the lock's record.
    pub fn key(&self) -> &Key {
        &self.key
    }

    /// Whether anybody holds a lock here.
    pub fn is_held(&self) -> bool {
        self.held.is_some()
    }

    /// The sessions that hold the lock, each once, in order of their grants.
    pub fn sessions(&self) -> Vec<SessionId> {
        let mut sessions = Vec::new();
        for holder in self.held.iter().flat_map(|(lock, _)| &lock.holders) {
            if !sessions.contains(&SessionId(holder.session)) {
                sessions.push(SessionId(holder.session));
            }
        }
        sessions
    }

    /// The session that holds the lock by this token.
    pub fn session_of(&self, token: FencingToken) -> Option<SessionId> {
        let (lock, written) = self.held.as_ref()?;
        lock.holders
            .iter()
            .find(|holder| holder.token(*written) == token)
            .map(|holder| SessionId(holder.session))
    }

    /// Requires in a plan that the lock, or its absence, is as it was read.
    pub fn require(&self, plan: &mut Plan) {
        plan.require(Precondition::Unchanged(
            self.key.clone(),
            self.held.as_ref().map(|(_, revision)| *revision),
        ));
    }

    /// Whether the name or inode here may be changed (commit, rename, delete, attributes), by the holder of `token`
    /// or by somebody without a lock.
    ///
    /// # Errors
    /// `LOCK_HELD` with the holder when others exclude it; `LOCK_LOST` for a token that is not that of the held lock.
    pub fn allows(&self, token: Option<FencingToken>, expires_in_ms: ExpiresIn<'_>) -> Result<()> {
        let Some((lock, _)) = &self.held else {
            return match token {
                None => Ok(()),
                Some(token) => Err(lost(token, "")),
            };
        };
        let Some(token) = token else { return Err(self.declined(expires_in_ms)) };
        if self.session_of(token).is_none() {
            return Err(lost(token, &lock.path));
        }
        if lock.mode == v1::LockMode::Exclusive as i32 {
            return Ok(());
        }
        let mut error = self.declined(expires_in_ms);
        error.detail.message = format!(
            "{} has a shared lock, under which nobody may change it: unlock and lock exclusively",
            lock.path
        );
        Err(error)
    }

    /// Grants a lock in a plan: its record, and the holder's entry. The token is (generation, revision of the plan).
    ///
    /// # Errors
    /// `LOCK_HELD` with the holder in the way; `LIMIT_EXCEEDED` beyond [`LOCK_HOLDERS_MAX`] shared holders;
    /// `INVALID_ARGUMENT` without a mode.
    pub fn grant(
        &self,
        plan: &mut Plan,
        applicant: &Applicant<'_>,
        expires_in_ms: ExpiresIn<'_>,
    ) -> Result<()> {
        if applicant.mode == v1::LockMode::Unspecified {
            return Err(Error::invalid("a lock is exclusive or shared: give a mode").at(applicant.path));
        }
        let mut lock = match &self.held {
            None => {
                Lock { mode: applicant.mode as i32, holders: Vec::new(), path: applicant.path.to_owned() }
            }
            Some((lock, written))
                if lock.mode == v1::LockMode::Shared as i32 && applicant.mode == v1::LockMode::Shared =>
            {
                if lock.holders.len() >= LOCK_HOLDERS_MAX {
                    return Err(Error::limit(format!(
                        "{} has {LOCK_HOLDERS_MAX} shared locks, which is the most",
                        lock.path
                    ))
                    .at(applicant.path));
                }
                let mut lock = lock.clone();
                lock.settle(*written);
                lock
            }
            Some(_) => return Err(self.declined(expires_in_ms).at(applicant.path)),
        };
        lock.holders.push(LockHolder {
            session: applicant.session.0,
            generation: applicant.generation.0,
            revision: 0,
            owner: applicant.owner.to_owned(),
        });
        self.require(plan);
        plan.put(self.key.clone(), lock.to_bytes());
        plan.put(key::session_lock(applicant.session, &self.key), Vec::new());
        Ok(())
    }

    /// Gives the lock of a token back, in a plan, and says whose it was.
    ///
    /// # Errors
    /// `LOCK_LOST` when no lock is held by that token.
    pub fn release(&self, plan: &mut Plan, token: FencingToken) -> Result<SessionId> {
        let path = self.held.as_ref().map_or("", |(lock, _)| lock.path.as_str());
        let session = self.session_of(token).ok_or_else(|| lost(token, path))?;
        self.keep(plan, |holder, written| holder.token(written) != token);
        Ok(session)
    }

    /// Ends all locks of a session here, in a plan, with the session's entry. Also when it holds none: the entry then
    /// led nowhere.
    pub fn release_session(&self, plan: &mut Plan, session: SessionId) {
        plan.delete(key::session_lock(session, &self.key));
        self.keep(plan, |holder, _| holder.session != session.0);
    }

    /// Ends the lock with all its holders, in a plan: forced by an operator, or because what it protects is deleted.
    /// Answers the number of ended locks.
    pub fn end(&self, plan: &mut Plan) -> u32 {
        self.require(plan);
        let Some((lock, _)) = &self.held else { return 0 };
        plan.delete(self.key.clone());
        for session in self.sessions().into_iter().take(ENDED_ENTRIES_MAX) {
            plan.delete(key::session_lock(session, &self.key));
        }
        lock.holders.len() as u32
    }

    /// Moves a reservation to the inode that was made under it, in a plan, with its token. Without a lock nothing
    /// moves. A reservation is exclusive where its holder could make the name, so it has one holder.
    pub fn move_to(&self, plan: &mut Plan, inode: InodeId) {
        let Some((lock, written)) = &self.held else { return self.require(plan) };
        self.end(plan);
        let mut lock = lock.clone();
        lock.settle(*written);
        let target = key::lock(inode);
        for session in self.sessions().into_iter().take(ENDED_ENTRIES_MAX) {
            plan.put(key::session_lock(session, &target), Vec::new());
        }
        plan.put(target, lock.to_bytes());
    }

    /// The held locks as operators and declined callers see them; empty when nobody holds one.
    pub fn infos(&self, expires_in_ms: ExpiresIn<'_>) -> Vec<v1::LockInfo> {
        let Some((lock, written)) = &self.held else { return Vec::new() };
        lock.holders
            .iter()
            .map(|holder| v1::LockInfo {
                path: lock.path.clone(),
                inode: self.inode.0,
                mode: lock.mode,
                token: Some(holder.token(*written).into()),
                session_id: holder.session,
                owner: holder.owner.clone(),
                expires_in_ms: expires_in_ms(SessionId(holder.session)),
            })
            .collect()
    }

    /// `LOCK_HELD` with the first holder.
    pub fn declined(&self, expires_in_ms: ExpiresIn<'_>) -> Error {
        let Some(mut info) = self.infos(expires_in_ms).into_iter().next() else {
            return Error::internal("a lock that nobody holds was in the way");
        };
        let owner = if info.owner.is_empty() { "somebody".to_owned() } else { format!("'{}'", info.owner) };
        let mut error = Error::new(
            Reason::LockHeld,
            format!(
                "{} is locked by {owner} (session {}) for {} ms more unless renewed",
                info.path, info.session_id, info.expires_in_ms
            ),
        )
        .at(info.path.clone());
        // The token proves the lock: it is shown to operators who list locks, not to those who are declined.
        info.token = None;
        error.detail.lock = Some(info);
        error
    }

    fn keep(&self, plan: &mut Plan, keeps: impl Fn(&LockHolder, Revision) -> bool) {
        self.require(plan);
        let Some((lock, written)) = &self.held else { return };
        let mut rest = lock.clone();
        rest.holders.retain(|holder| keeps(holder, *written));
        for session in self.sessions() {
            if !rest.holders.iter().any(|holder| holder.session == session.0) {
                plan.delete(key::session_lock(session, &self.key));
            }
        }
        if rest.holders.is_empty() {
            plan.delete(self.key.clone());
        } else if rest.holders.len() < lock.holders.len() {
            rest.settle(*written);
            plan.put(self.key.clone(), rest.to_bytes());
        }
    }
}

fn lost(token: FencingToken, path: &str) -> Error {
    let what = if path.is_empty() { String::new() } else { format!("{path}: ") };
    Error::new(
        Reason::LockLost,
        format!(
            "{what}the lock with the token {token} is no longer held: it ended or was taken away, lock again"
        ),
    )
    .at(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Mutation;
    use v1::LockMode::{Exclusive, Shared};

    const INODE: InodeId = InodeId(7);

    fn expires(_: SessionId) -> u64 {
        1_500
    }

    fn applicant(session: u64, mode: v1::LockMode) -> Applicant<'static> {
        Applicant { session: SessionId(session), owner: "ann", path: "/a", mode, generation: Generation(3) }
    }

    fn token(revision: u64) -> FencingToken {
        FencingToken { generation: Generation(3), revision: Revision(revision) }
    }

    /// The place as it is once the plan was applied at a revision.
    fn applied(place: &Place, plan: &Plan, revision: u64) -> Place {
        let mut next = place.clone();
        for mutation in &plan.mutations {
            match mutation {
                Mutation::Put(key, value) if *key == place.key => {
                    next.held = Some((Lock::from_bytes(value).unwrap(), Revision(revision)));
                }
                Mutation::Delete(key) if *key == place.key => next.held = None,
                _ => {}
            }
        }
        next
    }

    fn locked(place: &Place, session: u64, mode: v1::LockMode, revision: u64) -> Place {
        let mut plan = Plan::new();
        place.grant(&mut plan, &applicant(session, mode), &expires).unwrap();
        applied(place, &plan, revision)
    }

    fn free() -> Place {
        Place::of_inode(INODE, None)
    }

    #[test]
    fn an_exclusive_lock_declines_all_others_and_says_who_holds_it() {
        let place = locked(&free(), 1, Exclusive, 40);
        for (session, mode) in [(2, Exclusive), (2, Shared), (1, Exclusive)] {
            let error = place.grant(&mut Plan::new(), &applicant(session, mode), &expires).unwrap_err();
            assert_eq!(error.reason, Reason::LockHeld);
            let lock = error.detail.lock.unwrap();
            assert_eq!((lock.session_id, lock.owner.as_str(), lock.expires_in_ms), (1, "ann", 1_500));
            assert_eq!((lock.inode, lock.path.as_str(), lock.token), (7, "/a", None));
        }
    }

    #[test]
    fn only_the_exclusive_token_allows_changes() {
        let place = locked(&free(), 1, Exclusive, 40);
        assert!(place.allows(Some(token(40)), &expires).is_ok());
        assert_eq!(place.allows(None, &expires).unwrap_err().reason, Reason::LockHeld);
        assert_eq!(place.allows(Some(token(39)), &expires).unwrap_err().reason, Reason::LockLost);
        let said = place.allows(Some(token(39)), &expires).unwrap_err().to_string();
        assert!(said.starts_with("/a: the lock with the token 3.39 is no longer held"), "{said}");
        let other_life = FencingToken { generation: Generation(2), revision: Revision(40) };
        assert_eq!(place.allows(Some(other_life), &expires).unwrap_err().reason, Reason::LockLost);
        assert!(free().allows(None, &expires).is_ok());
        assert_eq!(free().allows(Some(token(40)), &expires).unwrap_err().reason, Reason::LockLost);
    }

    #[test]
    fn shared_locks_go_together_keep_their_tokens_and_allow_no_change() {
        let place = locked(&locked(&free(), 1, Shared, 40), 2, Shared, 45);
        assert_eq!(place.session_of(token(40)), Some(SessionId(1)));
        assert_eq!(place.session_of(token(45)), Some(SessionId(2)));
        for shown in [None, Some(token(40)), Some(token(45))] {
            assert_eq!(place.allows(shown, &expires).unwrap_err().reason, Reason::LockHeld);
        }
        let error = place.grant(&mut Plan::new(), &applicant(3, Exclusive), &expires).unwrap_err();
        assert_eq!(error.reason, Reason::LockHeld);
        let mut plan = Plan::new();
        assert_eq!(place.release(&mut plan, token(45)).unwrap(), SessionId(2));
        let place = applied(&place, &plan, 50);
        assert_eq!(place.session_of(token(40)), Some(SessionId(1)), "the other's token is as it was");
        assert_eq!(place.session_of(token(45)), None);
        let mut plan = Plan::new();
        place.release(&mut plan, token(40)).unwrap();
        assert!(!applied(&place, &plan, 51).is_held());
    }

    #[test]
    fn one_session_may_share_twice_and_is_listed_until_it_gave_both_back() {
        let place = locked(&locked(&free(), 1, Shared, 40), 1, Shared, 41);
        let entry = key::session_lock(SessionId(1), place.key());
        let mut plan = Plan::new();
        place.release(&mut plan, token(40)).unwrap();
        assert!(!plan.mutations.contains(&Mutation::Delete(entry.clone())));
        let place = applied(&place, &plan, 50);
        let mut plan = Plan::new();
        place.release(&mut plan, token(41)).unwrap();
        assert!(plan.mutations.contains(&Mutation::Delete(entry)));
    }

    #[test]
    fn a_token_releases_once_and_never_another_lock() {
        let place = locked(&free(), 1, Exclusive, 40);
        let mut plan = Plan::new();
        place.release(&mut plan, token(40)).unwrap();
        let place = locked(&applied(&place, &plan, 41), 2, Exclusive, 42);
        assert_eq!(place.release(&mut Plan::new(), token(40)).unwrap_err().reason, Reason::LockLost);
        assert!(place.session_of(token(42)).unwrap() == SessionId(2));
    }

    #[test]
    fn the_end_of_a_session_leaves_the_others() {
        let place = locked(&locked(&free(), 1, Shared, 40), 2, Shared, 45);
        let mut plan = Plan::new();
        place.release_session(&mut plan, SessionId(1));
        let place = applied(&place, &plan, 46);
        assert_eq!(place.sessions(), [SessionId(2)]);
        assert_eq!(place.session_of(token(45)), Some(SessionId(2)));
        let mut plan = Plan::new();
        place.release_session(&mut plan, SessionId(9));
        assert_eq!(applied(&place, &plan, 47), place, "an entry that leads nowhere is only removed");
        assert_eq!(plan.mutations.len(), 1);
    }

    #[test]
    fn force_ends_all_holders_in_a_bounded_plan() {
        let mut place = free();
        for session in 0..200 {
            place = locked(&place, session + 1, Shared, 40 + session);
        }
        let mut plan = Plan::new();
        assert_eq!(place.end(&mut plan), 200);
        assert!(plan.check().is_ok());
        assert!(!applied(&place, &plan, 300).is_held());
    }

    #[test]
    fn shared_holders_are_limited() {
        let holder = |n| LockHolder { session: n, generation: 3, revision: n, owner: String::new() };
        let lock = Lock {
            mode: Shared as i32,
            holders: (1..=LOCK_HOLDERS_MAX as u64).map(holder).collect(),
            path: "/a".into(),
        };
        let place = Place::of_inode(INODE, Some((lock, Revision(2_000))));
        let error = place.grant(&mut Plan::new(), &applicant(9, Shared), &expires).unwrap_err();
        assert_eq!(error.reason, Reason::LimitExceeded);
    }

    #[test]
    fn a_reservation_moves_to_the_inode_with_its_token() {
        let name = Place::of_name(InodeId(1), "new", None);
        let name = locked(&name, 1, Exclusive, 40);
        let mut plan = Plan::new();
        name.move_to(&mut plan, INODE);
        assert!(!applied(&name, &plan, 44).is_held());
        let inode = applied(&free(), &plan, 44);
        assert_eq!(inode.session_of(token(40)), Some(SessionId(1)));
        let entry = key::session_lock(SessionId(1), &key::lock(INODE));
        assert!(plan.mutations.iter().any(|mutation| *mutation.key() == entry));
    }

    #[test]
    fn a_place_is_found_by_its_key() {
        for place in [free(), Place::of_name(InodeId(1), "näme", None)] {
            assert_eq!(Place::of_key(&place.key, None), Some(place));
        }
        assert_eq!(Place::of_key(&key::inode(INODE), None), None);
    }
}
