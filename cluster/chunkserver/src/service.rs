//! The wire listener: chunk requests from gateways, raft messages from peers.
//!
//! Called by no one: it runs from start to shutdown. Must not know: what a request means.
//! Invariants: `bounded` (connections, and requests per connection), `guest_cannot_crash_us` (bytes that make no sense
//! are answered or the connection is closed).

use crate::copyset::Outcome;
use crate::copysets::Copysets;
use crate::metrics::Metrics;
use bytes::Bytes;
use spline_types::{ChunkOp, Fault, Invalid, Unavailable};
use spline_wire::chunk::{Reply, decode_request, encode_extents};
use spline_wire::{Frame, FrameSender, Kind};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Connections at once: gateways and peers of a large cluster, a fraction of the file descriptors.
const CONNECTIONS: usize = 4096;
/// Chunk requests of one connection in hand; the reader waits, and with it the peer. A gateway's volumes share one.
const REQUESTS: usize = 4096;
/// Time for a new connection to say which versions it speaks.
const GREETING: Duration = Duration::from_secs(5);
/// Pause after a failed accept: out of file descriptors, most likely.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What a connection needs.
pub struct Service {
    /// The replicas.
    pub copysets: Arc<Copysets>,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// Ends the service.
    pub stop: CancellationToken,
    /// Connections and requests that run.
    pub tasks: TaskTracker,
}

impl Service {
    /// Accepts until `stop`.
    pub async fn run(self: Arc<Self>, listener: TcpListener) {
        let room = Arc::new(Semaphore::new(CONNECTIONS));
        loop {
            let accept = async {
                let place = Arc::clone(&room).acquire_owned().await;
                (listener.accept().await, place)
            };
            tokio::select! {
                () = self.stop.cancelled() => return,
                (accepted, place) = accept => match accepted {
                    Ok((stream, peer)) => {
                        let service = Arc::clone(&self);
                        self.tasks.spawn(async move {
                            let _place = place;
                            if let Err(error) = service.serve(stream).await {
                                tracing::info!(%peer, %error, "connection ended");
                            }
                        });
                    }
                    Err(error) => {
                        tracing::warn!(%error, "could not accept a connection");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                },
            }
        }
    }

    async fn serve(self: &Arc<Self>, stream: TcpStream) -> Result<(), spline_wire::WireError> {
        let (sender, mut receiver) = spline_wire::accept(stream, GREETING).await?;
        let turns = Arc::new(Semaphore::new(REQUESTS));
        loop {
            let frame = tokio::select! {
                () = self.stop.cancelled() => return Ok(()),
                frame = receiver.next() => frame?,
            };
            let Some(frame) = frame else { return Ok(()) };
            match frame.kind {
                Kind::ChunkRequest => {
                    let Ok(turn) = Arc::clone(&turns).acquire_owned().await else { return Ok(()) };
                    let (service, sender) = (Arc::clone(self), sender.clone());
                    self.tasks.spawn(async move { service.chunk_request(frame, &sender, turn).await });
                }
                Kind::RaftRequest => self.copysets.host().handle(frame, &sender).await,
                Kind::ChunkReply | Kind::RaftReply | Kind::Ping | Kind::Pong => {
                    tracing::debug!(kind = ?frame.kind, "frame that nobody asked for, ignored");
                }
            }
        }
    }

    async fn chunk_request(&self, frame: Frame, sender: &FrameSender, _turn: OwnedSemaphorePermit) {
        let request = frame.request;
        let (reply, payload) = self.answer(frame).await;
        self.metrics.request_bytes.inc_by(payload.as_ref().map_or(0, Bytes::len) as u64);
        let payload = payload.into_iter().collect();
        let frame = Frame { kind: Kind::ChunkReply, request, meta: reply.encode(), payload };
        // A peer that has gone needs no answer.
        let _ = sender.send(frame).await;
    }

    async fn answer(&self, frame: Frame) -> (Reply, Option<Bytes>) {
        let start = Instant::now();
        let command = match decode_request(&frame.meta) {
            Ok(command) => command,
            Err(error) => {
                tracing::warn!(%error, "chunk request was not understood");
                return (Reply::failed(Fault::Invalid(Invalid::Flags)), None);
            }
        };
        let copyset = self.copysets.get(command.copyset);
        let result = match &copyset {
            Some(copyset) => {
                let payload = frame.into_payload();
                self.metrics.request_bytes.inc_by(payload.len() as u64);
                copyset.execute(command, payload).await
            }
            None => Err(Fault::Unavailable(Unavailable::NotLeader)),
        };
        self.metrics.answered(command.op, result.as_ref().map(drop).map_err(|fault| *fault), start.elapsed());
        match result {
            Ok(Outcome::Done) => (Reply::DONE, None),
            Ok(Outcome::Data(data)) => (Reply::DONE, Some(data)),
            Ok(Outcome::Extents(extents)) => (Reply::DONE, Some(encode_extents(&extents))),
            Err(fault @ Fault::Unavailable(Unavailable::NotLeader)) => {
                let leader_hint = copyset.and_then(|copyset| copyset.leader());
                (Reply { result: Err(fault), leader_hint }, None)
            }
            Err(fault) => {
                if fault == Fault::Corrupt && command.op == ChunkOp::Read {
                    let (copyset, chunk) = (command.copyset, command.chunk);
                    tracing::error!(%copyset, %chunk, "read refused, no replica with sound data was found");
                }
                (Reply::failed(fault), None)
            }
        }
    }
}
