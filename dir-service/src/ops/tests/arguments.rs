//! Arguments that mean nothing are refused, and never read as something else.

use super::{append, commit, create};
use crate::{ops, testing::Bench};
use cairn_proto::{
    Reason,
    limits::{PAGE_BYTES_MAX, QUESTIONS_MAX},
    v1,
};
use prost::Message as _;

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

#[tokio::test(start_paused = true)]
async fn lookups_that_are_asked_together_are_answered_as_if_each_came_alone() {
    let bench = Bench::start().await;
    let session = bench.session().await;
    let grant = bench.grant(session).await;
    commit(&bench, append("/f", &grant, 0..2, 100)).await.unwrap();
    create(&bench, "/empty").await;
    let asked =
        |path: &str| v1::LookupRequest { path: path.into(), with_extents: true, ..Default::default() };
    let lookups: Vec<_> = ["/f", "/missing", "/empty", "/f/below", "no path", "/"].map(asked).into();
    let request = v1::LookupManyRequest { lookups: lookups.clone() };
    let many = ops::lookup::lookup_many(&bench.directory, request).await.unwrap();
    assert_eq!(many.answers.len(), lookups.len());
    assert_eq!((many.groups.len(), many.servers.len()), (1, 3));
    for (request, answer) in lookups.into_iter().zip(many.answers) {
        match (ops::lookup::lookup(&bench.directory, request.clone()).await, answer.outcome.unwrap()) {
            (Ok(mut alone), v1::lookup_answer::Outcome::Found(found)) => {
                alone.groups.clear();
                alone.servers.clear();
                assert_eq!(alone, found, "{request:?}");
            }
            (Err(alone), v1::lookup_answer::Outcome::Error(error)) => assert_eq!(alone.to_wire(), error),
            (alone, together) => panic!("{alone:?} alone, {together:?} together"),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn too_many_lookups_are_refused_and_large_answers_end_early() {
    let bench = Bench::start().await;
    create(&bench, "/f").await;
    let xattrs = vec![v1::ExtendedAttribute { name: "user.large".into(), value: vec![7; 60 << 10].into() }];
    let set = v1::SetAttributesRequest { path: "/f".into(), xattrs, ..Default::default() };
    ops::set_attributes::set_attributes(&bench.directory, set).await.unwrap();
    let ask = |count: usize| {
        let lookups = vec![v1::LookupRequest { path: "/f".into(), ..Default::default() }; count];
        ops::lookup::lookup_many(&bench.directory, v1::LookupManyRequest { lookups })
    };
    assert_eq!(ask(0).await.unwrap_err().reason, Reason::InvalidArgument);
    assert_eq!(ask(QUESTIONS_MAX + 1).await.unwrap_err().reason, Reason::LimitExceeded);
    let answers = ask(QUESTIONS_MAX).await.unwrap();
    assert!((30..40).contains(&answers.answers.len()), "{} answers", answers.answers.len());
    assert!(answers.encoded_len() <= PAGE_BYTES_MAX, "{} bytes", answers.encoded_len());
}
