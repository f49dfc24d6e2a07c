//! A stream over an in-memory connection, with paused time: what the peer gets, and when.

use futures_util::stream::BoxStream;
use openraft::{Entry, EntryPayload};
use prometheus_client::registry::Registry;
use spline_wire::{FrameReceiver, FrameSender};
use tokio::io::{duplex, split};

use super::*;
use crate::codec::message::Request;
use crate::types::Vote;

const LEADER: LeaderId = LeaderId { term: 5, node_id: 1 };
/// What the clock may be late by.
const TICK: Duration = Duration::from_millis(2);

fn append(commit: u64, entries: std::ops::Range<u64>) -> AppendRequest {
    let entry = |index| Entry { log_id: LogId::new(LEADER, index), payload: EntryPayload::Blank };
    AppendRequest {
        vote: Vote { leader_id: LEADER, committed: true },
        prev_log_id: entries.start.checked_sub(1).map(|index| LogId::new(LEADER, index)),
        leader_commit: Some(LogId::new(LEADER, commit)),
        entries: entries.map(entry).collect(),
    }
}

/// The peer's side of a stream whose requests come from a channel, and its answers.
struct Peer {
    requests: mpsc::UnboundedSender<AppendRequest>,
    sender: FrameSender,
    receiver: FrameReceiver,
    answers: BoxStream<'static, Answer>,
    begun: Instant,
}

impl Peer {
    async fn start() -> Peer {
        let (near, far) = duplex(1 << 16);
        let ((near_read, near_write), (far_read, far_write)) = (split(near), split(far));
        let (near, far) =
            tokio::join!(spline_wire::split(near_read, near_write), spline_wire::split(far_read, far_write));
        let ((near_sender, near_receiver), (sender, receiver)) = (near.unwrap(), far.unwrap());
        let metrics = Arc::new(Metrics::register(&mut Registry::default()));
        let link = Link::start(NodeId(2), near_sender, near_receiver, metrics.clone());
        let (requests, input) = mpsc::unbounded_channel();
        let input = Box::pin(stream::unfold(input, |mut input| async { Some((input.recv().await?, input)) }));
        let answers = run(GroupId(7), NodeId(2), Arc::default(), link, metrics, input);
        Peer { requests, sender, receiver, answers: Box::pin(answers), begun: Instant::now() }
    }

    fn give(&self, request: AppendRequest) {
        self.requests.send(request).expect("the stream goes on");
    }

    /// The next message that arrives, and how long after the start; the stream is driven meanwhile.
    async fn next(&mut self) -> (u64, AppendRequest, Duration) {
        let frame = tokio::select! {
            frame = self.receiver.next() => frame.unwrap().expect("open"),
            answer = self.answers.next() => panic!("nothing was answered: {answer:?}"),
        };
        let (number, waited) = (frame.request, self.begun.elapsed());
        match Request::from_frame(frame).expect("readable").1 {
            Request::Append(append) => (number, append, waited),
            other => panic!("not an append: {other:?}"),
        }
    }

    /// Whether nothing arrives for `pause`.
    async fn is_silent(&mut self, pause: Duration) -> bool {
        tokio::time::timeout(pause, self.next()).await.is_err()
    }

    async fn reply(&mut self, number: u64, reply: Reply) -> Option<Answer> {
        self.sender.send(reply.into_frame(number)).await.expect("open");
        self.answers.next().await
    }
}

#[tokio::test(start_paused = true)]
async fn a_commit_position_alone_is_told_after_a_moment() {
    let mut peer = Peer::start().await;
    peer.give(append(3, 4..4));
    assert!(peer.is_silent(COMMIT_HOLD / 2).await);
    peer.give(append(4, 5..5));
    let (number, got, waited) = peer.next().await;
    assert_eq!((got.entries.len(), got.leader_commit.map(|id| id.index)), (0, Some(4)), "the newest");
    assert!(
        waited >= COMMIT_HOLD && waited <= COMMIT_HOLD + TICK,
        "it waits no longer than the first: {waited:?}"
    );
    assert!(matches!(peer.reply(number, Reply::Appended).await, Some(Ok(Ok(Some(id)))) if id.index == 4));
}

#[tokio::test(start_paused = true)]
async fn entries_carry_a_held_commit_position() {
    let mut peer = Peer::start().await;
    peer.give(append(3, 4..4));
    assert!(peer.is_silent(COMMIT_HOLD / 2).await);
    peer.give(append(3, 4..6));
    let (number, got, waited) = peer.next().await;
    assert_eq!((got.entries.len(), got.leader_commit.map(|id| id.index)), (2, Some(3)));
    assert!(waited < COMMIT_HOLD, "entries do not wait: {waited:?}");
    assert!(matches!(peer.reply(number, Reply::Appended).await, Some(Ok(Ok(Some(id)))) if id.index == 5));
    let quiet = tokio::time::timeout(2 * COMMIT_HOLD, peer.answers.next()).await;
    assert!(quiet.is_err(), "the held message was not sent again: {quiet:?}");
}

#[tokio::test(start_paused = true)]
async fn a_window_opens_with_the_first_answer_and_a_refusal_makes_a_pause() {
    let mut peer = Peer::start().await;
    (0..3).for_each(|at| peer.give(append(0, at..at + 1)));
    let (first, ..) = peer.next().await;
    assert!(peer.is_silent(COMMIT_HOLD).await, "the first goes alone");
    assert!(matches!(peer.reply(first, Reply::Appended).await, Some(Ok(Ok(_)))));
    let (second, ..) = peer.next().await;
    peer.next().await;
    let before = Instant::now();
    let refused = peer.reply(second, Reply::Refused("no room".to_owned())).await;
    assert!(matches!(refused, Some(Err(RpcError::Unreachable(_)))), "{refused:?}");
    assert!(before.elapsed() >= REFUSED_PAUSE);
    assert!(peer.answers.next().await.is_none(), "a stream ends with a refusal");
}
