//! A peer that asks and does not take its answers.

use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use prometheus_client::registry::Registry;
use spline_wire::{Frame, FrameReceiver, FrameSender, Kind};
use tokio::io::DuplexStream;

use super::*;
use crate::command::{GroupId, NodeId};
use crate::host::{RaftConfig, RaftHost};
use crate::pulse::tests::Nothing;

const PATIENCE: Duration = Duration::from_secs(60);

async fn half(stream: DuplexStream) -> (FrameSender, FrameReceiver) {
    let (read, write) = tokio::io::split(stream);
    spline_wire::split(read, write).await.expect("one version")
}

/// A connection: where replies go, and where the peer would take them.
async fn connection() -> (FrameSender, FrameReceiver) {
    let (ours, theirs) = tokio::io::duplex(4096);
    let ((replies, _), (_, peer)) = tokio::join!(half(ours), half(theirs));
    (replies, peer)
}

async fn until_answered(peer: &mut FrameReceiver, number: u64) {
    let wait = async { while peer.next().await.expect("frames").expect("is open").request != number {} };
    tokio::time::timeout(PATIENCE, wait).await.expect("is answered");
}

#[tokio::test]
async fn a_request_keeps_its_place_until_its_reply_is_queued() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let config = RaftConfig::new(dir.path().to_owned(), NodeId(1));
    let host = RaftHost::open(config, &mut Registry::default()).await.expect("opens");
    let group = host.start_group(GroupId(1), Nothing).await.expect("starts");
    let (member, intake) = (group.member.clone(), Intake::new(1 << 20));
    let unanswered = || member.unanswered.load(Ordering::Relaxed);
    let ask = |number, replies: &FrameSender| {
        dispatch(member.clone(), Request::SnapshotFinish { session: 1 }, number, replies.clone(), &intake);
    };

    let (full, mut slow) = connection().await;
    // Until the writer has taken what it takes at once, and behind it the queue has no room for the smallest.
    for bytes in [1 << 20, 1 << 10, 0] {
        let payload = vec![Bytes::from(vec![0; bytes])];
        let filler = Frame { kind: Kind::RaftReply, request: 0, meta: Bytes::new(), payload };
        let mut refused = 0;
        while refused < 100 {
            refused = if full.try_send(filler.clone()).is_ok() { 0 } else { refused + 1 };
            tokio::task::yield_now().await;
        }
    }
    ask(7, &full);
    let (roomy, mut quick) = connection().await;
    ask(8, &roomy);
    until_answered(&mut quick, 8).await;
    assert_eq!(unanswered(), 1, "its reply waits for the peer");
    until_answered(&mut slow, 7).await;
    let gone = async {
        while unanswered() > 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, gone).await.expect("its place is free");
    host.shutdown().await;
}
