//! Rates of the store beside those of etcd's own calls, in the same run:
//! `cargo test --release -p dir-service store::etcd::tests::measure -- --ignored --nocapture`.

use super::*;
use crate::store::etcd::api::RangeRequest;
use std::time::Instant;

/// Callers at the same time.
const CLIENTS: usize = 64;
/// How long each is measured, and how often all are, in turn.
const SPAN: Duration = Duration::from_secs(3);
const ROUNDS: usize = 3;
/// Keys that are read.
const KEYS: usize = 10_000;
/// Bytes of a value: those of a small record.
const VALUE_BYTES: usize = 200;

/// Calls a second, and milliseconds within which half and 99 of 100 are answered.
async fn rate<F: Future<Output = ()> + Send + 'static>(
    call: impl Fn(usize, usize) -> F + Send + Sync + 'static,
) -> (f64, f64, f64) {
    let (call, until) = (Arc::new(call), Instant::now() + SPAN);
    let clients: Vec<_> = (0..CLIENTS)
        .map(|client| {
            let call = call.clone();
            tokio::spawn(async move {
                let mut took = Vec::new();
                while Instant::now() < until {
                    let began = Instant::now();
                    call(client, took.len()).await;
                    took.push(began.elapsed());
                }
                took
            })
        })
        .collect();
    let mut all = Vec::new();
    for client in clients {
        all.extend(client.await.unwrap());
    }
    all.sort_unstable();
    let at = |share: f64| all[((all.len() - 1) as f64 * share) as usize].as_secs_f64() * 1_000.0;
    (all.len() as f64 / SPAN.as_secs_f64(), at(0.5), at(0.99))
}

fn plan(client: usize, number: usize, round: usize) -> Plan {
    let mut plan = Plan::new();
    let new = key(&format!("new/{round}/{client:02}/{number:08}"));
    plan.require(Precondition::Absent(new.clone())).require(Precondition::Exists(key("00000000")));
    plan.put(new, vec![b'v'; VALUE_BYTES]).put(key(&format!("children/{client}")), vec![b'v'; 20]);
    plan
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "measures"]
async fn rates_beside_those_of_etcd() {
    for members in [1, 3] {
        let Some(etcd) = Etcd::start_with(members, |_| Vec::new()).await else { return };
        let store = create(etcd.options("s")).await;
        for start in (0..KEYS).step_by(100) {
            let mut plan = Plan::new();
            for number in start..start + 100 {
                plan.put(key(&format!("{number:08}")), vec![b'v'; VALUE_BYTES]);
            }
            store.commit(plan).await.unwrap();
        }
        println!("{members} member(s), {CLIENTS} clients: calls/s, ms for half, ms for 99 of 100");
        for round in 0..ROUNDS {
            let show = |what: &str, (rate, half, most): (f64, f64, f64)| {
                println!("  {what:<22} {rate:>8.0} {half:>8.2} {most:>8.2}");
                rate
            };
            let link = store.shared.client.link().await.unwrap();
            let kv = store.shared.client.kv(&link);
            let (raw, layout) = (kv.clone(), store.shared.layout.clone());
            let reads =
                show(
                    "etcd range",
                    rate(move |client, number| {
                        let mut kv = raw.clone();
                        let name = layout
                            .names
                            .record(format!("{:08}", (client * 7_919 + number) % KEYS).as_bytes());
                        async move {
                            drop(kv.range(RangeRequest { key: name, ..Default::default() }).await.unwrap())
                        }
                    })
                    .await,
                );
            let reader = store.clone();
            let gets = show(
                "store get",
                rate(move |client, number| {
                    let (store, name) =
                        (reader.clone(), key(&format!("{:08}", (client * 7_919 + number) % KEYS)));
                    async move { assert!(store.get(&[name], None).await.unwrap().1[0].is_some()) }
                })
                .await,
            );
            let (raw, layout) = (kv, store.shared.layout.clone());
            let txns = show(
                "etcd transaction",
                rate(move |client, number| {
                    let (mut kv, txn) = (raw.clone(), layout.txn(plan(client, number, 2 * round)));
                    async move { assert!(kv.txn(txn).await.unwrap().into_inner().succeeded) }
                })
                .await,
            );
            let writer = store.clone();
            let commits = show(
                "store commit",
                rate(move |client, number| {
                    let (store, plan) = (writer.clone(), plan(client, number, 2 * round + 1));
                    async move { assert!(store.commit(plan).await.is_ok()) }
                })
                .await,
            );
            println!("  gets {:.2} of ranges, commits {:.2} of transactions", gets / reads, commits / txns);
        }
    }
}
