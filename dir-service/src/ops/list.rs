//! `List`: one page of a directory's entries.

use super::{
    resolve::{Found, existing},
    view::{View, stored},
};
use crate::directory::Directory;
use cairn_core::{
    attributes::attributes,
    key,
    namespace::stamped_at,
    plan::Key,
    record::{Dentry, Inode, Record},
};
use cairn_proto::{
    Error, Reason, Result,
    convert::{self, Target},
    id::InodeId,
    limits::{PAGE_ENTRIES_DEFAULT, PAGE_ENTRIES_MAX},
    path::FileName,
    v1,
};

/// Lists a page. The token is the directory and the last name: a page never depends on what was listed before, so a
/// listing goes on across restarts, and shows a name that is there all the time exactly once.
///
/// # Errors
/// As the contract says.
pub async fn list(directory: &Directory, request: v1::ListRequest) -> Result<v1::ListResponse> {
    let target = convert::target(&request.path, request.inode)?;
    let limit = match request.page_size as usize {
        0 => PAGE_ENTRIES_DEFAULT,
        size if size > PAGE_ENTRIES_MAX => {
            return Err(Error::limit(format!("a page has at most {PAGE_ENTRIES_MAX} entries, not {size}")));
        }
        size => size,
    };
    let view = View::new(directory.store.clone());
    let found = existing(&view, &target).await?;
    if !found.is_directory() {
        let shown = shown(&target);
        return Err(Error::new(Reason::NotADirectory, format!("{shown}: not a directory")).at(shown));
    }
    let after = match request.page_token.as_str() {
        "" => None,
        token => Some(key::dentry(found.id, last_name(token, found.id)?.as_str())),
    };
    let page = view.scan(&key::dentries(found.id), after.as_ref(), limit).await?;
    let mut entries = Vec::with_capacity(page.entries.len());
    for (entry_key, versioned) in &page.entries {
        let (_, name) = key::split_name(entry_key)
            .ok_or_else(|| Error::internal("a directory entry has a damaged key"))?;
        let dentry = Dentry::from_bytes(&versioned.value)?;
        entries.push(v1::Entry {
            name: name.to_owned(),
            inode: dentry.inode,
            kind: dentry.kind,
            attributes: None,
        });
    }
    if request.with_attributes {
        add_attributes(&view, &mut entries).await?;
    }
    let next_page_token = match entries.last() {
        Some(last) if page.more => page_token(found.id, &last.name),
        _ => String::new(),
    };
    Ok(v1::ListResponse { entries, next_page_token, revision: view.revision().unwrap_or_default().0 })
}

/// No name has a slash in it, so that no name is a token.
fn page_token(directory: InodeId, last: &str) -> String {
    format!("{:x}/{last}", directory.0)
}

fn last_name(token: &str, directory: InodeId) -> Result<FileName> {
    let invalid = || Error::invalid("this page token was not given by a list of this directory");
    let (id, name) = token.split_once('/').ok_or_else(invalid)?;
    // As it was given: other spellings of the number were not.
    if id != format!("{:x}", directory.0) {
        return Err(invalid());
    }
    FileName::new(name).map_err(|_| invalid())
}

async fn add_attributes(view: &View, entries: &mut [v1::Entry]) -> Result<()> {
    let keys: Vec<Key> = entries.iter().map(|entry| key::inode(InodeId(entry.inode))).collect();
    let inodes = view.get_many(&keys).await?;
    for (entry, inode) in entries.iter_mut().zip(inodes) {
        let Some(versioned) = inode else { continue };
        let found = Found { id: InodeId(entry.inode), inode: stored::<Inode>(&versioned)? };
        entry.attributes = Some(shown_attributes(view, &found).await?);
    }
    Ok(())
}

/// Attributes as clients see them: a directory's mtime is when its entries last changed.
///
/// # Errors
/// As the store.
pub async fn shown_attributes(view: &View, found: &Found) -> Result<v1::Attributes> {
    let mut shown = attributes(found.id, &found.inode.record);
    if found.is_directory()
        && let Some(stamp) = view.get(&key::children(found.id)).await?
    {
        shown.mtime_ns = shown.mtime_ns.max(stamped_at(&stamp.value));
    }
    Ok(shown)
}

/// A target for messages.
pub fn shown(target: &Target) -> String {
    match target {
        Target::Path(path) => path.to_string(),
        Target::Inode(id) => format!("inode {id}"),
    }
}
