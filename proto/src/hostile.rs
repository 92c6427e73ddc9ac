//! Hostile text and hostile error details.

use crate::{
    id::FencingToken,
    path::{FileName, FilePath},
};
use fuzz::Decoder;

#[test]
fn hostile_paths_are_refused_or_normal() {
    Decoder::new("path")
        .sample("/a/b c/d")
        .sample("/")
        .sample("/Grüße/世界/🦀")
        .sample(format!("/{}", "n".repeat(255)))
        .sample("/a/../b/./c//d\0")
        .memory(100, 16 * 1024)
        .run(|bytes| {
            let text = String::from_utf8_lossy(bytes);
            if let Ok(path) = FilePath::parse(&text) {
                let shown = path.to_string();
                assert!(shown.starts_with('/') && shown.len() <= crate::limits::PATH_BYTES_MAX, "{shown}");
                assert_eq!(FilePath::parse(&shown).expect("a normal path"), path);
            }
            if let Ok(name) = FileName::new(&text) {
                assert!(!name.as_str().contains(['/', '\0']) && name.as_str().len() <= 255);
            }
        });
}

#[test]
fn hostile_tokens_and_addresses_are_refused_or_read() {
    Decoder::new("token-address")
        .sample("3.900")
        .sample("18446744073709551615.0")
        .sample("http://a:7400")
        .run(|bytes| {
            let text = String::from_utf8_lossy(bytes);
            if let Ok(token) = text.parse::<FencingToken>() {
                assert_eq!(token.to_string().parse::<FencingToken>().expect("own text"), token);
            }
            #[cfg(any(feature = "client", feature = "server"))]
            if let Ok(authority) = crate::net::authority(&text) {
                assert!(authority.contains(':'));
            }
        });
}

#[cfg(any(feature = "client", feature = "server"))]
#[test]
fn hostile_error_details_become_errors() {
    use crate::{Error, Reason, v1};
    use tonic::{Code, Status};
    let group = v1::Group { id: 7, epoch: 9, ..Default::default() };
    let mut error = Error::new(Reason::Misplaced, "too few").at("/a").on("3").retry_after_ms(5);
    error.detail.groups = vec![group; 3];
    error.detail.chunks = vec![v1::ChunkRef::default(); 3];
    let details = |error: Error| Status::from(error).details().to_vec();
    Decoder::new("error-details")
        // An empty element of a list takes two bytes and becomes a struct; the list may be moved while it grows.
        .memory(512, 64 * 1024)
        .sample(details(error))
        .sample(details(Error::internal("")))
        .run(|bytes| {
            let (code, details) = bytes.split_first().map_or((0, bytes), |(code, rest)| (*code, rest));
            let status = Status::with_details(
                Code::from(i32::from(code)),
                "text",
                bytes::Bytes::copy_from_slice(details),
            );
            let error = Error::from(status);
            // Whatever it is, it can be shown and handed on.
            assert!(!error.to_string().is_empty());
            let again = Error::from(Status::from(error.clone()));
            assert_eq!(again.reason, error.reason);
        });
}
