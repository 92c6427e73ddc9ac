//! `List`: one page of a directory's entries.

use super::{
    resolve::{Found, existing},
    view::{View, stored},
};
use crate::directory::Directory;
use cairn_core::{
    attributes::attributes,
    key,
    listing::PageFill,
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
use prost::Message as _;

/// What an entry takes in the answer besides itself: its tag and length.
const ENTRY_BYTES: usize = 8;
/// Inodes loaded at a time: with the largest extended attributes they are about as much as a page may hold.
const INODES_PART: usize = 32;

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
    let mut fill = PageFill::default();
    // In parts: what is loaded beyond the end of the page was loaded for nothing, and attributes may be large.
    'page: for part in page.entries.chunks(INODES_PART) {
        let mut part = part
            .iter()
            .map(|(key, versioned)| entry(key, &versioned.value))
            .collect::<Result<Vec<v1::Entry>>>()?;
        if request.with_attributes {
            add_attributes(&view, &mut part).await?;
        }
        for entry in part {
            if !fill.takes(ENTRY_BYTES + entry.encoded_len()) {
                break 'page;
            }
            entries.push(entry);
        }
    }
    let more = page.more || entries.len() < page.entries.len();
    let next_page_token = match entries.last() {
        Some(last) if more => page_token(found.id, &last.name),
        _ => String::new(),
    };
    Ok(v1::ListResponse { entries, next_page_token, revision: view.revision().unwrap_or_default().0 })
}

/// An entry without attributes.
fn entry(key: &Key, dentry: &[u8]) -> Result<v1::Entry> {
    let (_, name) =
        key::split_name(key).ok_or_else(|| Error::internal("a directory entry has a damaged key"))?;
    let dentry = Dentry::from_bytes(dentry)?;
    Ok(v1::Entry { name: name.to_owned(), inode: dentry.inode, kind: dentry.kind, attributes: None })
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Bench;
    use cairn_proto::limits::{PAGE_BYTES_MAX, XATTR_BYTES_MAX};

    async fn create(bench: &Bench, path: &str, xattr_bytes: usize) {
        let xattrs = match xattr_bytes {
            0 => Vec::new(),
            count => vec![v1::ExtendedAttribute { name: "user.x".into(), value: vec![7; count].into() }],
        };
        let kind = v1::Kind::File as i32;
        let request = v1::CreateRequest { path: path.into(), kind, xattrs, ..Default::default() };
        crate::ops::create::create(&bench.directory, request).await.unwrap();
    }

    /// All pages of the root directory.
    async fn pages(bench: &Bench, with_attributes: bool) -> Vec<v1::ListResponse> {
        let mut pages: Vec<v1::ListResponse> = Vec::new();
        loop {
            let page_token = pages.last().map(|page| page.next_page_token.clone()).unwrap_or_default();
            let request = v1::ListRequest {
                path: "/".into(),
                page_size: PAGE_ENTRIES_MAX as u32,
                page_token,
                with_attributes,
                ..Default::default()
            };
            pages.push(list(&bench.directory, request).await.unwrap());
            if pages.last().is_some_and(|page| page.next_page_token.is_empty()) {
                return pages;
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn pages_of_large_attributes_are_short_and_leave_nothing_out() {
        let bench = Bench::start().await;
        let names: Vec<String> = (0..100).map(|number| format!("{number:03}")).collect();
        for (number, name) in names.iter().enumerate() {
            // Large ones behind small ones, within a part and beyond it.
            let bytes = if number % 7 < 3 { 0 } else { XATTR_BYTES_MAX - 1_024 };
            create(&bench, &format!("/{name}"), bytes).await;
        }
        let pages_with = pages(&bench, true).await;
        assert!(pages_with.len() > 1);
        for (number, page) in pages_with.iter().enumerate() {
            assert!(page.encoded_len() <= PAGE_BYTES_MAX + 1_024, "page {number}: {}", page.encoded_len());
            let next =
                pages_with.get(number + 1).map_or(0, |next| next.entries[0].encoded_len() + ENTRY_BYTES);
            assert!(next == 0 || page.encoded_len() + next > PAGE_BYTES_MAX, "page {number} has room");
            assert!(page.entries.iter().all(|entry| entry.attributes.is_some()));
        }
        let listed = |pages: &[v1::ListResponse]| -> Vec<String> {
            pages.iter().flat_map(|page| &page.entries).map(|entry| entry.name.clone()).collect()
        };
        assert_eq!(listed(&pages_with), names);
        let without = pages(&bench, false).await;
        assert_eq!((without.len(), listed(&without)), (1, names), "names alone fit one page");
    }
}
