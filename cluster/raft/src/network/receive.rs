//! The receiving side: a `RaftRequest` frame becomes a call of the group it names, and a reply.
//!
//! Called by `host` from the connection's reader, which it must not block: a request is handed to the group at once (so
//! appends keep their order) and awaited in a task of its own.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use openraft::raft::AppendEntriesResponse;
use spline_wire::{Frame, FrameSender};

use super::intake::Intake;
use crate::codec::message::{Reply, Request};
use crate::member::Member;

/// Carries out `request` on `member` and sends the reply; refuses it if `intake` has no room.
pub(crate) fn dispatch(
    member: Arc<Member>,
    request: Request,
    number: u64,
    replies: FrameSender,
    intake: &Arc<Intake>,
) {
    let Some(mut taken) = intake.take(&member, &request) else {
        member.metrics.requests_refused.inc();
        return refuse(number, format!("replica takes nothing more now, group={}", member.id), &replies);
    };
    let is_append = matches!(request, Request::Append(_));
    // Unconstrained: the first poll must reach the group's queue, however busy this task has been.
    let mut work = Box::pin(tokio::task::unconstrained(async move {
        let reply = carry_out(&member, request).await;
        taken.entries_are_kept();
        // A connection that has gone needs no reply. One that takes none keeps the request counted.
        let _ = replies.send(reply.into_frame(number)).await;
        drop(taken);
    }));
    if is_append && poll_once(work.as_mut()) {
        return;
    }
    tokio::spawn(work);
}

/// Sends a refusal without a group.
pub(crate) fn refuse(frame_number: u64, reason: String, replies: &FrameSender) {
    let frame: Frame = Reply::Refused(reason).into_frame(frame_number);
    // A full queue means that the peer does not read; it will find out by itself.
    let _ = replies.try_send(frame);
}

/// Polls without a waker: whatever is left is polled again by the task it is moved to.
fn poll_once<F: Future<Output = ()>>(work: Pin<&mut F>) -> bool {
    matches!(work.poll(&mut Context::from_waker(Waker::noop())), Poll::Ready(()))
}

async fn carry_out(member: &Arc<Member>, request: Request) -> Reply {
    match request {
        Request::Append(append) => {
            member.metrics.appends_received.inc();
            let (leader, begun) = (append.vote.leader_id, member.promise.append_begins());
            let answer = member.replica.append(append).await;
            match answer {
                Ok(AppendEntriesResponse::Success) => match member.promise.accepted(leader, true, begun) {
                    true => Reply::Appended,
                    false => Reply::Refused("a vote for another leader is under way".to_owned()),
                },
                Ok(AppendEntriesResponse::PartialSuccess(_)) => {
                    Reply::Refused("append was cut short".to_owned())
                }
                Ok(AppendEntriesResponse::Conflict) => {
                    member.promise.accepted(leader, false, begun);
                    Reply::Conflict
                }
                Ok(AppendEntriesResponse::HigherVote(vote)) => Reply::HigherVote(vote),
                Err(reason) => Reply::Refused(reason),
            }
        }
        Request::Vote { request, handed_over } => {
            member.vote(request, handed_over).await.map_or_else(Reply::Refused, Reply::Voted)
        }
        Request::PreVote(vote) => member.pre_vote(vote).await.map_or_else(Reply::Refused, Reply::Voted),
        Request::Transfer(transfer) => match member.transfer(transfer).await {
            Ok(()) => Reply::TransferTaken,
            Err(reason) => Reply::Refused(reason),
        },
        Request::SnapshotBegin { vote, session, meta, manifest } => {
            member.inbound.begin(member, vote, session, meta, manifest).await
        }
        Request::SnapshotItem { session, item, data } => {
            member.metrics.snapshot_items_received.inc();
            member.inbound.item(session, item, data).await
        }
        Request::SnapshotFinish { session } => member.inbound.finish(member, session).await,
        // Answered by `beats`: they are for no single group.
        Request::Beats { .. } => Reply::Refused("heartbeats are for a host".to_owned()),
    }
}

#[cfg(test)]
mod tests;
