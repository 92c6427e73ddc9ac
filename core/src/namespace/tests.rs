//! Random operations, decided on snapshots and applied as the store applies plans: also several on one snapshot, so
//! that preconditions are what keeps them apart. After each plan the invariants of names hold.

use super::{
    Guard, InodeRead,
    create::{Create, create},
    remove::{Children, Remove, remove},
    rename::{Rename, Replaced, rename},
};
use crate::{
    attributes, key,
    lock::Place,
    plan::{Key, Mutation, Plan, Versioned},
    record::{Dentry, Inode, Record},
};
use cairn_proto::{
    Reason,
    id::{Generation, InodeId, ROOT_INODE, Revision},
    v1,
};
use std::collections::{BTreeMap, BTreeSet};

const GENERATION: Generation = Generation(1);

#[derive(Clone, Default)]
struct Store {
    entries: BTreeMap<Key, Versioned>,
    revision: u64,
}

impl Store {
    fn new() -> Self {
        let mut store = Self::default();
        let mut plan = Plan::new();
        plan.put(key::inode(ROOT_INODE), attributes::root(GENERATION, 1).to_bytes());
        assert!(store.apply(&plan));
        store
    }

    fn apply(&mut self, plan: &Plan) -> bool {
        plan.check().unwrap();
        let holds = plan.preconditions.iter().all(|precondition| {
            precondition.holds(self.entries.get(precondition.key()).map(|at| at.revision))
        });
        if !holds {
            return false;
        }
        self.revision += 1;
        for mutation in &plan.mutations {
            match mutation {
                Mutation::Put(key, value) => {
                    let versioned = Versioned { value: value.clone(), revision: Revision(self.revision) };
                    self.entries.insert(key.clone(), versioned);
                }
                Mutation::Delete(key) => {
                    self.entries.remove(key);
                }
            }
        }
        true
    }

    fn record<R: Record>(&self, key: &Key) -> Option<(R, Revision)> {
        let versioned = self.entries.get(key)?;
        Some((R::from_bytes(&versioned.value).unwrap(), versioned.revision))
    }

    fn names(&self, directory: InodeId) -> Vec<(String, InodeId)> {
        let prefix = key::dentries(directory);
        self.entries
            .range(prefix.clone()..)
            .take_while(|(at, _)| at.starts_with(&prefix))
            .map(|(at, versioned)| {
                let (_, name) = key::split_name(at).unwrap();
                (name.to_owned(), InodeId(Dentry::from_bytes(&versioned.value).unwrap().inode))
            })
            .collect()
    }

    fn children(&self, inode: InodeId) -> Children {
        Children {
            any: !self.names(inode).is_empty(),
            stamp: self.entries.get(&key::children(inode)).map(|at| at.revision),
        }
    }

    fn ancestors(&self, mut directory: InodeId) -> Vec<InodeId> {
        let mut chain = Vec::new();
        while directory != InodeId(0) {
            chain.push(directory);
            directory = self
                .record::<Inode>(&key::inode(directory))
                .map_or(InodeId(0), |(inode, _)| InodeId(inode.parent));
        }
        chain
    }

    /// NAME-1, NAME-2: a walk from the root reaches every inode exactly once.
    fn check(&self) {
        let mut reached = BTreeSet::from([ROOT_INODE]);
        let mut todo = vec![ROOT_INODE];
        while let Some(directory) = todo.pop() {
            for (name, id) in self.names(directory) {
                let (inode, _) =
                    self.record::<Inode>(&key::inode(id)).expect("NAME-1: an entry leads to an inode");
                assert!(reached.insert(id), "NAME-1: {name} leads to an inode that another name leads to");
                if inode.kind == v1::Kind::Directory as i32 {
                    assert_eq!(inode.parent, directory.0, "NAME-2: the parent of {name}");
                    todo.push(id);
                }
            }
        }
        let inodes = key::inodes();
        for at in
            self.entries.range(inodes.clone()..).map(|(at, _)| at).take_while(|at| at.starts_with(&inodes))
        {
            let id = InodeId(key::last_u64(at).unwrap());
            assert!(reached.contains(&id), "NAME-1: no name leads to inode {id}");
        }
    }
}

fn guard(place: &Place) -> Guard<'_> {
    Guard { place, token: None, expires_in_ms: &|_| 0 }
}

struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % sides
    }
}

/// A random operation, decided on what the store shows.
fn decide(store: &Store, dice: &mut Dice, id: u64) -> Option<Plan> {
    let mut directories = vec![ROOT_INODE];
    let mut all = Vec::new();
    let mut next = 0;
    while next < directories.len() {
        let directory = directories[next];
        next += 1;
        for (name, inode) in store.names(directory) {
            if store.record::<Inode>(&key::inode(inode)).unwrap().0.kind == v1::Kind::Directory as i32 {
                directories.push(inode);
            }
            all.push((directory, name, inode));
        }
    }
    let parent = directories[dice.roll(directories.len())];
    let name = ["a", "b", "c", "d"][dice.roll(4)];
    let existing = store.names(parent).into_iter().find(|(known, _)| known == name).map(|(_, inode)| inode);
    let existing_record = existing.map(|inode| store.record::<Inode>(&key::inode(inode)).unwrap());
    let reservation = Place::of_name(parent, name, None);
    match dice.roll(3) {
        0 => {
            let (record, revision) = store.record::<Inode>(&key::inode(parent)).unwrap();
            create(&Create {
                path: name,
                parent: InodeRead { id: parent, inode: &record, revision },
                name,
                existing: existing_record.as_ref().map(|(record, _)| record),
                reservation: guard(&reservation),
                kind: if dice.roll(2) == 0 { v1::Kind::Directory } else { v1::Kind::File },
                id: InodeId(id),
                mode: 0,
                replication: 0,
                xattrs: &[],
                mtime_ns: 0,
                generation: GENERATION,
                now_ns: id,
            })
            .ok()
            .map(|(plan, _)| plan)
        }
        1 => {
            let (inode, (record, revision)) = (existing?, existing_record?);
            let lock = Place::of_inode(inode, None);
            remove(&Remove {
                path: name,
                parent,
                name,
                dentry_revision: store.entries[&key::dentry(parent, name)].revision,
                target: InodeRead { id: inode, inode: &record, revision },
                lock: guard(&lock),
                children: store.children(inode),
                trash_id: id,
                now_ns: id,
            })
            .ok()
        }
        _ => {
            if all.is_empty() {
                return None;
            }
            let (from_parent, from_name, source) = all[dice.roll(all.len())].clone();
            let (source_record, source_revision) = store.record::<Inode>(&key::inode(source)).unwrap();
            let source_lock = Place::of_inode(source, None);
            let replaced_lock = Place::of_inode(existing.unwrap_or_default(), None);
            let replaced =
                existing.zip(existing_record.as_ref()).map(|(inode, (record, revision))| Replaced {
                    dentry_revision: store.entries[&key::dentry(parent, name)].revision,
                    inode: InodeRead { id: inode, inode: record, revision: *revision },
                    lock: guard(&replaced_lock),
                    children: store.children(inode),
                });
            rename(&Rename {
                from_path: &from_name,
                to_path: name,
                from_parent,
                from_name: &from_name,
                from_revision: store.entries[&key::dentry(from_parent, &from_name)].revision,
                source: InodeRead { id: source, inode: &source_record, revision: source_revision },
                source_lock: guard(&source_lock),
                to_parent: parent,
                to_name: name,
                replaced,
                reservation: guard(&reservation),
                ancestors: &store.ancestors(parent),
                tree_epoch: store.entries.get(&key::tree_epoch()).map(|at| at.revision),
                trash_id: id,
                now_ns: id,
            })
            .ok()
            .map(|(plan, _)| plan)
        }
    }
}

#[test]
fn names_stay_a_tree_when_several_operations_are_decided_on_one_snapshot() {
    let mut applied = 0;
    let mut conflicts = 0;
    for seed in 0..60 {
        let mut dice = Dice(seed);
        let mut store = Store::new();
        let mut id = 100;
        for _ in 0..80 {
            let snapshot = store.clone();
            for _ in 0..=dice.roll(3) {
                id += 1;
                let Some(plan) = decide(&snapshot, &mut dice, id) else { continue };
                if store.apply(&plan) {
                    applied += 1;
                } else {
                    conflicts += 1;
                }
                store.check();
            }
        }
    }
    assert!(
        applied > 2_000 && conflicts > 50,
        "the run was too quiet: {applied} applied, {conflicts} conflicts"
    );
}

fn make(store: &mut Store, parent: InodeId, name: &str, id: u64, kind: v1::Kind) -> InodeId {
    let (record, revision) = store.record::<Inode>(&key::inode(parent)).unwrap();
    let place = Place::of_name(parent, name, None);
    let (plan, _) = create(&Create {
        path: name,
        parent: InodeRead { id: parent, inode: &record, revision },
        name,
        existing: None,
        reservation: guard(&place),
        kind,
        id: InodeId(id),
        mode: 0,
        replication: 0,
        xattrs: &[],
        mtime_ns: 0,
        generation: GENERATION,
        now_ns: 1,
    })
    .unwrap();
    assert!(store.apply(&plan));
    InodeId(id)
}

fn plan_removal(store: &Store, parent: InodeId, name: &str, inode: InodeId) -> cairn_proto::Result<Plan> {
    let (record, revision) = store.record::<Inode>(&key::inode(inode)).unwrap();
    let lock = Place::of_inode(inode, None);
    remove(&Remove {
        path: name,
        parent,
        name,
        dentry_revision: store.entries[&key::dentry(parent, name)].revision,
        target: InodeRead { id: inode, inode: &record, revision },
        lock: guard(&lock),
        children: store.children(inode),
        trash_id: 9,
        now_ns: 1,
    })
}

#[test]
fn a_directory_that_gains_an_entry_is_not_removed() {
    let mut store = Store::new();
    let directory = make(&mut store, ROOT_INODE, "d", 100, v1::Kind::Directory);
    let removal = plan_removal(&store, ROOT_INODE, "d", directory).unwrap();
    make(&mut store, directory, "f", 101, v1::Kind::File);
    assert!(!store.apply(&removal), "the stamp of the new entry stands in the way");
    let error = plan_removal(&store, ROOT_INODE, "d", directory).unwrap_err();
    assert_eq!(error.reason, Reason::NotEmpty);
}

#[test]
fn creates_in_one_directory_do_not_conflict() {
    let mut store = Store::new();
    let snapshot = store.clone();
    let (record, revision) = snapshot.record::<Inode>(&key::inode(ROOT_INODE)).unwrap();
    for (id, name) in [(100, "a"), (101, "b")] {
        let place = Place::of_name(ROOT_INODE, name, None);
        let (plan, _) = create(&Create {
            path: name,
            parent: InodeRead { id: ROOT_INODE, inode: &record, revision },
            name,
            existing: None,
            reservation: guard(&place),
            kind: v1::Kind::File,
            id: InodeId(id),
            mode: 0,
            replication: 0,
            xattrs: &[],
            mtime_ns: 0,
            generation: GENERATION,
            now_ns: 1,
        })
        .unwrap();
        assert!(store.apply(&plan));
    }
}
