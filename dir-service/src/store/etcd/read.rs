//! Reads of the store on etcd, each at one revision.

use super::{
    Client, Failure, Shared,
    api::{RangeRequest, RangeResponse, ResponseHeader, TxnRequest, response_op},
    client::{CALL_TIMEOUT, malformed},
    layout::{self, TXN_OPS_MAX, one},
};
use crate::store::{KeyRange, Page, SCAN_BYTES_MAX, reader::compacted};
use cairn_core::plan::{Key, Versioned};
use cairn_proto::{Error, Result, id::Revision};
use futures::future::{BoxFuture, try_join_all};
use std::sync::atomic::Ordering;

/// Entries asked for first where nobody knows how large they are.
const FIRST_ENTRIES: usize = 1_000;
/// Where an answer was too large, an eighth of it is asked for next.
const LESS: usize = 8;

type Values = Vec<Option<Versioned>>;

impl Shared {
    pub(super) async fn get(&self, keys: &[Key], at: Option<Revision>) -> Result<(Revision, Values)> {
        let asked = match at {
            Some(at) => self.layout.etcd(at)?,
            None => 0,
        };
        // The first keys fix the revision of the others.
        let (first, rest) = keys.split_at(keys.len().min(TXN_OPS_MAX));
        let (revision, mut values) = self.get_some(first, asked).await.map_err(|it| self.error(it, at))?;
        let fixed = if asked == 0 { revision } else { asked };
        let rest = rest.chunks(TXN_OPS_MAX).map(|keys| self.get_some(keys, fixed));
        for (_, more) in try_join_all(rest).await.map_err(|it| self.error(it, at))? {
            values.extend(more);
        }
        Ok((at.map_or_else(|| self.layout.revision(revision), Ok)?, values))
    }

    /// At most as many keys as a transaction takes, and etcd's current revision.
    fn get_some<'a>(&'a self, keys: &'a [Key], at: i64) -> BoxFuture<'a, Result<(i64, Values), Failure>> {
        Box::pin(async move {
            match self.get_at_once(keys, at).await {
                Err(Failure::TooLarge(_)) if keys.len() > 1 => {}
                done => return done,
            }
            let (first, rest) = keys.split_at(keys.len() / 2);
            let (revision, mut values) = self.get_some(first, at).await?;
            let fixed = if at == 0 { revision } else { at };
            values.extend(self.get_some(rest, fixed).await?.1);
            Ok((revision, values))
        })
    }

    async fn get_at_once(&self, keys: &[Key], at: i64) -> Result<(i64, Values), Failure> {
        let before = self.client.seen();
        let ask = |key: &Key| RangeRequest { revision: at, ..one(self.layout.names.record(key)) };
        let asked: Vec<RangeRequest> = match keys {
            // Nothing but the revision.
            [] => {
                let key = self.layout.names.store.clone();
                vec![RangeRequest { key, revision: at, count_only: true, ..Default::default() }]
            }
            keys => keys.iter().map(ask).collect(),
        };
        let (header, answers) = self.ranges(asked).await?;
        let revision = self.client.revision(header.as_ref(), before).map_err(Failure::Refused)?;
        let value = |answer: RangeResponse| {
            answer.kvs.into_iter().next().map(|kv| self.layout.versioned(kv)).transpose()
        };
        let answers = answers.into_iter().take(keys.len());
        let values = answers.map(value).collect::<Result<_>>().map_err(Failure::Refused)?;
        Ok((revision, values))
    }

    pub(super) async fn scan(
        &self,
        range: KeyRange,
        limit: usize,
        at: Option<Revision>,
    ) -> Result<(Revision, Page)> {
        let limit = limit.max(1);
        let Some((mut start, end)) = self.layout.names.range(&range) else {
            let (revision, _) = self.get(&[], at).await?;
            return Ok((revision, Page::default()));
        };
        let (mut page, mut bytes) = (Page::default(), 0);
        let mut fixed = at.map(|at| self.layout.etcd(at)).transpose()?.unwrap_or_default();
        let mut revision = at;
        let mut entries = FIRST_ENTRIES;
        loop {
            let ask = entries.min(limit - page.entries.len());
            let request = RangeRequest {
                key: start.clone(),
                range_end: end.clone(),
                limit: ask as i64,
                revision: fixed,
                ..Default::default()
            };
            let before = self.client.seen();
            let (header, answer) = match self.ranges(vec![request]).await {
                Err(Failure::TooLarge(_)) if ask > 1 => {
                    entries = ask.div_ceil(LESS);
                    continue;
                }
                answer => answer.map_err(|it| self.error(it, at))?,
            };
            let Some(answer) = answer.into_iter().next() else { return Err(malformed("no page of a scan")) };
            let now = self.client.revision(header.as_ref(), before)?;
            if fixed == 0 {
                fixed = now;
            }
            let read_at = match revision {
                Some(revision) => revision,
                None => *revision.insert(self.layout.revision(now)?),
            };
            for kv in answer.kvs {
                let size = kv.key.len() - self.layout.names.data.len().min(kv.key.len()) + kv.value.len();
                if bytes + size > SCAN_BYTES_MAX && !page.entries.is_empty() {
                    page.more = true;
                    return Ok((read_at, page));
                }
                bytes += size;
                let key = self.layout.names.key(&kv.key)?;
                page.entries.push((key, self.layout.versioned(kv)?));
            }
            page.more = answer.more;
            match page.entries.last() {
                Some((last, _)) if answer.more && page.entries.len() < limit => {
                    start = self.layout.names.record(&[&last[..], &[0]].concat());
                }
                _ => return Ok((read_at, page)),
            }
        }
    }

    /// Whether a watch from a revision of etcd on would miss nothing: that before it can be read.
    pub(super) async fn check_kept(&self, from: i64) -> Result<(), Failure> {
        if from <= self.compacted.load(Ordering::Acquire) {
            return Err(Failure::Compacted);
        }
        match self.get_at_once(&[], (from - 1).max(1)).await {
            Ok(_) | Err(Failure::Future) => Ok(()),
            Err(failure) => Err(failure),
        }
    }

    /// That a revision of etcd is no longer kept.
    pub(super) fn too_old(&self, revision: i64) -> Error {
        let store = |etcd| self.layout.revision(etcd).unwrap_or_default();
        let oldest = self.compacted.load(Ordering::Acquire).saturating_add(1).max(revision.saturating_add(1));
        compacted(store(revision), store(oldest))
    }

    /// Several ranges, all at one revision, as long as the store has this life: a directory that was forgotten on a store that
    /// was moved away reads nothing old.
    async fn ranges(
        &self,
        requests: Vec<RangeRequest>,
    ) -> Result<(Option<ResponseHeader>, Vec<RangeResponse>), Failure> {
        let asked = requests.len();
        let txn = TxnRequest {
            compare: vec![self.layout.lives()],
            success: requests.into_iter().map(layout::range).collect(),
            failure: Vec::new(),
        };
        let client = &self.client;
        let answer = client
            .read(|link| {
                let (mut kv, request) = (client.kv(&link), link.request(txn.clone(), CALL_TIMEOUT));
                async move { kv.txn(request).await.map(tonic::Response::into_inner) }
            })
            .await?;
        if !answer.succeeded {
            return Err(Failure::Refused(self.superseded()));
        }
        let ranges: Option<Vec<RangeResponse>> = answer
            .responses
            .into_iter()
            .map(|answer| match answer.response {
                Some(response_op::Response::ResponseRange(range)) => Some(range),
                _ => None,
            })
            .collect();
        match ranges {
            Some(ranges) if ranges.len() == asked => Ok((answer.header, ranges)),
            _ => Err(Failure::Refused(malformed("an answer to another transaction"))),
        }
    }

    fn error(&self, failure: Failure, at: Option<Revision>) -> Error {
        match (failure, at) {
            (Failure::Compacted, Some(at)) => self.too_old(self.layout.etcd(at).unwrap_or_default()),
            (Failure::Future, Some(at)) => Error::invalid(format!("revision {at} lies ahead of the store")),
            (failure, _) => failure.into_error(),
        }
    }
}

/// One range.
pub(super) async fn range(client: &Client, request: RangeRequest) -> Result<RangeResponse, Failure> {
    client
        .read(|link| {
            let (mut kv, request) = (client.kv(&link), link.request(request.clone(), CALL_TIMEOUT));
            async move { kv.range(request).await.map(tonic::Response::into_inner) }
        })
        .await
}
