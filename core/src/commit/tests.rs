use super::*;
use crate::{
    plan::Mutation,
    record::{Lock, LockHolder, Trash},
};
use cairn_proto::limits::CHUNK_BYTES_MAX;

const FILE: InodeId = InodeId(50);

fn expires(_: cairn_proto::id::SessionId) -> u64 {
    700
}

/// What a commit rests on, in values of its own.
struct Case {
    inode: Option<Inode>,
    place: Place,
    token: Option<FencingToken>,
    unlock: bool,
    base_version: u64,
    condition: Option<v1::Condition>,
    edits: Vec<Edit>,
    receipts: Vec<Receipt>,
    grants: BTreeMap<GrantId, (Grant, Revision)>,
    groups: BTreeMap<GroupId, (Group, Revision)>,
    committed: BTreeSet<ChunkId>,
}

impl Case {
    fn new() -> Self {
        let group = Group {
            replicas: 3,
            min_copies: 2,
            seats: vec![1, 2, 3],
            primary: 1,
            epoch: 4,
            ..Group::default()
        };
        Self {
            inode: Some(attributes::new_inode(v1::Kind::File, FILE, Generation(1), 0, 1_000)),
            place: Place::of_inode(FILE, None),
            token: None,
            unlock: false,
            base_version: 0,
            condition: None,
            edits: Vec::new(),
            receipts: Vec::new(),
            grants: BTreeMap::new(),
            groups: BTreeMap::from([(GroupId(7), (group, Revision(30)))]),
            committed: BTreeSet::new(),
        }
    }

    fn append(mut self, grant: u64, indexes: std::ops::Range<u32>, length: u64) -> Self {
        let record = Grant { group: 7, session: 1, count: 256, ..Grant::default() };
        self.grants.insert(GrantId(grant), (record, Revision(31)));
        for index in indexes {
            self.edits.push(Edit::Append { chunk: self.receipts.len() });
            let chunk = NewChunk { id: ChunkId::new(grant, index), group: GroupId(7), length, checksum: 77 };
            self.receipts.push(Receipt { chunk, holders: [ServerId(1), ServerId(3)].into() });
        }
        self
    }

    fn decide(&self) -> Result<Committed> {
        let target = match &self.inode {
            Some(inode) => Target::File {
                id: FILE,
                inode,
                revision: Revision(20),
                entry: Some((InodeId(1), "f", Revision(19))),
            },
            None => Target::New { id: FILE, parent: InodeId(1), name: "f", mode: 0, xattrs: &[] },
        };
        let request = Commit {
            path: "/f",
            target,
            tree_epoch: Some(None),
            place: &self.place,
            token: self.token,
            expires_in_ms: &expires,
            unlock: self.unlock,
            base_version: self.base_version,
            condition: self.condition.as_ref(),
            edits: &self.edits,
            receipts: &self.receipts,
            grants: &self.grants,
            groups: &self.groups,
            committed: &self.committed,
            pages: &Pages::new(),
            trash_id: 900,
            mtime_ns: 0,
            now_ns: 500,
            generation: Generation(1),
        };
        match commit(&request) {
            Ok(committed) => Ok(committed),
            Err(Stop::Failed(error)) => Err(error),
            Err(Stop::NeedPages(_)) => panic!("no pages are there"),
        }
    }

    fn reason(&self) -> Reason {
        self.decide().unwrap_err().reason
    }
}

fn held(place: Place) -> (Place, FencingToken) {
    let holder = LockHolder { session: 1, generation: 1, revision: 0, owner: "ann".into() };
    let lock = Lock { mode: v1::LockMode::Exclusive as i32, holders: vec![holder], path: "/f".into() };
    let place = Place::of_key(place.key(), Some((lock, Revision(40)))).unwrap();
    (place, FencingToken { generation: Generation(1), revision: Revision(40) })
}

fn record<R: Record>(plan: &Plan, key: &crate::plan::Key) -> Option<R> {
    plan.mutations.iter().find_map(|mutation| match mutation {
        Mutation::Put(at, value) if at == key => Some(R::from_bytes(value).unwrap()),
        _ => None,
    })
}

#[test]
fn a_commit_makes_the_next_version() {
    let case = Case::new().append(5, 0..1, 100);
    let committed = case.decide().unwrap();
    let inode: Inode = record(&committed.plan, &key::inode(FILE)).unwrap();
    assert_eq!(inode, committed.inode);
    assert_eq!((inode.version, inode.layout_version, inode.size), (2, 2, 100));
    assert_eq!(inode.checksum, Some(77), "a file of one whole chunk");
    assert_eq!(inode.ctime_ns, 1_001, "grows although the clock went back");
    assert_ne!(inode.etag, case.inode.as_ref().unwrap().etag);
    for precondition in [
        Precondition::Unchanged(key::inode(FILE), Some(Revision(20))),
        Precondition::Unchanged(key::dentry(InodeId(1), "f"), Some(Revision(19))),
        Precondition::Unchanged(key::tree_epoch(), None),
        Precondition::Unchanged(key::lock(FILE), None),
        Precondition::Unchanged(key::grant(GrantId(5)), Some(Revision(31))),
        Precondition::Unchanged(key::group(GroupId(7)), Some(Revision(30))),
        Precondition::Absent(key::chunk_run(ChunkId::new(5, 0))),
    ] {
        assert!(committed.plan.preconditions.contains(&precondition), "{precondition:?}");
    }
    assert_eq!(record::<Trash>(&committed.plan, &key::trash(900)), None);
}

#[test]
fn a_new_file_is_made_with_its_entry() {
    let mut case = Case::new().append(5, 0..2, 100);
    case.inode = None;
    case.place = Place::of_name(InodeId(1), "f", None);
    let committed = case.decide().unwrap();
    assert_eq!((committed.inode.version, committed.inode.size, committed.inode.checksum), (1, 200, None));
    assert!(committed.plan.preconditions.contains(&Precondition::Absent(key::dentry(InodeId(1), "f"))));
    assert!(committed.plan.preconditions.contains(&Precondition::Exists(key::inode(InodeId(1)))));
    let entry: crate::record::Dentry = record(&committed.plan, &key::dentry(InodeId(1), "f")).unwrap();
    assert_eq!(entry.inode, FILE.0);
    case.base_version = 1;
    assert_eq!(case.reason(), Reason::ConditionFailed);
}

#[test]
fn fenced_only_the_token_of_the_held_lock_commits() {
    let mut case = Case::new().append(5, 0..1, 100);
    let (place, token) = held(case.place.clone());
    case.place = place;
    let error = case.decide().unwrap_err();
    assert_eq!((error.reason, error.detail.lock.unwrap().expires_in_ms), (Reason::LockHeld, 700));
    case.token = Some(token);
    let committed = case.decide().unwrap();
    assert!(
        committed.plan.preconditions.contains(&Precondition::Unchanged(key::lock(FILE), Some(Revision(40))))
    );
    assert_eq!(record::<Lock>(&committed.plan, &key::lock(FILE)), None, "the lock stays as it is");
    case.token = Some(FencingToken { revision: Revision(39), ..token });
    assert_eq!(case.reason(), Reason::LockLost);
    case.place = Place::of_inode(FILE, None);
    case.token = Some(token);
    assert_eq!(case.reason(), Reason::LockLost, "a lock that ended");
}

#[test]
fn unlock_ends_the_lock_in_the_same_plan() {
    let mut case = Case::new();
    let (place, token) = held(case.place.clone());
    (case.place, case.token, case.unlock) = (place, Some(token), true);
    let plan = case.decide().unwrap().plan;
    assert!(plan.mutations.contains(&Mutation::Delete(key::lock(FILE))));
    // Without a token there is no lock to end.
    let mut case = Case::new();
    case.unlock = true;
    assert!(case.decide().is_ok());
}

#[test]
fn a_reservation_becomes_the_lock_of_the_new_file_or_ends() {
    let mut case = Case::new();
    case.inode = None;
    let (place, token) = held(Place::of_name(InodeId(1), "f", None));
    (case.place, case.token) = (place, Some(token));
    let plan = case.decide().unwrap().plan;
    let lock: Lock = record(&plan, &key::lock(FILE)).unwrap();
    assert_eq!(lock.holders[0].token(Revision(99)), token);
    assert!(plan.mutations.contains(&Mutation::Delete(key::reservation(InodeId(1), "f"))));
    case.unlock = true;
    let plan = case.decide().unwrap().plan;
    assert_eq!(record::<Lock>(&plan, &key::lock(FILE)), None);
    assert!(plan.mutations.contains(&Mutation::Delete(key::reservation(InodeId(1), "f"))));
    case.token = None;
    assert_eq!(case.reason(), Reason::LockHeld);
}

#[test]
fn conditions_and_base_versions_are_required() {
    use v1::condition::Require;
    let mut case = Case::new();
    for (require, reason) in [
        (Require::Absent(true), Some(Reason::AlreadyExists)),
        (Require::Exists(true), None),
        (Require::Version(1), None),
        (Require::Version(2), Some(Reason::ConditionFailed)),
        (Require::Etag("x".into()), Some(Reason::ConditionFailed)),
    ] {
        case.condition = Some(v1::Condition { require: Some(require) });
        assert_eq!(case.decide().err().map(|error| error.reason), reason);
    }
    case.condition = None;
    case.base_version = 2;
    let error = case.decide().unwrap_err();
    assert_eq!((error.reason, error.detail.current_version), (Reason::ConditionFailed, 1));
    case.base_version = 1;
    assert!(case.decide().is_ok());
    case.inode.as_mut().unwrap().kind = v1::Kind::Directory as i32;
    assert_eq!(case.reason(), Reason::IsADirectory);
}

#[test]
fn grants_must_be_open_and_fit() {
    let mut case = Case::new().append(5, 0..1, 100);
    case.grants.get_mut(&GrantId(5)).unwrap().0.closed = true;
    assert_eq!(case.reason(), Reason::GrantClosed);
    case.grants.clear();
    assert_eq!(case.reason(), Reason::GrantClosed);
    let case = Case::new().append(5, 256..257, 100);
    assert_eq!(case.reason(), Reason::InvalidArgument, "an index that the grant does not have");
    let mut case = Case::new().append(5, 0..1, 100);
    case.grants.get_mut(&GrantId(5)).unwrap().0.group = 8;
    assert_eq!(case.reason(), Reason::InvalidArgument);
    let mut case = Case::new().append(5, 0..1, 100);
    case.committed.insert(ChunkId::new(5, 0));
    assert_eq!(case.reason(), Reason::InvalidArgument, "a chunk is committed once");
    let mut case = Case::new().append(5, 0..2, 100);
    case.edits.pop();
    assert_eq!(case.reason(), Reason::InvalidArgument, "a receipt that no edit uses");
}

#[test]
fn too_few_current_holders_are_misplaced_and_listed() {
    let mut case = Case::new().append(5, 0..2, 100);
    // One member left its seat: chunk 0 is held by two current members still, chunk 1 by one.
    case.groups.get_mut(&GroupId(7)).unwrap().0.seats = vec![1, 2, 4];
    case.receipts[0].holders = [ServerId(1), ServerId(2), ServerId(3)].into();
    let error = case.decide().unwrap_err();
    assert_eq!(error.reason, Reason::Misplaced);
    let chunks: Vec<ChunkId> = error.detail.chunks.iter().map(|c| c.chunk.unwrap().into()).collect();
    assert_eq!(chunks, [ChunkId::new(5, 1)]);
    case.receipts[1].holders.insert(ServerId(4));
    assert!(case.decide().is_ok());
    // An empty seat is nobody.
    let parsed = receipts(&[v1::Receipt {
        chunk: Some(v1::ChunkId { grant_id: 5, index: 0 }),
        group_id: 7,
        length: 1,
        holder_ids: vec![1, 0, 0],
        ..Default::default()
    }]);
    assert_eq!(parsed.unwrap()[0].holders, [ServerId(1)].into());
}

#[test]
fn runs_end_at_multiples_and_gaps_and_leave_hidden_chunks_out() {
    let mut case = Case::new().append(5, 60..70, 100).append(6, 3..4, 100);
    // Chunk 5.66 is overwritten by 6.3 within the same commit.
    case.edits.pop();
    case.edits.push(Edit::Write { offset: 600, length: 100, chunk: 10, chunk_offset: 0 });
    let committed = case.decide().unwrap();
    let run = |grant, index| record::<ChunkRun>(&committed.plan, &key::chunk_run(ChunkId::new(grant, index)));
    assert_eq!(run(5, 60).unwrap().chunks.len(), 4);
    assert_eq!(run(5, 64).unwrap().chunks.len(), 2);
    assert_eq!(run(5, 67).unwrap().chunks.len(), 3);
    assert_eq!(run(6, 3).unwrap().chunks[0].live_bytes, 100);
    assert_eq!(committed.live.len(), 10);
    assert!(!committed.live.contains(&6));
    assert_eq!(run(5, 60).unwrap().inode, FILE.0);
}

#[test]
fn overwritten_bytes_are_trash() {
    let committed = Case::new().append(5, 0..2, 100).decide().unwrap();
    let mut case = Case::new().append(6, 0..1, 100);
    case.inode = Some(committed.inode);
    case.edits = vec![Edit::Write { offset: 50, length: 100, chunk: 0, chunk_offset: 0 }];
    let committed = case.decide().unwrap();
    let trash: Trash = record(&committed.plan, &key::trash(900)).unwrap();
    assert_eq!(trash.inode, FILE.0);
    assert_eq!(trash.extents.iter().map(|extent| extent.length).sum::<u64>(), 100);
    assert_eq!(committed.inode.version, 3);
}

#[test]
fn the_largest_commit_fits_a_plan_and_scattered_ones_say_so() {
    let mut case = Case::new();
    for grant in 0..16 {
        case = case.append(1_000 + grant, 0..256, CHUNK_BYTES_MAX);
    }
    assert_eq!(case.receipts.len(), COMMIT_RECEIPTS_MAX);
    let committed = case.decide().unwrap();
    assert!(committed.plan.check().is_ok());
    assert_eq!(committed.inode.size, 4_096 * CHUNK_BYTES_MAX);
    let mut case = Case::new();
    for grant in 0..128 {
        case = case.append(1_000 + grant, 0..1, 10);
    }
    assert_eq!(case.reason(), Reason::LimitExceeded);
}

#[test]
fn requests_are_checked_at_the_door() {
    let receipt = v1::Receipt {
        chunk: Some(v1::ChunkId { grant_id: 5, index: 0 }),
        group_id: 7,
        length: 10,
        ..Default::default()
    };
    assert!(receipts(std::slice::from_ref(&receipt)).is_ok());
    assert!(receipts(&[receipt.clone(), receipt.clone()]).is_err(), "twice the same chunk");
    assert!(receipts(&[v1::Receipt { length: 0, ..receipt.clone() }]).is_err());
    assert!(receipts(&[v1::Receipt { chunk: None, ..receipt.clone() }]).is_err());
    assert_eq!(receipts(&vec![receipt; 4_097]).unwrap_err().reason, Reason::LimitExceeded);
    assert!(edits(&[v1::Edit { edit: None }]).is_err());
    assert_eq!(edits(&vec![v1::Edit { edit: None }; 8_193]).unwrap_err().reason, Reason::LimitExceeded);
}
