//! Sessions and grants: how they begin, end and what ends with them.
//!
//! ```text
//!   (none) --open--> open --end--> ended --locks, grants, answers in steps--> (none)
//! ```
//!
//! A session ends in one small plan, which marks it; from then on no request of it is accepted. What it holds ends in
//! bounded steps behind that, each valid alone: a lock or grant of an ended session only keeps others away a little
//! longer.

use crate::{
    key,
    plan::{Plan, Precondition},
    record::{Grant, Record, Session},
};
use cairn_proto::{
    Error, Result,
    id::{GrantId, Revision, SessionId},
    limits::{GRANT_COUNT_DEFAULT, GRANT_COUNT_MAX, SESSION_TTL_MS_MAX, SESSION_TTL_MS_MIN},
};

/// The TTL that a caller asked for.
///
/// # Errors
/// `LIMIT_EXCEEDED` outside of 1 s to 10 min.
pub fn ttl_ms(asked: u64, default: u64) -> Result<u64> {
    match asked {
        0 => Ok(default),
        SESSION_TTL_MS_MIN..=SESSION_TTL_MS_MAX => Ok(asked),
        _ => Err(Error::limit(format!(
            "a session lives {SESSION_TTL_MS_MIN} to {SESSION_TTL_MS_MAX} ms without renewal, not {asked}"
        ))),
    }
}

/// The number of chunk ids that a caller asked for.
///
/// # Errors
/// `LIMIT_EXCEEDED` beyond the most.
pub fn grant_count(asked: u32) -> Result<u32> {
    match asked {
        0 => Ok(GRANT_COUNT_DEFAULT),
        1..=GRANT_COUNT_MAX => Ok(asked),
        _ => Err(Error::limit(format!("a grant has at most {GRANT_COUNT_MAX} chunk ids, not {asked}"))),
    }
}

/// Opens a session in a plan.
pub fn open(plan: &mut Plan, id: SessionId, session: &Session) {
    plan.require(Precondition::Absent(key::session(id)));
    plan.put(key::session(id), session.to_bytes());
}

/// Requires that a session is as it was read.
pub fn require(plan: &mut Plan, id: SessionId, read: Revision) {
    plan.require(Precondition::Unchanged(key::session(id), Some(read)));
}

/// Marks a session as ended in a plan.
pub fn end(plan: &mut Plan, id: SessionId, session: &Session, read: Revision) {
    require(plan, id, read);
    plan.put(key::session(id), Session { ended: true, ..session.clone() }.to_bytes());
}

/// Gives a grant to its session in a plan.
pub fn give(plan: &mut Plan, id: GrantId, grant: &Grant) {
    plan.require(Precondition::Absent(key::grant(id)));
    plan.put(key::grant(id), grant.to_bytes());
    plan.put(key::session_grant(SessionId(grant.session), id), Vec::new());
}

/// Closes a grant in a plan: no commit may refer to it any more, and what is garbage in it stays garbage.
pub fn close_grant(plan: &mut Plan, id: GrantId, grant: &Grant, read: Revision) {
    plan.delete(key::session_grant(SessionId(grant.session), id));
    if !grant.closed {
        plan.require(Precondition::Unchanged(key::grant(id), Some(read)));
        plan.put(key::grant(id), Grant { closed: true, ..grant.clone() }.to_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Mutation;

    #[test]
    fn times_and_counts_are_bounded() {
        assert_eq!(ttl_ms(0, 7).unwrap(), 7);
        assert_eq!(ttl_ms(1_000, 7).unwrap(), 1_000);
        assert!(ttl_ms(999, 7).is_err() && ttl_ms(600_001, 7).is_err());
        assert_eq!(grant_count(0).unwrap(), 256);
        assert!(grant_count(65_536).is_ok() && grant_count(65_537).is_err());
    }

    #[test]
    fn a_grant_is_closed_once() {
        let grant = Grant { group: 1, session: 2, count: 8, ..Grant::default() };
        let mut plan = Plan::new();
        close_grant(&mut plan, GrantId(5), &grant, Revision(9));
        let Some(Mutation::Put(_, value)) =
            plan.mutations.iter().find(|m| *m.key() == key::grant(GrantId(5)))
        else {
            panic!("the grant is rewritten");
        };
        let closed = Grant::from_bytes(value).unwrap();
        assert!(closed.closed && closed.count == 8);
        let mut plan = Plan::new();
        close_grant(&mut plan, GrantId(5), &closed, Revision(10));
        assert_eq!(plan.mutations, [Mutation::Delete(key::session_grant(SessionId(2), GrantId(5)))]);
    }
}
