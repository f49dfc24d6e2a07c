//! Replication as a whole: real hosts, real sockets, real logs on disk.

mod machine;
mod node;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use bytes::Buf;
use node::{Node, command, dirs, introduce, leader, three, until, write};
use spline_raft::{NodeId, ProposeError, RaftConfig, Role};

#[test]
fn a_write_reaches_every_replica_and_reads_need_the_leader() {
    let dirs = dirs(3);
    let nodes = three(&dirs);
    let all: Vec<&Node> = nodes.iter().collect();
    assert_eq!(write(&all, 1, "one"), 1);
    assert_eq!(write(&all, 1, "two"), 2);
    for node in &nodes {
        until("a replica has the write", || (node.shared.value(1)? == "two").then_some(()));
    }
    let at = leader(&all);
    for (i, node) in nodes.iter().enumerate() {
        let group = node.group.clone();
        let lease = node.run(async move { group.read_lease().await });
        match lease {
            Ok(lease) => assert!(i == at && lease.still_held()),
            Err(error) => assert_eq!(error, ProposeError::NotLeader { leader: Some(nodes[at].id) }),
        }
    }
}

#[test]
fn acked_is_durable_when_all_hosts_die_at_once() {
    let dirs = dirs(3);
    let nodes = three(&dirs);
    for i in 0..50 {
        let all: Vec<&Node> = nodes.iter().collect();
        write(&all, i % 5, &format!("value {i}"));
    }
    let writes: u64 =
        (0..5).map(|register| nodes[leader(&nodes.iter().collect::<Vec<_>>())].shared.writes(register)).sum();
    assert_eq!(writes, 50);
    let ids: Vec<(NodeId, _)> = nodes.into_iter().map(|node| (node.id, node.kill())).collect();
    let nodes: Vec<Node> = ids
        .into_iter()
        .zip(&dirs)
        .map(|((id, address), dir)| Node::start(dir.path().to_owned(), id, Some(address)))
        .collect();
    let all: Vec<&Node> = nodes.iter().collect();
    introduce(&all);
    let at = leader(&all);
    for register in 0..5u64 {
        assert_eq!(nodes[at].shared.value(register).unwrap(), format!("value {}", 45 + register).as_str());
        assert_eq!(nodes[at].shared.writes(register), 10);
    }
}

/// The lease of the hosts here, which is the default.
const LEASE: Duration = Duration::from_secs(1);

#[test]
fn commands_that_share_an_entry_are_applied_and_answered_one_by_one() {
    const WRITES: u64 = 200;
    let dirs = dirs(3);
    let mut nodes = three(&dirs);
    let all: Vec<&Node> = nodes.iter().collect();
    write(&all, 0, "first");
    let node = &nodes[leader(&all)];
    let entries = || node.group.status().last_log.expect("there is a log").index;
    let (before, group) = (entries(), node.group.clone());
    let answers = node.run(async move {
        let proposals = (0..WRITES).map(|number| {
            let group = group.clone();
            async move { group.propose(command(number % 2, &number.to_string())).await }
        });
        futures_util::future::join_all(proposals).await
    });
    let told: Vec<u64> = answers.iter().map(|answer| answer.clone().expect("written").get_u64_le()).collect();
    assert!(entries() - before <= WRITES / 4, "{WRITES} small writes at once share entries");
    // Each write to a register was told a number of its own, and the one with the highest is what is left.
    let last = [0, 1].map(|register| {
        let of_it: Vec<u64> = (register..WRITES).step_by(2).collect();
        let mut numbers: Vec<u64> = of_it.iter().map(|write| told[*write as usize]).collect();
        numbers.sort_unstable();
        let first = if register == 0 { 2 } else { 1 };
        assert_eq!(numbers, (first..first + WRITES / 2).collect::<Vec<_>>());
        of_it.into_iter().max_by_key(|write| told[*write as usize]).expect("there are writes").to_string()
    });
    let is_right = |node: &Node| {
        let values = (node.shared.value(0)?, node.shared.value(1)?);
        let writes = (node.shared.writes(0), node.shared.writes(1));
        let is_last = values.0 == last[0].as_str() && values.1 == last[1].as_str();
        (is_last && writes == (WRITES / 2 + 1, WRITES / 2)).then_some(())
    };
    nodes.iter().for_each(|node| until("a replica has all writes", || is_right(node)));
    let known: Vec<_> = nodes.drain(..).map(|node| (node.id, node.kill())).collect();
    for (dir, (id, address)) in dirs.iter().zip(known) {
        nodes.push(Node::start(dir.path().to_owned(), id, Some(address)));
    }
    introduce(&nodes.iter().collect::<Vec<_>>());
    nodes.iter().for_each(|node| until("a replica has read them from its log", || is_right(node)));
}

#[test]
fn an_idle_leader_keeps_its_lease_without_a_message_of_the_group() {
    let dirs = dirs(3);
    let nodes = three(&dirs);
    let all: Vec<&Node> = nodes.iter().collect();
    write(&all, 1, "one");
    for node in &nodes {
        until("a replica has the write", || (node.shared.value(1)? == "one").then_some(()));
    }
    let sent = || nodes.iter().map(|node| node.count("appends_sent")).sum::<u64>();
    // A machine that stands still may cost the lease; then it is tried again.
    until("three leases pass with the same leader and no append", || {
        let (at, term, before) = (leader(&all), all[leader(&all)].group.status().term, sent());
        let begun = Instant::now();
        while begun.elapsed() < 3 * LEASE {
            std::thread::sleep(LEASE / 50);
        }
        let group = nodes[at].group.clone();
        let lease = nodes[at].run(async move { group.read_lease().await.ok() })?;
        let is_leased = format!("{lease:?}").contains("by_lease: true");
        (is_leased && nodes[at].group.status().term == term && sent() == before).then_some(())
    });
}

#[test]
fn the_first_write_after_a_pause_is_answered() {
    let dirs = dirs(4);
    let mut nodes = three(&dirs);
    nodes.push(Node::start(dirs[3].path().to_owned(), NodeId(9), None));
    let all: Vec<&Node> = nodes.iter().collect();
    introduce(&all);
    // What is done by the leader after three leases without a message; again if the machine stood still.
    let after_a_pause = |work: &dyn Fn(&Node)| {
        until("a pause under one leader", || {
            let node = &nodes[leader(&all[..3])];
            let term = node.group.status().term;
            std::thread::sleep(3 * LEASE);
            let is_led = || node.role() == Role::Leader && node.group.status().term == term;
            is_led().then(|| work(node))
        });
    };
    after_a_pause(&|node| assert_eq!(node.propose(1, "one"), Ok(1)));
    after_a_pause(&|node| {
        let group = node.group.clone();
        node.run(async move { group.change_members(&[NodeId(9)], &[]).await })
            .expect("the members are changed");
    });
}

#[test]
fn a_follower_that_starts_into_an_idle_group_applies_what_is_committed() {
    let dirs = dirs(3);
    let mut nodes = three(&dirs);
    write(&nodes.iter().collect::<Vec<_>>(), 1, "one");
    let at = (leader(&nodes.iter().collect::<Vec<_>>()) + 1) % 3;
    let gone = nodes.remove(at);
    let id = gone.id;
    let address = gone.kill();
    let back = Node::start(dirs[at].path().to_owned(), id, Some(address));
    nodes.push(back);
    introduce(&nodes.iter().collect::<Vec<_>>());
    until("the follower has the write", || (nodes[2].shared.value(1)? == "one").then_some(()));
}

#[test]
fn a_follower_whose_log_takes_little_at_once_catches_up() {
    let dirs = dirs(3);
    let mut nodes = three(&dirs);
    let value = "x".repeat(256 << 10);
    let at = (leader(&nodes.iter().collect::<Vec<_>>()) + 1) % 3;
    let gone = nodes.remove(at);
    let id = gone.id;
    let address = gone.kill();
    for i in 0..40 {
        write(&nodes.iter().collect::<Vec<_>>(), i, &value);
    }
    let little = |config: &mut RaftConfig| config.wal.queue_bytes = 1 << 20;
    nodes.push(Node::start_with(dirs[at].path().to_owned(), id, Some(address), little));
    introduce(&nodes.iter().collect::<Vec<_>>());
    until("the follower has all of them", || {
        assert_ne!(nodes[2].role(), Role::Stopped);
        (0..40).all(|i| nodes[2].shared.writes(i) == 1).then_some(())
    });
    assert!(nodes[2].count("requests_refused") > 0, "it was never sent too much");
}

#[test]
fn proposals_that_would_overfill_the_log_wait() {
    let dirs = dirs(1);
    // Each entry costs a sync of its own, so that the log is slower than who proposes.
    let little = |config: &mut RaftConfig| (config.wal.queue_bytes, config.wal.batch_bytes) = (64 << 10, 1);
    let node = Node::start_with(dirs[0].path().to_owned(), NodeId(1), None, little);
    introduce(&[&node]);
    let group = node.group.clone();
    node.run(async move { group.bootstrap(&[NodeId(1)]).await.unwrap() });
    leader(&[&node]);
    let value = "x".repeat(4 << 10);
    let all: Vec<_> = (0..256).map(|register| (node.group.clone(), command(register, &value))).collect();
    // A disk that takes its time refuses some, but only after they have waited: they are certainly not logged.
    let all = all.into_iter().map(|(group, command)| async move {
        loop {
            let begun = Instant::now();
            match group.propose(command.clone()).await {
                Err(ProposeError::Overloaded) => assert!(begun.elapsed() >= Duration::from_secs(2)),
                answer => return answer,
            }
        }
    });
    let answers = node.run(futures_util::future::join_all(all));
    assert_ne!(node.role(), Role::Stopped);
    for (register, answer) in (0..).zip(answers) {
        assert!(answer.is_ok(), "{answer:?}");
        assert_eq!(node.shared.writes(register), 1);
    }
}

#[test]
fn a_leader_whose_state_machine_panics_makes_way() {
    let dirs = dirs(3);
    let nodes = three(&dirs);
    let all: Vec<&Node> = nodes.iter().collect();
    write(&all, 1, "one");
    let at = leader(&all);
    nodes[at].shared.panic_next();
    assert_eq!(nodes[at].propose(2, "two"), Err(ProposeError::Unknown));
    // Nothing more is proposed there: it must find out by itself, and its heartbeats must end.
    until("it is reported as stopped", || (nodes[at].role() == Role::Stopped).then_some(()));
    until("it is counted", || (nodes[at].count("replicas_ended") == 1).then_some(()));
    let others: Vec<&Node> = all.iter().copied().filter(|node| node.id != nodes[at].id).collect();
    assert_eq!(write(&others, 1, "three"), 2);
    assert_eq!(others[leader(&others)].shared.value(2).unwrap(), "two", "it was logged");
}

#[test]
fn a_replica_whose_state_machine_fails_says_why() {
    let dirs = dirs(1);
    let node = alone(&dirs[0], None);
    node.shared.fail_next();
    assert!(node.propose(1, "one").is_err());
    let group = node.group.clone();
    let why = node.run(async move { group.stopped().await });
    assert!(why.contains("this replica was told to fail"), "{why}");
    until("it is reported as stopped", || (node.role() == Role::Stopped).then_some(()));
}

#[test]
fn a_dead_leader_is_replaced_and_catches_up_by_log() {
    let dirs = dirs(3);
    let mut nodes = three(&dirs);
    write(&nodes.iter().collect::<Vec<_>>(), 1, "before");
    let at = leader(&nodes.iter().collect::<Vec<_>>());
    let dead = nodes.remove(at);
    let id = dead.id;
    let address = dead.kill();
    assert_eq!(write(&nodes.iter().collect::<Vec<_>>(), 1, "after"), 2);
    let back = Node::start(dirs[at].path().to_owned(), id, Some(address));
    nodes.push(back);
    introduce(&nodes.iter().collect::<Vec<_>>());
    until("the old leader has caught up", || (nodes[2].shared.value(1)? == "after").then_some(()));
    assert_eq!(nodes[2].shared.writes(1), 2);
}

#[test]
fn a_follower_behind_the_purged_log_gets_a_snapshot() {
    let dirs = dirs(3);
    let mut nodes = three(&dirs);
    write(&nodes.iter().collect::<Vec<_>>(), 1, "before");
    let at = leader(&nodes.iter().collect::<Vec<_>>());
    let away = (at + 1) % 3;
    let gone = nodes.remove(away);
    let id = gone.id;
    let address = gone.kill();
    for i in 0..40 {
        write(&nodes.iter().collect::<Vec<_>>(), 2 + i, "while away");
    }
    for node in &nodes {
        let group = node.group.clone();
        node.run(async move { group.checkpoint().await.unwrap() });
    }
    write(&nodes.iter().collect::<Vec<_>>(), 1, "after");
    nodes.push(Node::start(dirs[away].path().to_owned(), id, Some(address)));
    introduce(&nodes.iter().collect::<Vec<_>>());
    until("the follower has the snapshot and the log after it", || {
        let shared = &nodes[2].shared;
        (shared.value(1)? == "after" && (0..40).all(|i| shared.writes(2 + i) == 1)).then_some(())
    });
}

#[test]
fn replay_after_a_checkpoint_is_idempotent() {
    let dirs = dirs(1);
    let start = |address| {
        let node = Node::start(dirs[0].path().to_owned(), NodeId(1), address);
        introduce(&[&node]);
        node
    };
    let node = start(None);
    let group = node.group.clone();
    node.run(async move { group.bootstrap(&[NodeId(1)]).await.unwrap() });
    for i in 0..10 {
        assert_eq!(write(&[&node], 1, "x"), i + 1);
    }
    let group = node.group.clone();
    node.run(async move { group.checkpoint().await.unwrap() });
    for i in 10..20 {
        assert_eq!(write(&[&node], 1, "y"), i + 1);
    }
    let address = node.kill();
    let node = start(Some(address));
    leader(&[&node]);
    assert_eq!(node.shared.writes(1), 20);
    assert_eq!(write(&[&node], 1, "z"), 21);
}

/// What a quarter of these hosts' longest log past a checkpoint takes.
const QUARTER: usize = 256 << 10;

/// A host of its own group that checkpoints each MiB.
fn alone(dir: &tempfile::TempDir, address: Option<SocketAddr>) -> Node {
    let often = |config: &mut RaftConfig| config.checkpoint_log_bytes = 4 * QUARTER as u64;
    let node = Node::start_with(dir.path().to_owned(), NodeId(1), address, often);
    introduce(&[&node]);
    let group = node.group.clone();
    node.run(async move { group.bootstrap(&[NodeId(1)]).await.unwrap() });
    leader(&[&node]);
    node
}

#[test]
fn restarts_in_a_row_do_not_make_the_replay_longer_and_longer() {
    let dirs = dirs(1);
    let (value, mut address) = ("x".repeat(QUARTER), None);
    // Each run writes less than what makes a checkpoint due.
    for run in 0..6 {
        let node = alone(&dirs[0], address);
        let replayed = node.count("replayed");
        assert!(replayed <= 6, "run {run} replayed {replayed} writes");
        for _ in 0..3 {
            write(&[&node], 1, &value);
        }
        if replayed + 3 > 4 {
            until("a checkpoint is made", || (node.count("checkpoints") > 0).then_some(()));
        }
        assert_eq!(node.shared.writes(1), 3 * (run + 1));
        address = Some(node.kill());
    }
}

#[test]
fn a_shutdown_in_order_leaves_nothing_to_replay() {
    let dirs = dirs(1);
    let value = "x".repeat(QUARTER);
    let node = alone(&dirs[0], None);
    (0..3).for_each(|register| assert_eq!(write(&[&node], register, &value), 1));
    let address = node.kill();
    let node = alone(&dirs[0], Some(address));
    assert_eq!(node.count("replayed"), 3, "after a crash all of it is");
    let address = node.shut_down();
    let node = alone(&dirs[0], Some(address));
    assert_eq!(node.count("replayed"), 0);
    assert!((0..3).all(|register| node.shared.writes(register) == 1));
}

#[test]
fn leadership_can_be_handed_over() {
    let dirs = dirs(3);
    let nodes = three(&dirs);
    let all: Vec<&Node> = nodes.iter().collect();
    write(&all, 1, "one");
    // A transfer may be lost to a slow disk; then an election decides, and it is asked for again.
    let to = until("leadership is handed over", || {
        let from = leader(&all);
        let to = (from + 1) % 3;
        let (group, target) = (nodes[from].group.clone(), nodes[to].id);
        nodes[from].run(async move { group.transfer_leadership(target).await.ok() }).map(|()| to)
    });
    until("the new leader leads", || (leader(&all) == to).then_some(()));
    assert_eq!(write(&all, 1, "two"), 2);
}

#[test]
fn a_member_is_replaced_by_an_empty_newcomer() {
    let dirs = dirs(4);
    let mut nodes = three(&dirs);
    write(&nodes.iter().collect::<Vec<_>>(), 1, "one");
    let at = leader(&nodes.iter().collect::<Vec<_>>());
    let away = (at + 1) % 3;
    let gone = nodes.remove(away);
    let removed = gone.id;
    gone.kill();
    nodes.push(Node::start(dirs[3].path().to_owned(), NodeId(9), None));
    let all: Vec<&Node> = nodes.iter().collect();
    introduce(&all);
    until("the members are changed", || {
        let node = &nodes[leader(&all)];
        let group = node.group.clone();
        node.run(async move { group.change_members(&[NodeId(9)], &[removed]).await.ok() })
    });
    until("the newcomer votes and has the data", || {
        let status = nodes[2].group.status();
        let votes = status.voters.contains(&NodeId(9)) && !status.voters.contains(&removed);
        (votes && nodes[2].shared.value(1)? == "one").then_some(())
    });
    assert_eq!(write(&all, 1, "two"), 2);
}

#[test]
fn a_cut_off_leader_refuses_reads_and_the_rest_elect() {
    let dirs = dirs(3);
    let nodes = three(&dirs);
    let all: Vec<&Node> = nodes.iter().collect();
    write(&all, 1, "one");
    let at = leader(&all);
    let group = nodes[at].group.clone();
    let lease = nodes[at].run(async move { group.read_lease().await.unwrap() });
    // Nobody reaches the leader, and it reaches nobody.
    nodes[at].host.set_addresses(HashMap::new());
    let others: Vec<&Node> = all.iter().copied().filter(|node| node.id != nodes[at].id).collect();
    introduce(&others);
    until("the lease runs out", || (!lease.still_held()).then_some(()));
    let group = nodes[at].group.clone();
    let read = nodes[at].run(async move { group.read_lease().await });
    assert!(matches!(read, Err(ProposeError::NotLeader { .. })), "{read:?}");
    assert_eq!(write(&others, 1, "two"), 2);
    assert!(!lease.still_held());
    introduce(&all);
    until("the old leader follows", || {
        (nodes[at].role() == Role::Follower && nodes[at].shared.value(1)? == "two").then_some(())
    });
}
