//! Pipelined appends of one group to one peer: many messages on the way, answers in order.
//!
//! Called by `network` for replication streams and heartbeats. openraft pulls answers; pulling also sends what is ready.
//!
//! A message that only tells a new commit position is held back for a moment: the next entries carry it for nothing.
//! Followers apply a little later for it; nobody waits for them.
//!
//! The first message of a stream goes alone: a peer that takes nothing now says so before it is sent a window full.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{Stream, StreamExt, stream};
use openraft::raft::{StreamAppendError, StreamAppendResult};
use spline_wire::Frame;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::acks::Acks;
use super::peers::Link;
use super::{broken, unexpected};
use crate::clock::Moment;
use crate::codec::message::{Reply, Request};
use crate::command::{GroupId, NodeId};
use crate::metrics::Metrics;
use crate::types::{AppendRequest, LeaderId, LogId, RpcError, TypeConfig, command_bytes};

/// Most unanswered messages of one stream: enough to fill a slow link with small entries.
pub(crate) const WINDOW_MESSAGES: usize = 64;
/// Most unanswered bytes of one stream (one larger message goes alone): a hundred groups must not pile up gigabytes.
const WINDOW_BYTES: usize = 8 << 20;

/// How long a message without entries waits for one with entries, on a stream that goes on.
const COMMIT_HOLD: Duration = Duration::from_millis(50);

/// How long a stream to a peer that refuses is silent: its log takes nothing now, or the group is not there yet.
const REFUSED_PAUSE: Duration = Duration::from_millis(300);

type Answer = Result<StreamAppendResult<TypeConfig>, RpcError>;

/// A message on its way.
struct Sent {
    request: u64,
    /// Under which leadership, and a moment not after it was sent.
    leader: LeaderId,
    begun: Moment,
    previous: Option<LogId>,
    last: Option<LogId>,
    bytes: usize,
    reply: Option<Reply>,
}

struct Session<S> {
    group: GroupId,
    peer: NodeId,
    acks: Arc<Acks>,
    link: Arc<Link>,
    metrics: Arc<Metrics>,
    input: S,
    input_ended: bool,
    /// A message without entries, and when it goes out if nothing better comes.
    held: Option<(AppendRequest, Instant)>,
    replies: mpsc::UnboundedReceiver<(u64, Option<Frame>)>,
    reply_to: mpsc::UnboundedSender<(u64, Option<Frame>)>,
    sent: VecDeque<Sent>,
    bytes: usize,
    /// The peer has accepted a message of this stream.
    is_open: bool,
}

impl<S> Drop for Session<S> {
    fn drop(&mut self) {
        self.link.forget(self.sent.iter().filter(|sent| sent.reply.is_none()).map(|sent| sent.request));
    }
}

/// Sends what `input` yields to `peer` and yields the answers in its order. Ends after the first answer that is not a
/// success. What the peer accepts is told to `acks`.
pub(crate) fn run<S>(
    group: GroupId,
    peer: NodeId,
    acks: Arc<Acks>,
    link: Arc<Link>,
    metrics: Arc<Metrics>,
    input: S,
) -> impl Stream<Item = Answer>
where
    S: Stream<Item = AppendRequest> + Send + Unpin,
{
    let (reply_to, replies) = mpsc::unbounded_channel();
    let sent = VecDeque::new();
    let session = Session {
        group,
        peer,
        acks,
        link,
        metrics,
        input,
        input_ended: false,
        held: None,
        replies,
        reply_to,
        sent,
        bytes: 0,
        is_open: false,
    };
    stream::unfold(Some(session), |session| async move {
        let mut session = session?;
        let answer = session.next().await?;
        let go_on = matches!(answer, Ok(Ok(_)));
        Some((answer, go_on.then_some(session)))
    })
}

impl<S: Stream<Item = AppendRequest> + Send + Unpin> Session<S> {
    async fn next(&mut self) -> Option<Answer> {
        loop {
            if let Some(reply) = self.sent.front_mut().and_then(|first| first.reply.take()) {
                let first = self.sent.pop_front()?;
                self.bytes -= first.bytes;
                self.is_open = true;
                if matches!(reply, Reply::Refused(_)) {
                    // openraft asks again soon, and sends a message each time.
                    tokio::time::sleep(REFUSED_PAUSE).await;
                }
                return Some(answer(first, reply));
            }
            let is_due = self.input_ended || self.held.as_ref().is_some_and(|(_, at)| *at <= Instant::now());
            if is_due && let Some((held, _)) = self.held.take() {
                if let Err(error) = self.send(held).await {
                    return Some(Err(broken(error)));
                }
                continue;
            }
            if self.input_ended && self.sent.is_empty() {
                return None;
            }
            let fits = self.is_open && self.sent.len() < WINDOW_MESSAGES && self.bytes < WINDOW_BYTES;
            let room = fits || self.sent.is_empty();
            let hold = self.held.as_ref().map(|(_, at)| *at);
            tokio::select! {
                biased;
                reply = self.replies.recv(), if !self.sent.is_empty() => {
                    if let Err(error) = self.take(reply?) {
                        return Some(Err(error));
                    }
                }
                request = self.input.next(), if !self.input_ended && room => {
                    if let Err(error) = self.accept(request).await {
                        return Some(Err(broken(error)));
                    }
                }
                () = tokio::time::sleep_until(hold.unwrap_or_else(Instant::now)), if hold.is_some() => {}
            }
        }
    }

    async fn accept(&mut self, request: Option<AppendRequest>) -> Result<(), String> {
        match request {
            None => self.input_ended = true,
            Some(request) if request.entries.is_empty() => {
                // A newer commit position replaces a held one but does not wait longer than it.
                let at = self.held.as_ref().map_or_else(|| Instant::now() + COMMIT_HOLD, |(_, at)| *at);
                self.held = Some((request, at));
            }
            Some(request) => {
                // Carries a commit position at least as new as the held message's, and its answer covers both.
                self.held = None;
                self.send(request).await?;
            }
        }
        Ok(())
    }

    fn take(&mut self, (request, frame): (u64, Option<Frame>)) -> Result<(), RpcError> {
        let frame = frame.ok_or_else(|| broken("connection broke"))?;
        let reply = Reply::from_frame(frame).map_err(broken)?;
        if let Some(sent) = self.sent.iter_mut().find(|sent| sent.request == request) {
            if matches!(reply, Reply::Appended) {
                self.acks.note(self.peer, sent.leader, sent.begun);
            }
            sent.reply = Some(reply);
        }
        Ok(())
    }

    async fn send(&mut self, append: AppendRequest) -> Result<(), String> {
        let (leader, begun) = (append.vote.leader_id, Moment::now());
        let previous = append.prev_log_id;
        let last = append.entries.last().map(|entry| entry.log_id).or(previous);
        let bytes = append.entries.iter().map(command_bytes).sum();
        self.metrics.appends_sent.inc();
        self.metrics.entries_sent.inc_by(append.entries.len() as u64);
        let request = self.link.send(self.group, Request::Append(append), &self.reply_to).await?;
        self.bytes += bytes;
        self.sent.push_back(Sent { request, leader, begun, previous, last, bytes, reply: None });
        Ok(())
    }
}

fn answer(sent: Sent, reply: Reply) -> Answer {
    match (reply, sent.previous) {
        (Reply::Appended, _) => Ok(Ok(sent.last)),
        (Reply::Conflict, Some(previous)) => Ok(Err(StreamAppendError::Conflict(previous))),
        (Reply::HigherVote(vote), _) => Ok(Err(StreamAppendError::HigherVote(vote))),
        (other, _) => Err(unexpected(other)),
    }
}

#[cfg(test)]
mod tests;
