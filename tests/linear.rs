//! LINEAR: histories of concurrent clients are linearizable, also while servers die and come back.

use cairn_tests::{
    amount,
    checks::linear,
    histories::{CLIENTS, Outcome, history},
    seed,
    services::Services,
};
use client_lib::Client;
use cluster::Cluster;
use futures::future::try_join_all;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use std::{sync::Arc, time::Duration};

/// Histories with servers that live, and with servers that die. A debug build makes fewer of them.
const HISTORIES: u64 = if cfg!(debug_assertions) { 30 } else { 60 };

async fn clients(cluster: &Cluster) -> Vec<Client> {
    try_join_all((0..CLIENTS).map(|_| cluster.client())).await.unwrap()
}

async fn one(clients: &[Client], seed: u64, number: u64) -> Outcome {
    match history(clients, &format!("/history-{number}"), seed ^ (number << 16)).await {
        Ok(outcome) => outcome,
        Err(why) => panic!("seed {seed}, history {number}: {why}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn linear_histories_of_concurrent_clients() {
    let seed = seed("LINEAR_SEED");
    assert_eq!(linear::histories(Cluster::builder(), seed, CLIENTS, HISTORIES).await, Ok(()));
}

#[tokio::test(flavor = "multi_thread")]
async fn linear_histories_while_servers_die_and_return() {
    let seed = seed("LINEAR_SEED");
    let cluster =
        Arc::new(Cluster::builder().file_servers(4).memory(true).seed(seed).build_and_start().await.unwrap());
    let clients = clients(&cluster).await;
    let mut outcome = Outcome::default();
    for number in 0..HISTORIES / 5 {
        let victim = (number % 4) as usize;
        let nemesis = {
            let cluster = cluster.clone();
            tokio::spawn(async move {
                if number % 3 == 2 {
                    cluster.kill_directory().await;
                    cluster.restart_directory().await.unwrap();
                } else {
                    cluster.kill(victim).await;
                    cluster.restart(victim).await.unwrap();
                }
            })
        };
        outcome.add(&one(&clients, seed, number).await);
        nemesis.await.unwrap();
        cluster.wait_ready().await.unwrap();
    }
    println!("{outcome:?}");
    assert!(outcome.known > 4 * outcome.unknown, "the run was too broken to show anything: {outcome:?}");
}

/// The same over real processes: each history sees a service killed or paused. `CAIRN_HISTORIES` (default 10) says how
/// many; several are made at a time.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn linear_histories_over_real_processes_that_are_killed_and_paused() {
    const AT_ONCE: u64 = 4;
    let seed = seed("LINEAR_SEED");
    let wanted = amount("CAIRN_HISTORIES", 10);
    let mut dice = StdRng::seed_from_u64(seed);
    let mut services = Services::start(4).await;
    let makers = futures::future::join_all((0..AT_ONCE).map(|_| async {
        let connect = || async { Client::connect(&[services.directory_uri()]).await.unwrap() };
        futures::future::join_all((0..CLIENTS).map(|_| connect())).await
    }))
    .await;
    let (mut outcome, mut made, mut faults) = (Outcome::default(), 0, 0);
    while outcome.linearizable < wanted {
        assert!(made < wanted * 2 + 20, "too few histories could be checked: {outcome:?}");
        let mut histories = tokio::task::JoinSet::new();
        for clients in &makers {
            let (clients, number) = (clients.clone(), made);
            made += 1;
            histories.spawn(async move { one(&clients, seed, number).await });
        }
        let mut fault = async || {
            tokio::time::sleep(Duration::from_millis(dice.random_range(0..100))).await;
            let count = services.files.len() + 1;
            let victim = services.all().nth(dice.random_range(0..count)).unwrap();
            let pause = dice.random_bool(0.5);
            if pause {
                victim.pause()
            } else {
                victim.kill9()
            }
            tokio::time::sleep(Duration::from_millis(dice.random_range(0..400))).await;
            if pause { victim.resume() } else { victim.start() }
        };
        fault().await;
        faults += 1;
        while let Some(made) = histories.join_next().await {
            outcome.add(&made.unwrap());
        }
        services.ready().await;
    }
    println!("{faults} services killed or paused meanwhile, {outcome:?}");
    assert!(outcome.known > 4 * outcome.unknown, "the run was too broken to show anything: {outcome:?}");
}
