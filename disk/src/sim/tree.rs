//! The names of a simulated disk: what is seen, what is kept, and the changes in between.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::Path;

use rand::Rng;
use rand::rngs::SmallRng;

use super::CrashKeep;
use super::content::Content;

pub(super) type NodeId = u64;
pub(super) const ROOT: NodeId = 0;

#[derive(Clone, Debug)]
pub(super) enum Body {
    File(Content),
    Dir(Dir),
}

#[derive(Clone, Debug, Default)]
pub(super) struct Dir {
    pub(super) now: BTreeMap<String, NodeId>,
    kept: BTreeMap<String, NodeId>,
}

#[derive(Clone, Debug)]
struct Node {
    body: Body,
    /// A node has at most one name on each side: there are no hard links.
    now_at: Option<(NodeId, String)>,
    kept_at: Option<(NodeId, String)>,
    /// Changes in `pending` that name this node.
    mentions: u32,
    /// Open handles.
    open: u32,
}

/// A change of names that no directory sync has made durable yet. A rename is one change: a crash keeps all
/// of it or nothing.
#[derive(Clone, Debug)]
struct Change {
    node: NodeId,
    from: Option<(NodeId, String)>,
    to: Option<(NodeId, String)>,
}

#[derive(Clone, Debug)]
pub(super) struct Tree {
    nodes: BTreeMap<NodeId, Node>,
    next: NodeId,
    pending: Vec<Change>,
}

impl Tree {
    pub(super) fn new() -> Self {
        let root =
            Node { body: Body::Dir(Dir::default()), now_at: None, kept_at: None, mentions: 0, open: 1 };
        Self { nodes: BTreeMap::from([(ROOT, root)]), next: ROOT + 1, pending: Vec::new() }
    }

    /// The node of a path; the empty path is the root.
    pub(super) fn find(&self, path: &Path) -> io::Result<NodeId> {
        let mut id = ROOT;
        for part in path {
            let name = part.to_str().ok_or(io::ErrorKind::InvalidInput)?;
            id = *self.dir(id)?.now.get(name).ok_or(io::ErrorKind::NotFound)?;
        }
        Ok(id)
    }

    /// The directory that holds a path, and the path's last name.
    pub(super) fn find_parent(&self, path: &Path) -> io::Result<(NodeId, String)> {
        let name = path.file_name().and_then(|name| name.to_str()).ok_or(io::ErrorKind::InvalidInput)?;
        let dir = self.find(crate::durable::parent(path))?;
        self.dir(dir)?;
        Ok((dir, name.to_owned()))
    }

    pub(super) fn dir(&self, id: NodeId) -> io::Result<&Dir> {
        match self.nodes.get(&id).map(|node| &node.body) {
            Some(Body::Dir(dir)) => Ok(dir),
            Some(Body::File(_)) => Err(io::ErrorKind::NotADirectory.into()),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    pub(super) fn file(&mut self, id: NodeId) -> io::Result<&mut Content> {
        match self.nodes.get_mut(&id).map(|node| &mut node.body) {
            Some(Body::File(content)) => Ok(content),
            Some(Body::Dir(_)) => Err(io::ErrorKind::IsADirectory.into()),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// Length of a file, `None` for a directory.
    pub(super) fn file_len(&self, id: NodeId) -> Option<u64> {
        match &self.nodes.get(&id)?.body {
            Body::File(content) => Some(content.len()),
            Body::Dir(_) => None,
        }
    }

    /// Pages of all files that have a name or a handle.
    pub(super) fn pages_used(&self) -> u64 {
        self.nodes.keys().map(|&id| self.pages_of(id)).sum()
    }

    /// Pages of one file, if it has a name or a handle.
    pub(super) fn pages_of(&self, id: NodeId) -> u64 {
        let live = self.nodes.get(&id).filter(|node| node.now_at.is_some() || node.open > 0);
        live.map_or(0, |node| if let Body::File(content) = &node.body { content.pages() } else { 0 })
    }

    pub(super) fn create(&mut self, at: (NodeId, String), is_dir: bool) -> NodeId {
        let id = self.next;
        self.next += 1;
        let body = if is_dir { Body::Dir(Dir::default()) } else { Body::File(Content::default()) };
        self.nodes.insert(id, Node { body, now_at: None, kept_at: None, mentions: 0, open: 0 });
        self.change(Change { node: id, from: None, to: Some(at) });
        id
    }

    pub(super) fn remove(&mut self, id: NodeId) {
        let from = self.nodes.get(&id).and_then(|node| node.now_at.clone());
        self.change(Change { node: id, from, to: None });
    }

    pub(super) fn rename(&mut self, id: NodeId, to: (NodeId, String)) {
        let from = self.nodes.get(&id).and_then(|node| node.now_at.clone());
        if from.as_ref() != Some(&to) {
            self.change(Change { node: id, from, to: Some(to) });
        }
    }

    pub(super) fn opened(&mut self, id: NodeId) {
        if let Some(node) = self.nodes.get_mut(&id) {
            node.open += 1;
        }
    }

    pub(super) fn closed(&mut self, id: NodeId) {
        if let Some(node) = self.nodes.get_mut(&id) {
            node.open = node.open.saturating_sub(1);
        }
        self.collect(id);
    }

    pub(super) fn sync_dir(&mut self, dir: NodeId) {
        let touches = |change: &Change| {
            [&change.from, &change.to].into_iter().flatten().any(|(parent, _)| *parent == dir)
        };
        let (due, left) = std::mem::take(&mut self.pending).into_iter().partition(touches);
        self.pending = left;
        self.keep(due);
    }

    pub(super) fn crash(&mut self, keep: CrashKeep, rng: &mut SmallRng) {
        for node in self.nodes.values_mut() {
            node.open = 0;
            if let Body::File(content) = &mut node.body {
                content.crash(keep, rng);
            }
        }
        if keep == CrashKeep::Everything {
            self.collect_all();
            return;
        }
        let pending = std::mem::take(&mut self.pending);
        let survives = |_: &Change| keep == CrashKeep::Random && rng.random();
        let (kept, lost): (Vec<_>, Vec<_>) = pending.into_iter().partition(survives);
        self.keep(kept);
        for change in lost {
            self.unmention(change.node);
        }
        for node in self.nodes.values_mut() {
            node.now_at.clone_from(&node.kept_at);
            if let Body::Dir(dir) = &mut node.body {
                dir.now.clone_from(&dir.kept);
            }
        }
        self.collect_all();
    }

    /// A copy's handles stay with the original.
    pub(super) fn forget_handles(&mut self) {
        for node in self.nodes.values_mut() {
            node.open = 0;
        }
        self.collect_all();
    }

    fn change(&mut self, change: Change) {
        let replaced = self.place(change.node, change.from.as_ref(), change.to.as_ref(), true);
        if let Some(node) = self.nodes.get_mut(&change.node) {
            node.mentions += 1;
        }
        self.pending.push(change);
        if let Some(replaced) = replaced {
            self.collect(replaced);
        }
    }

    fn keep(&mut self, changes: Vec<Change>) {
        for change in changes {
            // Where the node is kept now: an earlier change may have been lost, and it has only one name.
            let from = self.nodes.get(&change.node).and_then(|node| node.kept_at.clone());
            let replaced = self.place(change.node, from.as_ref(), change.to.as_ref(), false);
            self.unmention(change.node);
            if let Some(replaced) = replaced {
                self.collect(replaced);
            }
        }
    }

    /// Moves a node from one name to another, in what is seen or what is kept. Returns what was replaced.
    fn place(
        &mut self,
        id: NodeId,
        from: Option<&(NodeId, String)>,
        to: Option<&(NodeId, String)>,
        now: bool,
    ) -> Option<NodeId> {
        if let Some((dir, name)) = from
            && let Some(names) = self.names(*dir, now)
        {
            names.remove(name);
        }
        let mut replaced = None;
        let mut placed = None;
        if let Some((dir, name)) = to
            && let Some(names) = self.names(*dir, now)
        {
            replaced = names.insert(name.clone(), id);
            placed = to.cloned();
        }
        for (node, at) in [(replaced, None), (Some(id), placed)] {
            if let Some(node) = node.and_then(|node| self.nodes.get_mut(&node)) {
                *(if now { &mut node.now_at } else { &mut node.kept_at }) = at;
            }
        }
        replaced
    }

    fn names(&mut self, dir: NodeId, now: bool) -> Option<&mut BTreeMap<String, NodeId>> {
        match &mut self.nodes.get_mut(&dir)?.body {
            Body::Dir(dir) => Some(if now { &mut dir.now } else { &mut dir.kept }),
            Body::File(_) => None,
        }
    }

    fn unmention(&mut self, id: NodeId) {
        if let Some(node) = self.nodes.get_mut(&id) {
            node.mentions = node.mentions.saturating_sub(1);
        }
        self.collect(id);
    }

    /// Drops a node that nothing leads to, now or after a crash.
    fn collect(&mut self, id: NodeId) {
        let Some(node) = self.nodes.get(&id) else { return };
        if id == ROOT || node.now_at.is_some() || node.kept_at.is_some() || node.mentions > 0 || node.open > 0
        {
            return;
        }
        let Some(node) = self.nodes.remove(&id) else { return };
        if let Body::Dir(dir) = node.body {
            for child in dir.kept.into_values() {
                if let Some(node) = self.nodes.get_mut(&child) {
                    node.kept_at = None;
                }
                self.collect(child);
            }
        }
    }

    /// Drops what cannot be reached from the root, as a file system check after a crash does.
    fn collect_all(&mut self) {
        let mut reached = BTreeSet::new();
        let mut next = vec![ROOT];
        while let Some(id) = next.pop() {
            if reached.insert(id)
                && let Some(Body::Dir(dir)) = self.nodes.get(&id).map(|node| &node.body)
            {
                next.extend(dir.now.values().chain(dir.kept.values()));
            }
        }
        reached.extend(self.pending.iter().map(|change| change.node));
        self.nodes.retain(|id, _| reached.contains(id));
    }
}
