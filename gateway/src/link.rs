//! One connection from a nebd: hello, then requests in and replies out, then a farewell.
//!
//! Started by the listener. One task does all of it: it reads, starts requests, collects what has ended and writes,
//! so that a burst of requests costs one wake, not one each. Knows: frames and how a request ends. Must not know:
//! how a session serves. Invariants: `complete_once` (an id is answered by the one future that serves it),
//! `replay_before_new` (a new link is read only when its predecessors' requests have ended), `bounded`.

mod hello;
mod intake;
mod outbox;
#[cfg(test)]
mod tests;

use crate::admission::Permit;
use crate::buffer::BufferPool;
use crate::engine::{EngineAnswer, Standing};
use crate::metrics::Metrics;
use crate::registry::Registry;
use crate::session::{Membership, Session};
use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream::{FuturesUnordered, StreamExt};
use intake::{Arrival, Intake, IntakeError, data_of};
use outbox::Outbox;
use spline_link::{Header, Message};
use spline_types::{BlockRequest, Completion, Fault};
use std::future::{Future, poll_fn};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use tokio::net::UnixStream;
use tokio::sync::watch;
use tracing::{info, warn};

/// Time for a farewell to reach a nebd that reads slowly; it replays without one as well.
const FAREWELL_LIMIT: Duration = Duration::from_millis(500);

/// What every link of a gateway needs.
pub(crate) struct Links {
    pub(crate) registry: Arc<Registry>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) buffers: BufferPool,
    /// How long a link that is told to leave waits for its running requests.
    pub(crate) drain_limit: Duration,
}

/// Serves one connection to its end.
pub(crate) async fn serve(stream: UnixStream, links: Arc<Links>) {
    let (mut read, mut write) = stream.into_split();
    let Ok(socket) = read.as_ref().as_fd().try_clone_to_owned().map(Arc::new) else {
        warn!("no descriptor left for a link, raise the limit on open files");
        return;
    };
    let Some((membership, read_only)) = hello::greet(&mut read, &mut write, &socket, &links).await else {
        return;
    };
    let session = Arc::clone(&membership.session);
    let volume = &session.name;
    info!(%volume, read_only, "link is open");
    links.metrics.links.inc();
    let link = Link {
        intake: Intake::new(read, links.buffers.clone()),
        outbox: Outbox::new(write),
        running: FuturesUnordered::new(),
        session: Arc::clone(&membership.session),
        metrics: Arc::clone(&links.metrics),
        read_only,
    };
    let ending = link.run(membership, socket, links.drain_limit).await;
    links.metrics.links.dec();
    info!(%volume, ?ending, "link is closed");
    links.registry.link_left(session, ending == Ending::Detached);
}

/// Why a link ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Ending {
    /// nebd ends for good.
    Detached,
    /// The socket is gone, what came is not the contract, or a newer link took over.
    Gone,
    /// The gateway leaves, or an operator closed the volume.
    Leaving,
    /// A newer session has the volume.
    Lost,
}

struct Link {
    intake: Intake,
    outbox: Outbox,
    running: FuturesUnordered<Running>,
    session: Arc<Session>,
    metrics: Arc<Metrics>,
    read_only: bool,
}

impl Link {
    async fn run(mut self, membership: Membership, socket: Arc<OwnedFd>, drain_limit: Duration) -> Ending {
        let ending = self.serve_until_ending(&membership).await;
        self.wind_up(ending, drain_limit).await;
        // Requests that are given up are dropped before others are told that this link has ended.
        drop(self);
        drop((membership, socket));
        ending
    }

    async fn serve_until_ending(&mut self, membership: &Membership) -> Ending {
        let session = Arc::clone(&self.session);
        let (mut standing, mut before) = (membership.standing.clone(), membership.standing.clone());
        let predecessors = async {
            for predecessor in &membership.predecessors {
                predecessor.cancelled().await;
            }
        };
        tokio::select! {
            () = predecessors => {}
            () = membership.stop.cancelled() => return Ending::Gone,
            () = session.leaving.cancelled() => return Ending::Leaving,
            _ = before.wait_for(|now| now.lost) => return Ending::Lost,
        }
        loop {
            tokio::select! {
                biased;
                ending = poll_fn(|cx| self.poll_serve(cx)) => return ending,
                () = membership.stop.cancelled() => return Ending::Gone,
                () = session.leaving.cancelled() => return Ending::Leaving,
                Ok(()) = standing.changed() => {
                    if self.tell(&mut standing) {
                        return Ending::Lost;
                    }
                }
            }
        }
    }

    /// Tells nebd a new size; true if the session is lost instead.
    fn tell(&mut self, standing: &mut watch::Receiver<Standing>) -> bool {
        let now = *standing.borrow_and_update();
        if !now.lost {
            self.outbox.push(&Header::bare(Message::Resized { size: now.size }));
        }
        now.lost
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
                return Poll::Ready(self.broken(&IntakeError::Socket(error)));
            }
            if !moved {
                return Poll::Pending;
            }
        }
    }

    fn broken(&self, error: &IntakeError) -> Ending {
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
            let withdrawn = ended.answer == Err(Fault::Fenced) && self.session.leaving.is_cancelled();
            if !withdrawn {
                reply(&mut self.outbox, ended);
            }
        }
        any
    }

    /// Lets what runs end, says farewell. Afterwards nothing runs, or the drain limit has passed.
    async fn wind_up(&mut self, ending: Ending, drain_limit: Duration) {
        let leaving = self.session.leaving.clone();
        if ending == Ending::Gone {
            self.outbox.discard();
        }
        let drained = poll_fn(|cx| self.poll_drain(cx));
        match ending {
            Ending::Leaving | Ending::Lost => drop(tokio::time::timeout(drain_limit, drained).await),
            Ending::Detached | Ending::Gone => tokio::select! {
                () = drained => {}
                () = async { leaving.cancelled().await; tokio::time::sleep(drain_limit).await } => {}
            },
        }
        let farewell = match ending {
            Ending::Leaving => Message::Leaving,
            Ending::Lost => Message::Lost,
            Ending::Detached | Ending::Gone => return,
        };
        self.outbox.push(&Header::bare(farewell));
        let said = tokio::time::timeout(FAREWELL_LIMIT, poll_fn(|cx| self.outbox.poll_flush(cx))).await;
        if !matches!(said, Ok(Ok(()))) {
            info!(volume = %self.session.name, "farewell did not reach nebd");
        }
    }

    /// Ready when nothing runs and everything is written.
    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while self.collect(cx) {}
        // A socket that fails makes the outbox empty: then only the requests are waited for.
        let _ = self.outbox.poll_flush(cx);
        if self.running.is_empty() && self.outbox.is_empty() { Poll::Ready(()) } else { Poll::Pending }
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

/// An answer that is not as long as asked is a defect of an engine: told as such rather than passed to a guest.
fn fitting(request: &BlockRequest, answer: EngineAnswer) -> Result<EngineAnswer, Fault> {
    use spline_types::BlockOp;
    let fits = match (&answer, request.op) {
        (EngineAnswer::Data(parts), BlockOp::Read) => {
            parts.iter().map(|part| part.len() as u64).sum::<u64>() == request.range.length()
        }
        (EngineAnswer::Extents(extents), BlockOp::Status) => {
            let covered: u64 = extents.iter().map(|extent| extent.length).sum();
            covered > 0 && covered <= request.range.length()
        }
        (EngineAnswer::Done, op) => !matches!(op, BlockOp::Read | BlockOp::Status),
        _ => false,
    };
    if fits {
        return Ok(answer);
    }
    tracing::error!(op = request.op.name(), ?request.range, "engine answered a request with something else");
    Err(Fault::Internal)
}

/// Tells an io error apart from a clean end in the handshake.
fn unexpected_end() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "closed in the middle of a hello")
}
