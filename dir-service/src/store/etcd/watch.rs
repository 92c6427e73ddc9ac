//! Changes of the store on etcd, plan by plan.
//!
//! All events of one revision are of one plan. etcd never spreads a revision over several answers, but over the pieces of a large
//! one: a plan is told once an event of a later one, or the end of the answer, shows that it is whole. When the connection breaks, the
//! watch goes on behind the last plan that was whole.

use super::{
    Failure, Shared,
    api::{
        Event, WatchCreateRequest, WatchRequest, WatchResponse, event::EventType, watch_client::WatchClient,
        watch_request::RequestUnion,
    },
    client::{ANSWER_BYTES_MAX, CALL_TIMEOUT, malformed},
    failure,
    link::Link,
};
use crate::store::{Change, Changes};
use bytes::Bytes;
use cairn_core::plan::{Key, Mutation};
use cairn_proto::{Error, Result, id::Revision};
use futures::{StreamExt as _, stream};
use std::{
    collections::VecDeque,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};
use tokio::time::{sleep, timeout};
use tonic::{Status, Streaming};

/// Between two attempts to go on with a broken watch, growing to the second.
const PAUSE: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(1_000));

/// Changes of keys with a prefix, from a revision on.
pub(super) async fn watch(shared: Arc<Shared>, prefix: Key, from: Revision) -> Result<Changes> {
    let from = from.max(Revision(1));
    // At its start the store was written as a whole: no plan tells of that.
    if from <= shared.layout.start {
        return Err(shared.too_old(shared.layout.written));
    }
    let next = shared.layout.etcd(from)?;
    let range = shared.layout.names.prefix(&prefix);
    let mut watcher =
        Watcher { shared, range, stream: None, plans: Plans { next, ..Plans::default() }, ended: false };
    watcher.open().await?;
    Ok(stream::unfold(watcher, |mut watcher| async move {
        let change = watcher.next().await?;
        Some((change, watcher))
    })
    .boxed())
}

struct Watcher {
    shared: Arc<Shared>,
    range: (Bytes, Bytes),
    stream: Option<(Link, Streaming<WatchResponse>)>,
    plans: Plans,
    ended: bool,
}

impl Watcher {
    async fn next(&mut self) -> Option<Result<Change>> {
        loop {
            if self.ended {
                return None;
            }
            match self.step().await {
                Ok(Some(change)) => return Some(Ok(change)),
                Ok(None) => {}
                Err(error) => {
                    self.ended = true;
                    return Some(Err(error));
                }
            }
        }
    }

    async fn step(&mut self) -> Result<Option<Change>> {
        if let Some((revision, mutations)) = self.plans.whole.pop_front() {
            // Whoever reads so slowly begins again, as with every engine.
            if revision <= self.shared.compacted.load(Ordering::Acquire) {
                return Err(self.shared.too_old(revision));
            }
            return Ok(Some(Change { revision: self.shared.layout.revision(revision)?, mutations }));
        }
        let Some((link, stream)) = &mut self.stream else {
            self.open().await?;
            return Ok(None);
        };
        let failure = match stream.message().await {
            Ok(Some(answer)) => match self.take(answer)? {
                None => return Ok(None),
                Some(failure) => failure,
            },
            Ok(None) => Failure::Lost(Error::unavailable("etcd ended a watch")),
            Err(status) => self.shared.client.failed(link, &status),
        };
        self.broken(failure)?;
        Ok(None)
    }

    /// Takes an answer; a failure when etcd ends the watch.
    fn take(&mut self, answer: WatchResponse) -> Result<Option<Failure>> {
        self.shared.client.revision(answer.header.as_ref(), 0)?;
        if answer.compact_revision != 0 {
            return Err(self.shared.too_old(self.plans.next));
        }
        if answer.canceled {
            let member = self.stream.as_ref().map_or("?", |(link, _)| link.member.as_str());
            // As statuses of other calls are; etcd gives no code here.
            let status = match answer.cancel_reason.as_str() {
                told if told.contains("permission denied") => Status::permission_denied(told),
                told => Status::unavailable(told),
            };
            return Ok(Some(failure::of(&status, member)));
        }
        let names = &self.shared.layout.names;
        for event in answer.events {
            self.plans.take(event, |name| names.key(name))?;
        }
        if !answer.fragment {
            self.plans.end();
        }
        Ok(None)
    }

    /// Lets go of a connection that failed; fails where another will not do better.
    fn broken(&mut self, failure: Failure) -> Result<()> {
        self.stream = None;
        self.plans.drop_rest();
        match failure {
            Failure::Lost(_) | Failure::Elsewhere(_) | Failure::Token(_) => {
                tracing::debug!(error = %failure.into_error(), "a watch of etcd goes on elsewhere");
                Ok(())
            }
            Failure::Compacted => Err(self.shared.too_old(self.plans.next)),
            failure => Err(failure.into_error()),
        }
    }

    /// Begins behind what was told, however long it takes until a member answers.
    async fn open(&mut self) -> Result<()> {
        let mut pause = PAUSE.0;
        while let Err(failure) = self.try_open().await {
            self.broken(failure)?;
            sleep(pause).await;
            pause = (pause * 2).min(PAUSE.1);
        }
        Ok(())
    }

    async fn try_open(&mut self) -> Result<(), Failure> {
        let link = self.shared.client.link().await?;
        let create = WatchCreateRequest {
            key: self.range.0.clone(),
            range_end: self.range.1.clone(),
            start_revision: self.plans.next,
            fragment: true,
            ..Default::default()
        };
        let create = WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) };
        // The stream of requests stays open: its end would be that of the watch.
        let requests = stream::iter([create]).chain(stream::pending());
        let mut client = WatchClient::new(link.channel.clone()).max_decoding_message_size(ANSWER_BYTES_MAX);
        let begin = async {
            let mut answers = client.watch(link.stream(requests)).await?.into_inner();
            let first = answers.message().await?;
            first.map(|first| (first, answers)).ok_or_else(|| Status::unavailable("it ended a watch at once"))
        };
        let begun = timeout(CALL_TIMEOUT, begin).await;
        let begun = begun.unwrap_or_else(|_| Err(Status::deadline_exceeded("no answer in time")));
        let (first, answers) = begun.map_err(|status| self.shared.client.failed(&link, &status))?;
        self.stream = Some((link, answers));
        match self.take(first).map_err(Failure::Refused)? {
            // Once it stands: what is there now can be told.
            None => self.shared.check_kept(self.plans.next).await,
            Some(failure) => Err(failure),
        }
    }
}

/// A plan's revision in etcd, and what it changed.
type Told = (i64, Vec<Mutation>);

/// Puts events together to plans.
#[derive(Debug, Default)]
struct Plans {
    /// Plans before this revision were told, or are about to be.
    next: i64,
    whole: VecDeque<Told>,
    /// The newest one, of which more may follow.
    rest: Option<Told>,
}

impl Plans {
    fn take(&mut self, event: Event, key: impl Fn(&Bytes) -> Result<Key>) -> Result<()> {
        let r#type = event.r#type();
        let Some(kv) = event.kv else { return Err(malformed("an event without a key")) };
        let revision = kv.mod_revision;
        if self.rest.as_ref().is_some_and(|(rest, _)| *rest != revision) {
            self.end();
        }
        if revision < self.next {
            return Err(malformed("an event of the past"));
        }
        let key = key(&kv.key)?;
        let mutation = match r#type {
            EventType::Put => Mutation::Put(key, kv.value),
            EventType::Delete => Mutation::Delete(key),
        };
        self.rest.get_or_insert_with(|| (revision, Vec::new())).1.push(mutation);
        Ok(())
    }

    /// What came is whole.
    fn end(&mut self) {
        if let Some(plan) = self.rest.take() {
            self.next = plan.0.saturating_add(1);
            self.whole.push_back(plan);
        }
    }

    /// What came in part comes again.
    fn drop_rest(&mut self) {
        self.rest = None;
    }
}

#[cfg(test)]
mod tests {
    use super::{super::api::KeyValue, *};

    fn event(key: &'static str, revision: i64) -> Event {
        let kv = KeyValue { key: key.into(), mod_revision: revision, ..Default::default() };
        Event { kv: Some(kv), ..Default::default() }
    }

    fn take(plans: &mut Plans, key: &'static str, revision: i64) -> Result<()> {
        plans.take(event(key, revision), |name| Ok(name.clone()))
    }

    #[test]
    fn a_plan_is_told_once_it_is_whole() {
        let mut plans = Plans { next: 5, ..Plans::default() };
        take(&mut plans, "a", 5).unwrap();
        take(&mut plans, "b", 5).unwrap();
        assert!(plans.whole.is_empty(), "another piece may hold more of it");
        take(&mut plans, "c", 7).unwrap();
        let told = plans.whole.pop_front().unwrap();
        assert_eq!((told.0, told.1.len()), (5, 2));
        // The connection breaks: the plan of which a part came is told as a whole later.
        plans.drop_rest();
        assert_eq!(plans.next, 6);
        take(&mut plans, "c", 7).unwrap();
        take(&mut plans, "d", 7).unwrap();
        plans.end();
        let told = plans.whole.pop_front().unwrap();
        assert_eq!((told.0, told.1.len(), plans.next), (7, 2, 8));
    }

    #[test]
    fn events_that_no_etcd_sends_are_errors() {
        let mut plans = Plans { next: 5, ..Plans::default() };
        assert!(take(&mut plans, "a", 4).is_err());
        assert!(plans.take(Event::default(), |name| Ok(name.clone())).is_err());
        take(&mut plans, "a", 6).unwrap();
        assert!(take(&mut plans, "a", 5).is_err(), "out of order");
    }
}
