//! Arguments that mean nothing are refused, and never read as something else.

use super::{append, commit, create};
use crate::{ops, testing::Bench};
use cairn_proto::{Reason, v1};

#[tokio::test(start_paused = true)]
async fn a_page_token_goes_on_with_its_own_listing_only() {
    let bench = Bench::start().await;
    for name in ["a", "b", "c"] {
        create(&bench, &format!("/{name}")).await;
    }
    let kind = v1::Kind::Directory as i32;
    let other = v1::CreateRequest { path: "/other".into(), kind, ..Default::default() };
    ops::create::create(&bench.directory, other).await.unwrap();
    let list = |path: &str, page_token: String| {
        let request = v1::ListRequest { path: path.into(), page_size: 2, page_token, ..Default::default() };
        ops::list::list(&bench.directory, request)
    };
    let first = list("/", String::new()).await.unwrap();
    let rest = list("/", first.next_page_token.clone()).await.unwrap();
    let names: Vec<_> = first.entries.iter().chain(&rest.entries).map(|entry| entry.name.as_str()).collect();
    assert_eq!((names.as_slice(), rest.next_page_token.as_str()), (["a", "b", "c", "other"].as_slice(), ""));
    for (path, token) in [
        ("/other", first.next_page_token.as_str()),
        ("/", "b"),
        ("/", "1/"),
        ("/", "01/b"),
        ("/", "1/b/c"),
        ("/", "zz"),
    ] {
        let refused = list(path, token.to_owned()).await.unwrap_err();
        assert_eq!(refused.reason, Reason::InvalidArgument, "{token} in {path}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_mode_with_bits_that_are_no_permissions_is_refused() {
    let bench = Bench::start().await;
    let session = bench.session().await;
    let grant = bench.grant(session).await;
    // As `stat` gives it: a plain file.
    let mode = 0o100_644;
    let kind = v1::Kind::File as i32;
    let made = v1::CreateRequest { path: "/f".into(), kind, mode, ..Default::default() };
    let refused = ops::create::create(&bench.directory, made).await.unwrap_err();
    assert_eq!(refused.reason, Reason::InvalidArgument);
    assert!(refused.to_string().contains("0o100000"), "{refused}");
    let written = v1::CommitRequest { mode, ..append("/f", &grant, 0..1, 10) };
    assert_eq!(commit(&bench, written).await.unwrap_err().reason, Reason::InvalidArgument);
    create(&bench, "/f").await;
    let set = |mode| v1::SetAttributesRequest { path: "/f".into(), mode: Some(mode), ..Default::default() };
    let refused = ops::set_attributes::set_attributes(&bench.directory, set(mode)).await.unwrap_err();
    assert_eq!(refused.reason, Reason::InvalidArgument);
    let kept = ops::set_attributes::set_attributes(&bench.directory, set(0o7777)).await.unwrap();
    assert_eq!(kept.attributes.unwrap().mode, 0o7777);
}

#[tokio::test(start_paused = true)]
async fn a_bad_copy_on_a_server_that_nobody_knows_is_not_noted() {
    let bench = Bench::start().await;
    let chunk = cairn_proto::id::ChunkId::new(5, 0);
    let cluster = &bench.directory.cluster;
    let unknown = cairn_proto::id::ServerId(999_999);
    assert_eq!(cluster.reported_bad(unknown, chunk).unwrap_err().reason, Reason::NotFound);
    let known = *cluster.state.lock().servers.keys().next().unwrap();
    cluster.reported_bad(known, chunk).unwrap();
    assert_eq!(cluster.state.lock().copies.take_suspects().len(), 1);
}
