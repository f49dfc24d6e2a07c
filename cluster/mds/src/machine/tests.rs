//! The machine over real tables: restarts, replays, checkpoints, snapshots.

use super::*;
use crate::metrics::Metrics;
use crate::state::record::Volume;
use prometheus_client::registry::Registry;
use spline_types::{BlockSize, OnUnavailable};
use std::path::Path;

fn machine(dir: &Path) -> Machine {
    let store = Arc::new(Store::open(&dir.join("meta.redb")).expect("opens"));
    Machine::load(store, Metrics::new(&mut Registry::default()).apply).expect("loads")
}

fn at(index: u64) -> LogPosition {
    LogPosition { term: 1, node: 1, index }
}

fn create(name: &str) -> LogCommand {
    let command = Command::CreateVolume {
        name: name.parse().expect("name"),
        size: 1 << 20,
        block_size: BlockSize::B512,
        on_unavailable: OnUnavailable::Wait,
        now_ms: 1,
    };
    LogCommand { meta: command.encode().into(), payload: Bytes::new() }
}

fn names(machine: &Machine) -> Vec<String> {
    machine.state().read(|state| state.volumes().map(|volume: &Volume| volume.name.to_string()).collect())
}

#[tokio::test]
async fn a_restart_keeps_everything_and_a_replay_changes_nothing() {
    let dir = tempfile::tempdir().expect("directory");
    let mut first = machine(dir.path());
    assert_eq!((first.checkpoint(), first.applied()), (Checkpoint::default(), None));
    first.apply(vec![(at(1), create("a")), (at(2), create("b"))]).await.expect("applied");
    let checkpoint = Checkpoint { position: Some(at(2)), membership: Bytes::from_static(b"\0members\xff") };
    first.begin_checkpoint().run(checkpoint.clone()).await.expect("recorded");
    first.apply(vec![(at(3), create("c"))]).await.expect("applied");
    let before = first.state().read(MetaState::clone);
    drop(first);
    let mut second = machine(dir.path());
    assert_eq!(second.checkpoint(), checkpoint);
    assert_eq!(second.applied(), Some(at(3)));
    assert_eq!(second.state().read(MetaState::clone), before);
    let answers = second.apply(vec![(at(3), create("c")), (at(4), create("d"))]).await.expect("applied");
    assert_eq!(answers.len(), 2);
    assert_eq!(names(&second), ["a", "b", "c", "d"]);
}

#[tokio::test]
async fn a_snapshot_carries_the_state_and_its_position() {
    let (from, to) = (tempfile::tempdir().expect("directory"), tempfile::tempdir().expect("directory"));
    let mut sender = machine(from.path());
    let batch = (1..=200).map(|n| (at(n), create(&format!("volume-{n:03}")))).collect();
    sender.apply(batch).await.expect("applied");
    let mut receiver = machine(to.path());
    receiver.apply(vec![(at(1), create("to-be-replaced"))]).await.expect("applied");
    let (_, mut source) = sender.snapshot_source().expect("source");
    let mut sink = receiver.snapshot_sink().expect("sink");
    for item in sink.begin(source.manifest()).await.expect("begins") {
        sink.write(item, source.read(item).await.expect("read")).await.expect("written");
    }
    sink.finish().await.expect("finished");
    let checkpoint = Checkpoint { position: Some(at(150)), membership: Bytes::from_static(b"m") };
    receiver.installed(checkpoint.clone()).await.expect("installed");
    assert_eq!(names(&receiver), names(&sender));
    // The dump is newer than the checkpoint: what lies between comes again and is skipped.
    receiver.apply(vec![(at(151), create("volume-151")), (at(201), create("x"))]).await.expect("applied");
    assert_eq!(names(&receiver).len(), 201);
    drop(receiver);
    assert_eq!(machine(to.path()).checkpoint(), checkpoint);
}

#[tokio::test]
async fn an_incomplete_snapshot_is_refused() {
    let dir = tempfile::tempdir().expect("directory");
    let mut sender = machine(dir.path());
    sender.apply(vec![(at(1), create("a"))]).await.expect("applied");
    let (_, source) = sender.snapshot_source().expect("source");
    let mut sink = sender.snapshot_sink().expect("sink");
    sink.begin(source.manifest()).await.expect("begins");
    sink.write(0, Bytes::from_static(b"{}")).await.expect("written");
    assert!(sink.finish().await.expect_err("refused").to_string().contains("incomplete"));
    assert_eq!(names(&machine_again(sender, dir.path())), ["a"]);
}

fn machine_again(old: Machine, dir: &Path) -> Machine {
    drop(old);
    machine(dir)
}

#[tokio::test]
async fn a_command_of_a_newer_version_stops_the_replica() {
    let dir = tempfile::tempdir().expect("directory");
    let mut machine = machine(dir.path());
    let newer = LogCommand { meta: Bytes::from_static(br#"{"v":99,"command":{}}"#), payload: Bytes::new() };
    let error = machine.apply(vec![(at(1), newer)]).await.expect_err("refused");
    assert!(error.to_string().contains("version=99"), "{error}");
}

#[tokio::test]
async fn a_refused_command_is_answered_as_refused() {
    let dir = tempfile::tempdir().expect("directory");
    let mut machine = machine(dir.path());
    let answers = machine.apply(vec![(at(1), create("a")), (at(2), create("a"))]).await.expect("applied");
    let outcome: crate::command::Outcome = serde_json::from_slice(&answers[1]).expect("parses");
    assert_eq!(outcome.expect_err("refused").kind, crate::refusal::RefusalKind::Exists);
}
