//! One session's data path: drives each span from attempt to attempt until there is a definite answer. Called by the
//! gateway's cluster engine. Must never know how a guest's request was split.
//!
//! A span ends in one of four ways: an answer, a fault that no retry mends, the policy's time (`fail-after`), or the
//! end of the session.

use crate::attempt::Attempts;
use crate::client::{ClientConfig, ClusterClient};
use crate::meta::OpenedSession;
use crate::metrics::Metrics;
use crate::retry::{Answer, Backoff, Step, judge};
use crate::route::Routes;
use crate::transport::{Network, Transport};
use bytes::Bytes;
use spline_types::{
    ChunkCommand, ChunkId, ChunkOp, ChunkRange, ChunkserverId, CopysetId, Epoch, Extent, Fault,
    OnUnavailable, SegmentIndex, Seq, Unavailable, VolumeId,
};
use spline_wire::chunk::decode_extents;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::Instant;

/// A span that waits this long is worth a line in the log.
const SLOW: Duration = Duration::from_secs(5);

/// The part of one request that lies in one chunk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Span {
    /// The copyset that holds the chunk.
    pub copyset: CopysetId,
    /// The chunk.
    pub chunk: ChunkId,
    /// What to do.
    pub op: ChunkOp,
    /// Where, in bytes of the chunk.
    pub range: ChunkRange,
}

/// What a span is answered with.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SpanAnswer {
    /// Written, zeroed or discarded; durable.
    Written,
    /// The bytes read, as many as the range has.
    Data(Bytes),
    /// Allocation state of the range, from its start.
    Extents(Vec<Extent>),
}

/// The data path of one session; clones share it.
#[derive(Clone)]
pub struct VolumeClient {
    cluster: ClusterClient,
    volume: VolumeId,
    epoch: Epoch,
    session: Arc<Session<Transport>>,
}

impl std::fmt::Debug for VolumeClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (volume, epoch) = (self.volume, self.epoch);
        f.debug_struct("VolumeClient").field("volume", &volume).field("epoch", &epoch).finish_non_exhaustive()
    }
}

impl VolumeClient {
    pub(crate) fn new(
        opened: &OpenedSession,
        cluster: ClusterClient,
        config: Arc<ClientConfig>,
        network: Arc<Transport>,
        routes: Arc<Routes>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let session = Session {
            config,
            network,
            routes,
            metrics,
            attempts: Attempts::new(opened.epoch),
            policy: opened.on_unavailable,
            fence: Fence::default(),
        };
        Self { cluster, volume: opened.volume, epoch: opened.epoch, session: Arc::new(session) }
    }

    /// Carries out one span. `payload` is the data of a write, as long as the range, in any number of parts; else
    /// empty. Waits as long as the volume's policy says while the cluster can not serve it.
    ///
    /// # Errors
    /// `Fenced` once the session is lost; `Unavailable` past the policy's time; any other fault as the copyset gave
    /// it. After an error a write may have been carried out, wholly or not.
    pub async fn execute(&self, span: Span, payload: Vec<Bytes>) -> Result<SpanAnswer, Fault> {
        self.session.execute(span, payload).await
    }

    /// Allocates a segment; waits by the volume's policy while no metadata server answers.
    ///
    /// # Errors
    /// As [`VolumeClient::execute`]; `NoSpace` if the cluster is full.
    pub async fn allocate_segment(&self, index: SegmentIndex) -> Result<Arc<[CopysetId]>, Fault> {
        let session = &self.session;
        let give_up_at = session.give_up_at(Instant::now());
        let mut backoff = Backoff::new(&session.config);
        loop {
            let asked = session
                .fence
                .or_fenced(self.cluster.allocate_segment(self.volume, self.epoch, index))
                .await?;
            let error = match asked {
                Ok(copysets) => return Ok(copysets),
                Err(error) => error,
            };
            let fault = error.fault();
            if fault == Fault::Fenced {
                self.fence();
            }
            if !matches!(fault, Fault::Unavailable(_)) || passed(give_up_at) {
                tracing::warn!(%error, volume = %self.volume, segment = %index, "can not allocate a segment");
                return Err(fault);
            }
            tracing::debug!(%error, volume = %self.volume, segment = %index, "segment waits for the metadata server");
            let pause = backoff.pause(&mut rand::rng());
            session.fence.or_fenced(tokio::time::sleep_until(until(pause, give_up_at))).await?;
        }
    }

    /// The session is lost: every span that waits fails with `Fenced`, and so do all later ones.
    pub fn fence(&self) {
        self.session.fence.shut();
    }

    /// Whether the session is lost.
    pub fn is_fenced(&self) -> bool {
        self.session.fence.is_shut()
    }

    /// Waits until the session is lost.
    pub async fn fenced(&self) {
        self.session.fence.shut_down().await;
    }
}

/// What the spans of one session share.
pub(crate) struct Session<N> {
    pub(crate) config: Arc<ClientConfig>,
    pub(crate) network: Arc<N>,
    pub(crate) routes: Arc<Routes>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) attempts: Attempts,
    pub(crate) policy: OnUnavailable,
    pub(crate) fence: Fence,
}

/// How far one span has come.
struct Progress {
    /// Highest seq given up without a definite answer.
    abandoned: Option<Seq>,
    /// Replicas asked since the last pause.
    asked: Vec<ChunkserverId>,
    backoff: Backoff,
    started: Instant,
    /// When the policy has it fail.
    give_up_at: Option<Instant>,
    told: bool,
}

impl<N: Network> Session<N> {
    pub(crate) async fn execute(&self, span: Span, payload: Vec<Bytes>) -> Result<SpanAnswer, Fault> {
        let started = Instant::now();
        let inflight = self.metrics.enter();
        let result = match self.fence.or_fenced(self.drive(span, payload, started)).await {
            Ok(Ok(data)) => answer_of(&span, data),
            Ok(Err(fault)) => Err(fault),
            Err(fenced) => Err(fenced),
        };
        if result == Err(Fault::Fenced) {
            self.fence.shut();
        }
        drop(inflight);
        self.metrics.answered(span.op, started.elapsed(), result.as_ref().err().copied());
        result
    }

    fn give_up_at(&self, started: Instant) -> Option<Instant> {
        match self.policy {
            OnUnavailable::Wait => None,
            OnUnavailable::FailAfter(limit) => Some(started + limit),
        }
    }

    async fn drive(&self, span: Span, payload: Vec<Bytes>, started: Instant) -> Result<Bytes, Fault> {
        let mut progress = Progress {
            abandoned: None,
            asked: Vec::new(),
            backoff: Backoff::new(&self.config),
            started,
            give_up_at: self.give_up_at(started),
            told: false,
        };
        let result = loop {
            // Rule 1 of no_late_duplicate.
            self.settled(&span, &progress).await;
            if passed(progress.give_up_at) {
                break Err(Fault::Unavailable(Unavailable::Unreachable));
            }
            let Some((server, address)) = self.routes.target(span.copyset, &progress.asked) else {
                self.routes.ask(&self.network, span.copyset);
                self.pause(&span, &mut progress).await;
                continue;
            };
            match self.attempt(&span, &payload, server, address, &mut progress).await {
                Step::Finish(result) => break result,
                Step::Elsewhere { reason, leader_hint } => {
                    self.metrics.retried(reason);
                    progress.asked.push(server);
                    self.routes.doubt(span.copyset, server);
                    if let Some(leader) = leader_hint.filter(|&leader| leader != server) {
                        self.routes.believe(span.copyset, leader);
                    }
                    tracing::debug!(chunk = %span.chunk, copyset = %span.copyset, chunkserver = %server,
                        reason = reason.name(), "span tries another replica");
                }
                Step::Later { reason } => {
                    self.metrics.retried(reason);
                    self.pause(&span, &mut progress).await;
                }
            }
        };
        // Rule 2 of no_late_duplicate.
        self.settled(&span, &progress).await;
        result
    }

    /// One attempt: sent, waited for, judged.
    async fn attempt(
        &self,
        span: &Span,
        payload: &[Bytes],
        server: ChunkserverId,
        address: SocketAddr,
        progress: &mut Progress,
    ) -> Step {
        let attempt = self.attempts.begin(span.copyset);
        let &Span { copyset, chunk, op, range } = span;
        let command = ChunkCommand { copyset, chunk, op, range, fence: attempt.fence };
        let deadline = until(self.config.attempt_timeout, progress.give_up_at);
        let outcome = self.network.attempt(address, &command, payload.to_vec(), deadline).await;
        if let Ok(Answer { result: Ok(_), .. }) = outcome {
            self.routes.believe(copyset, server);
        }
        let judgement = judge(op, outcome);
        if judgement.abandoned {
            self.metrics.abandoned.inc();
            progress.abandoned = Some(attempt.fence.seq);
        }
        judgement.step
    }

    async fn settled(&self, span: &Span, progress: &Progress) {
        if let Some(seq) = progress.abandoned {
            self.attempts.settled(span.copyset, seq).await;
        }
    }

    /// Pauses; then all replicas may be asked again.
    async fn pause(&self, span: &Span, progress: &mut Progress) {
        let waited = progress.started.elapsed();
        if waited > SLOW && !std::mem::replace(&mut progress.told, true) {
            tracing::warn!(chunk = %span.chunk, copyset = %span.copyset, op = span.op.name(), ?waited,
                asked = ?progress.asked, "span waits for its copyset; see whether its chunkservers run");
        }
        let pause = until(progress.backoff.pause(&mut rand::rng()), progress.give_up_at);
        let pause = pause.saturating_duration_since(Instant::now());
        if self.routes.target(span.copyset, &[]).is_none() {
            self.routes.learned_within(pause).await;
        } else {
            tokio::time::sleep(pause).await;
        }
        progress.asked.clear();
    }
}

fn passed(limit: Option<Instant>) -> bool {
    limit.is_some_and(|limit| Instant::now() >= limit)
}

/// `after` from now, but not past the limit.
fn until(after: Duration, limit: Option<Instant>) -> Instant {
    let at = Instant::now() + after;
    limit.map_or(at, |limit| limit.min(at))
}

/// Checks that a reply carries what was asked for.
fn answer_of(span: &Span, data: Bytes) -> Result<SpanAnswer, Fault> {
    let fits = |fine: bool, what: &str| {
        if !fine {
            tracing::error!(chunk = %span.chunk, range = ?span.range, bytes = data.len(), "chunkserver answered nonsense: {what}");
        }
        if fine { Ok(()) } else { Err(Fault::Internal) }
    };
    match span.op {
        ChunkOp::Write | ChunkOp::WriteZeroes | ChunkOp::Discard => Ok(SpanAnswer::Written),
        ChunkOp::Read | ChunkOp::Peek => {
            fits(data.len() == span.range.length() as usize, "wrong number of bytes")?;
            Ok(SpanAnswer::Data(data))
        }
        ChunkOp::Status => {
            let extents = decode_extents(&data).unwrap_or_default();
            let total: u64 = extents.iter().map(|extent| extent.length).sum();
            fits(total == u64::from(span.range.length()), "extents do not cover the range")?;
            Ok(SpanAnswer::Extents(extents))
        }
    }
}

/// The end of a session, once and for all.
#[derive(Debug, Default)]
pub(crate) struct Fence {
    shut: AtomicBool,
    change: Notify,
}

impl Fence {
    pub(crate) fn shut(&self) {
        self.shut.store(true, Ordering::SeqCst);
        self.change.notify_waiters();
    }

    fn is_shut(&self) -> bool {
        self.shut.load(Ordering::SeqCst)
    }

    async fn shut_down(&self) {
        // Made before the look, so that no change is missed.
        let change = self.change.notified();
        if !self.is_shut() {
            change.await;
        }
    }

    /// What `work` answers, or `Fenced` when the session ends first.
    async fn or_fenced<T>(&self, work: impl Future<Output = T>) -> Result<T, Fault> {
        tokio::select! {
            biased;
            () = self.shut_down() => Err(Fault::Fenced),
            done = work => Ok(done),
        }
    }
}

#[cfg(test)]
mod tests;
