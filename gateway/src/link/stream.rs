//! A link whose requests and replies travel over its socket, payload and all.
//!
//! Run by [`link`](super) for a nebd without a ring. Reads, starts requests, collects what has ended and writes.

mod intake;
mod outbox;

use super::{
    Breach, Ending, Links, Signal, WindsUp, data_of, fitting, hear_no_more, next_signal, predecessors_ended,
    wind_up,
};
use crate::admission::Permit;
use crate::engine::EngineAnswer;
use crate::metrics::Metrics;
use crate::session::{Membership, Session};
use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream::{FuturesUnordered, StreamExt};
use intake::{Arrival, Intake};
use outbox::Outbox;
use spline_link::{Header, Message};
use spline_types::{BlockRequest, Completion, Fault};
use std::future::{Future, poll_fn};
use std::io;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use tokio::net::UnixStream;
use tracing::{info, warn};

pub(super) struct Link {
    intake: Intake,
    outbox: Outbox,
    running: FuturesUnordered<Running>,
    session: Arc<Session>,
    metrics: Arc<Metrics>,
    read_only: bool,
}

impl Link {
    pub(super) fn new(stream: UnixStream, session: Arc<Session>, read_only: bool, links: &Links) -> Self {
        let (read, write) = stream.into_split();
        Self {
            intake: Intake::new(read, links.buffers.clone()),
            outbox: Outbox::new(write),
            running: FuturesUnordered::new(),
            session,
            metrics: Arc::clone(&links.metrics),
            read_only,
        }
    }

    /// Serves to the link's end. True if nebd has ended for good.
    pub(super) async fn run(
        mut self,
        mut membership: Membership,
        socket: Arc<OwnedFd>,
        drain_limit: Duration,
    ) -> bool {
        let ending = match predecessors_ended(&mut membership).await {
            Ok(()) => self.serve_until_ending(&mut membership).await,
            Err(ending) => ending,
        };
        hear_no_more(&mut membership);
        if matches!(ending, Ending::Gone) {
            self.outbox.discard();
        }
        wind_up(&mut self, &ending, &membership.session, drain_limit).await;
        info!(volume = %self.session.name, ?ending, "link is closed");
        // Requests that are given up are dropped before others are told that this link has ended.
        drop(self);
        drop((membership, socket));
        matches!(ending, Ending::Detached)
    }

    async fn serve_until_ending(&mut self, membership: &mut Membership) -> Ending {
        loop {
            tokio::select! {
                biased;
                ending = poll_fn(|cx| self.poll_serve(cx)) => return ending,
                signal = next_signal(membership) => match signal {
                    // Requests lie in its socket: it can not be gone on with, and whoever froze it hears that.
                    Signal::End(Ending::Frozen(_)) => {}
                    Signal::End(ending) => return ending,
                    Signal::Resized(size) => self.outbox.push(&Header::bare(Message::Resized { size })),
                }
            }
        }
    }

    /// Reads, executes and answers until the link ends.
    fn poll_serve(&mut self, cx: &mut Context<'_>) -> Poll<Ending> {
        loop {
            let mut moved = false;
            while let Poll::Ready(arrival) = self.intake.poll_next(cx, &self.session.admission) {
                moved = true;
                match arrival {
                    Ok(Arrival::Request(request, payload, permit)) => self.start(request, payload, permit),
                    Ok(Arrival::Detach) => return Poll::Ready(Ending::Detached),
                    Ok(Arrival::Closed) => return Poll::Ready(Ending::Gone),
                    Err(error) => return Poll::Ready(self.broken(&error)),
                }
            }
            moved |= self.collect(cx);
            if let Poll::Ready(Err(error)) = self.outbox.poll_flush(cx) {
                return Poll::Ready(self.broken(&Breach::Socket(error)));
            }
            if !moved {
                return Poll::Pending;
            }
        }
    }

    fn broken(&self, error: &Breach) -> Ending {
        warn!(volume = %self.session.name, %error, "link is cut");
        Ending::Gone
    }

    fn start(&mut self, request: BlockRequest, payload: Bytes, permit: Permit) {
        self.metrics.started(request.op, data_of(&request).into());
        let work = match self.session.execute(request, payload, self.read_only) {
            Ok(future) => Work::Engine(future),
            Err(fault) => Work::Refused(fault),
        };
        let metrics = Arc::clone(&self.metrics);
        self.running.push(Running { request, work, permit: Some(permit), since: Instant::now(), metrics });
    }

    /// Queues the replies of what has ended; true if there was any.
    fn collect(&mut self, cx: &mut Context<'_>) -> bool {
        let mut any = false;
        while let Poll::Ready(Some(ended)) = self.running.poll_next_unpin(cx) {
            any = true;
            // Whoever takes over while this gateway leaves has fenced it: the request is withdrawn, nebd replays it.
            let withdrawn = ended.answer == Err(Fault::Fenced) && self.session.withdraws();
            if !withdrawn {
                reply(&mut self.outbox, ended);
            }
        }
        any
    }
}

impl WindsUp for Link {
    fn poll_ended(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while self.collect(cx) {}
        // A socket that fails makes the outbox empty: then only the requests are waited for.
        let _ = self.outbox.poll_flush(cx);
        if self.running.is_empty() { Poll::Ready(()) } else { Poll::Pending }
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.outbox.poll_flush(cx)
    }

    fn push(&mut self, message: Message) {
        self.outbox.push(&Header::bare(message));
    }
}

/// Queues the reply to a request (`complete_once`).
fn reply(outbox: &mut Outbox, ended: Ended) {
    let Ended { request, answer, permit } = ended;
    let done = |payload: usize| Header::reply(request.id, Completion::Done(()), payload as u32);
    match answer {
        Ok(EngineAnswer::Done) => outbox.push_reply(&done(0), [], permit),
        Ok(EngineAnswer::Data(parts)) => {
            let length: usize = parts.iter().map(Bytes::len).sum();
            outbox.push_reply(&done(length), parts, permit);
        }
        Ok(EngineAnswer::Extents(extents)) => {
            let payload = Bytes::from(spline_link::extents::encode(&extents));
            outbox.push_reply(&done(payload.len()), [payload], permit);
        }
        Err(fault) => outbox.push_reply(&Header::reply(request.id, Completion::Failed(fault), 0), [], permit),
    }
}

/// A request under way. Counts itself out when it ends or is dropped.
struct Running {
    request: BlockRequest,
    work: Work,
    /// Present until the request has ended.
    permit: Option<Permit>,
    since: Instant,
    metrics: Arc<Metrics>,
}

enum Work {
    Engine(BoxFuture<'static, Result<EngineAnswer, Fault>>),
    Refused(Fault),
}

struct Ended {
    request: BlockRequest,
    answer: Result<EngineAnswer, Fault>,
    permit: Permit,
}

impl Future for Running {
    type Output = Ended;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Ended> {
        let answer = match &mut self.work {
            Work::Engine(future) => std::task::ready!(future.as_mut().poll(cx)),
            Work::Refused(fault) => Err(*fault),
        };
        let request = self.request;
        let answer = answer.and_then(|answer| fitting(&request, answer));
        let permit = self.permit.take().expect("a future is not polled after it is ready");
        let bytes = data_of(&request).into();
        self.metrics.ended(request.op, bytes, answer.as_ref().err().copied(), self.since.elapsed());
        Poll::Ready(Ended { request, answer, permit })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.permit.is_some() {
            self.metrics.dropped(self.request.op, data_of(&self.request).into());
        }
    }
}
