//! One connection from a nebd: hello, then requests in and replies out, then a farewell.
//!
//! Started by the listener. One task does all of it, so that a burst of requests costs one wake, not one each; if the engine has
//! a lane, on one of the `threads` that run nothing else. `hello` agrees with
//! nebd; afterwards requests travel in a ring of shared memory (`ring`, with frames over `control`), or, with a nebd that has
//! none, over the socket (`stream`). Knows: frames and how a request ends. Must not know: how a session serves. Invariants:
//! `complete_once` (an id is answered once by whoever has taken it), `replay_before_new` (a new link is served only when its
//! predecessors' requests have ended), `bounded`.

mod bell;
mod control;
mod hello;
pub(crate) mod ring;
mod staying;
mod stream;
#[cfg(test)]
mod tests;
mod threads;

use crate::buffer::BufferPool;
use crate::engine::EngineAnswer;
use crate::metrics::Metrics;
use crate::registry::Registry;
use crate::session::{Caller, Membership, Order, Session};
use hello::Carrier;
pub(crate) use hello::Facts;
use spline_link::ring::GatewayRing;
use spline_link::{LinkError, Message};
use spline_types::{BlockOp, BlockRequest, Fault};
use std::future::poll_fn;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
pub(crate) use threads::LaneThreads;
use tokio::net::UnixStream;
use tokio::sync::oneshot;
use tracing::{info, warn};

/// Time for a farewell, or the last answers, to reach a nebd that reads slowly; it replays without one as well.
const FAREWELL_LIMIT: Duration = Duration::from_millis(500);

/// What every link of a gateway needs.
pub(crate) struct Links {
    pub(crate) registry: Arc<Registry>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) buffers: BufferPool,
    /// How long a link that is told to leave waits for its running requests.
    pub(crate) drain_limit: Duration,
    pub(crate) threads: LaneThreads,
}

/// Why what nebd says ends its link.
#[derive(Debug, thiserror::Error)]
enum Breach {
    /// The socket failed.
    #[error("link socket failed: error={0}")]
    Socket(#[from] io::Error),
    /// Bytes that the contract does not allow.
    #[error(transparent)]
    Contract(#[from] LinkError),
    /// A frame that only a gateway sends, or that this kind of link does not have.
    #[error("frame that nebd must not send on this link")]
    Direction,
    /// Memory that can not be mapped.
    #[error(transparent)]
    Memory(#[from] spline_link::memory::MemoryError),
    /// A region's number was used before, or is not known, or there are too many.
    #[error("region that can not be had or given back: number={0}")]
    Region(u32),
    /// A request names memory that was not passed on.
    #[error(transparent)]
    NotShared(#[from] crate::shared::NotShared),
}

/// Why a link ends.
#[derive(Debug)]
enum Ending {
    /// nebd ends for good.
    Detached,
    /// The socket is gone, what came is not the contract, or a newer link took over.
    Gone,
    /// The gateway leaves, or an operator closed the volume.
    Leaving,
    /// A newer session has the volume.
    Lost,
    /// The next process of this gateway goes on with it.
    Frozen(ring::Freeze),
}

/// Serves one connection to its end.
pub(crate) async fn serve(mut stream: UnixStream, links: Arc<Links>) {
    let Ok(socket) = stream.as_fd().try_clone_to_owned().map(Arc::new) else {
        warn!("no descriptor left for a link, raise the limit on open files");
        return;
    };
    let Some(greeted) = hello::greet(&mut stream, &socket, &links).await else { return };
    let membership = greeted.membership;
    let session = Arc::clone(&membership.session);
    let volume = &session.name;
    info!(%volume, read_only = greeted.facts.read_only, ring = membership.has_ring(), "link is open");
    links.metrics.links.inc();
    let detached = match greeted.carrier {
        Carrier::Ring(rings, bell) => {
            // Its thread has a runtime of its own.
            let stream = stream.into_std();
            let facts = greeted.facts;
            let make = move |session: &Arc<Session>, links: &Links| {
                let control = control::Control::new(UnixStream::from_std(stream?)?);
                ring::RingLink::new(control, (*rings, bell), facts, session, links)
            };
            serve_ring(make, membership, socket, &links).await
        }
        Carrier::Socket => {
            let link = stream::Link::new(stream, Arc::clone(&session), greeted.facts.read_only, &links);
            link.run(membership, socket, links.drain_limit).await
        }
    };
    links.metrics.links.dec();
    links.registry.link_left(session, detached);
}

/// Goes on with a link that another process of this gateway has frozen. `begun` hears, just before requests are taken, how long
/// nobody has; nothing if the link can not be gone on with.
pub(crate) async fn go_on(
    frozen: ring::Frozen,
    session: Arc<Session>,
    links: Arc<Links>,
    begun: oneshot::Sender<Duration>,
) {
    let stream = std::os::unix::net::UnixStream::from(frozen.socket);
    let socket = match stream.set_nonblocking(true).and_then(|()| stream.as_fd().try_clone_to_owned()) {
        Ok(socket) => Arc::new(socket),
        Err(error) => {
            return warn!(volume = %session.name, %error, "link can not be gone on with, nebd will connect again");
        }
    };
    let facts = frozen.facts;
    let membership = session.join(Caller { instance: facts.instance, socket: &socket, ring: true });
    let make = move |session: &Arc<Session>, links: &Links| {
        let stream = UnixStream::from_std(stream)?;
        let control = control::Control::going_on(stream, frozen.partial, frozen.fds);
        let ring = GatewayRing::adopt(frozen.ring, frozen.position).map_err(io::Error::other)?;
        let link = ring::RingLink::new(control, ring, facts, session, links)?.going_on(frozen.regions)?;
        // Nobody need want to know.
        let _ = begun.send(frozen.stopped.elapsed());
        Ok(link)
    };
    links.metrics.links.inc();
    let detached = serve_ring(make, membership, socket, &links).await;
    links.metrics.links.dec();
    links.registry.link_left(session, detached);
}

/// Makes a link with a ring and serves it to its end, both on the thread where it stays. True if nebd has ended for good.
async fn serve_ring(
    make: impl FnOnce(&Arc<Session>, &Links) -> io::Result<ring::RingLink> + Send + 'static,
    membership: Membership,
    socket: Arc<OwnedFd>,
    links: &Arc<Links>,
) -> bool {
    let (session, all) = (Arc::clone(&membership.session), Arc::clone(links));
    let has_lane = session.engine.has_lane();
    let served = async move {
        match make(&session, &all) {
            Ok(link) => link.run(membership, socket, all.drain_limit).await,
            Err(error) => {
                warn!(volume = %session.name, %error, "link can not be served, nebd will connect again");
                false
            }
        }
    };
    match has_lane {
        true => links.threads.run(served).await.unwrap_or(false),
        false => served.await,
    }
}

/// What happens to a link from outside.
enum Signal {
    /// It is to end.
    End(Ending),
    /// The volume has a new size, bytes.
    Resized(u64),
}

/// The next thing that happens to a link from outside. May be dropped and called again.
async fn next_signal(membership: &mut Membership) -> Signal {
    let leaving = membership.session.leaving.clone();
    loop {
        tokio::select! {
            () = membership.stop.cancelled() => return Signal::End(Ending::Gone),
            () = leaving.cancelled() => return Signal::End(Ending::Leaving),
            Ok(()) = membership.standing.changed() => {
                let now = *membership.standing.borrow_and_update();
                return if now.lost { Signal::End(Ending::Lost) } else { Signal::Resized(now.size) };
            }
            Some(order) = membership.orders.recv() => match order {
                Order::Freeze(freeze) => return Signal::End(Ending::Frozen(freeze)),
                // Nobody may want to know any more.
                Order::Probe(probe) => drop(probe.send(())),
            }
        }
    }
}

/// A link that winds up hears no orders any more: it waits for requests, maybe for long, and whoever asks whether its task runs
/// must not wait for it.
fn hear_no_more(membership: &mut Membership) {
    membership.orders.close();
    while membership.orders.try_recv().is_ok() {}
}

/// What a link can do still when it winds up.
trait WindsUp {
    /// Answers what has ended, and writes what can be written; ready when nothing runs.
    fn poll_ended(&mut self, cx: &mut Context<'_>) -> Poll<()>;
    /// Ready when everything is written.
    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>>;
    /// Queues a frame.
    fn push(&mut self, message: Message);
}

/// Lets what runs on a link end, and says farewell. Afterwards nothing runs, or the drain limit has passed. A nebd that takes
/// nothing does not hold it up for long.
async fn wind_up(link: &mut impl WindsUp, ending: &Ending, session: &Session, drain_limit: Duration) {
    let farewell = match ending {
        Ending::Leaving => Message::Leaving,
        Ending::Lost => Message::Lost,
        Ending::Detached | Ending::Gone | Ending::Frozen(_) => {
            let leaving = session.leaving.clone();
            tokio::select! {
                () = poll_fn(|cx| link.poll_ended(cx)) => {}
                () = async { leaving.cancelled().await; tokio::time::sleep(drain_limit).await } => return,
            }
            if matches!(ending, Ending::Detached) {
                // What it does not take it does not want.
                let _ = tokio::time::timeout(FAREWELL_LIMIT, poll_fn(|cx| link.poll_flush(cx))).await;
            }
            return;
        }
    };
    let drained = async {
        poll_fn(|cx| link.poll_ended(cx)).await;
        poll_fn(|cx| link.poll_flush(cx)).await
    };
    // A socket that fails is found by the farewell.
    drop(tokio::time::timeout(drain_limit, drained).await);
    link.push(farewell);
    let said = tokio::time::timeout(FAREWELL_LIMIT, poll_fn(|cx| link.poll_flush(cx))).await;
    if !matches!(said, Ok(Ok(()))) {
        info!(volume = %session.name, "farewell did not reach nebd");
    }
}

/// Waits until a link's predecessors have ended.
///
/// # Errors
/// How the link ends before.
async fn predecessors_ended(membership: &mut Membership) -> Result<(), Ending> {
    if membership.standing.borrow().lost {
        return Err(Ending::Lost);
    }
    let predecessors = std::mem::take(&mut membership.predecessors);
    let ended = async {
        for predecessor in &predecessors {
            predecessor.cancelled().await;
        }
    };
    tokio::pin!(ended);
    loop {
        tokio::select! {
            biased;
            () = &mut ended => return Ok(()),
            signal = next_signal(membership) => match signal {
                // What it waits for would run on here: nebd has to connect again. Whoever froze it hears that.
                Signal::End(Ending::Frozen(_)) | Signal::Resized(_) => {}
                Signal::End(ending) => return Err(ending),
            }
        }
    }
}

/// Bytes of data that a request holds while it is in flight. A decoded read or write is at most 32 MiB long.
fn data_of(request: &BlockRequest) -> u32 {
    if request.op.carries_data() { u32::try_from(request.range.length()).unwrap_or(u32::MAX) } else { 0 }
}

/// An answer that is not as long as asked is a defect of an engine: told as such rather than passed to a guest.
fn fitting(request: &BlockRequest, answer: EngineAnswer) -> Result<EngineAnswer, Fault> {
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
