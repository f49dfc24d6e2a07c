//! A replica whose core is gone.

use std::io;

use bytes::Bytes;
use prometheus_client::registry::Registry;

use super::*;
use crate::command::{Answer, GroupId, LogCommand, LogPosition};
use crate::error::ProposeError;
use crate::group::{Group, Role};
use crate::host::{RaftConfig, RaftHost};
use crate::state_machine::{Checkpoint, CheckpointJob, SnapshotSink, SnapshotSource, StateMachine};

const PATIENCE: Duration = Duration::from_secs(60);

/// Answers every command with nothing, keeps nothing.
pub(crate) struct Nothing;

impl StateMachine for Nothing {
    fn checkpoint(&self) -> Checkpoint {
        Checkpoint::default()
    }

    async fn apply(&mut self, batch: Vec<(LogPosition, LogCommand)>) -> io::Result<Vec<Answer>> {
        Ok(vec![Bytes::new(); batch.len()])
    }

    fn begin_checkpoint(&mut self) -> Box<dyn CheckpointJob> {
        unreachable!("nothing asks for a checkpoint")
    }

    fn snapshot_source(&self) -> io::Result<(Checkpoint, Box<dyn SnapshotSource>)> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn snapshot_sink(&mut self) -> io::Result<Box<dyn SnapshotSink>> {
        Err(io::ErrorKind::Unsupported.into())
    }

    async fn installed(&mut self, _: Checkpoint) -> io::Result<()> {
        Ok(())
    }
}

async fn until(what: &str, group: &Group, is_so: impl Fn(&Group) -> bool) {
    let wait = async {
        while !is_so(group) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(tokio::time::timeout(PATIENCE, wait).await.is_ok(), "never came true: {what}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_whose_core_panics_is_silent_reads_nothing_and_says_that_it_has_stopped() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let config = RaftConfig::new(dir.path().to_owned(), NodeId(1));
    let host = RaftHost::open(config, &mut Registry::default()).await.expect("opens");
    let (raft, parts) = host.0.start_raft(GroupId(1), Nothing).await.expect("starts");
    let group = host.0.enter(GroupId(1), Arc::new(raft.clone()), parts);
    group.bootstrap(&[NodeId(1)]).await.expect("bootstraps");
    until("it leads", &group, |group| group.status().role == Role::Leader).await;
    group.propose(LogCommand::default()).await.expect("is answered");
    // Right after the first write it may still read by a round.
    let lease = loop {
        let lease = group.read_lease().await.expect("it leads");
        if format!("{lease:?}").contains("by_lease: true") {
            break lease;
        }
        tokio::task::yield_now().await;
    };
    assert!(matches!(look(&group.member, Moment::now()), Look::Leader));

    assert!(raft.with_raft_state(|_| -> () { panic!("the core dies here") }).await.is_err());
    until("it is reported as stopped", &group, |group| group.status().role == Role::Stopped).await;
    assert!(matches!(look(&group.member, Moment::now()), Look::Nothing), "no heartbeat, no election");
    assert!(!lease.still_held());
    assert_eq!(group.read_lease().await.err(), Some(ProposeError::Stopped));
    assert_eq!(group.propose(LogCommand::default()).await, Err(ProposeError::Stopped));
    host.shutdown().await;
}
