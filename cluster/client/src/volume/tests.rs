//! Tests of the drive loop over a scripted network and paused time.

use super::*;
use crate::meta::{MetaError, RouteUpdate};
use crate::retry::Outcome;
use spline_types::FenceTag;
use spline_wire::CallError;
use std::collections::HashMap;
use std::sync::Mutex;

const SET: CopysetId = CopysetId::new(1);

/// What a chunkserver does with an attempt.
#[derive(Clone, Copy, Debug)]
enum Does {
    Serves,
    /// Takes it and never answers.
    Stalls,
    Says(Fault, Option<u32>),
    Loses,
    Refuses,
}

/// Three chunkservers, 1 to 3, whose behaviour the test changes; logs every attempt.
#[derive(Default)]
struct Scripted {
    does: Mutex<HashMap<u32, Does>>,
    /// Overrides `does` for the first attempts, in order.
    first: Mutex<Vec<Does>>,
    seen: Mutex<Vec<(u32, FenceTag)>>,
    mds_is_down: AtomicBool,
}

impl Network for Scripted {
    async fn attempt(
        &self,
        to: SocketAddr,
        command: &ChunkCommand,
        _: Vec<Bytes>,
        deadline: Instant,
    ) -> Outcome {
        let server = u32::from(to.port());
        self.seen.lock().expect("whole").push((server, command.fence));
        let first = {
            let mut first = self.first.lock().expect("whole");
            (!first.is_empty()).then(|| first.remove(0))
        };
        let does = first.unwrap_or_else(|| self.does.lock().expect("whole")[&server]);
        match does {
            Does::Serves => Ok(Answer { result: Ok(Bytes::new()), leader_hint: None }),
            Does::Stalls => {
                tokio::time::sleep_until(deadline).await;
                Err(CallError::Deadline)
            }
            Does::Says(fault, hint) => {
                Ok(Answer { result: Err(fault), leader_hint: hint.map(ChunkserverId::new) })
            }
            Does::Loses => Err(CallError::Lost("reset".into())),
            Does::Refuses => Err(CallError::NotSent("refused".into())),
        }
    }

    async fn routes(&self, copysets: &[CopysetId]) -> Result<RouteUpdate, MetaError> {
        if self.mds_is_down.load(Ordering::SeqCst) {
            return Err(MetaError::Unreachable { tried: "scripted".into() });
        }
        let ids = || (1..=3).map(ChunkserverId::new);
        let address = |id: ChunkserverId| (id, SocketAddr::from(([127, 0, 0, 1], id.get() as u16)));
        let route = |&copyset: &CopysetId| (copyset, (ids().collect(), Some(ChunkserverId::new(1))));
        Ok(RouteUpdate {
            addresses: ids().map(address).collect(),
            copysets: copysets.iter().map(route).collect(),
        })
    }
}

const NOT_LEADER: Fault = Fault::Unavailable(Unavailable::NotLeader);

fn session(policy: OnUnavailable, does: [Does; 3]) -> Arc<Session<Scripted>> {
    let network = Scripted { does: Mutex::new((1..).zip(does).collect()), ..Scripted::default() };
    Arc::new(Session {
        config: Arc::default(),
        network: Arc::new(network),
        routes: Arc::default(),
        metrics: Arc::new(Metrics::register(&mut prometheus_client::registry::Registry::default())),
        attempts: Attempts::new(Epoch::new(4)),
        policy,
        fence: Fence::default(),
    })
}

fn span(op: ChunkOp) -> Span {
    let chunk = ChunkId { volume: VolumeId::new(1), index: spline_types::ChunkIndex::new(0) };
    Span { copyset: SET, chunk, op, range: ChunkRange::new(0, 4096).expect("inside") }
}

async fn write(session: &Session<Scripted>) -> Result<SpanAnswer, Fault> {
    session.execute(span(ChunkOp::Write), vec![Bytes::from_static(&[7; 4096])]).await
}

impl Session<Scripted> {
    fn script(&self, server: u32, does: Does) {
        self.network.does.lock().expect("whole").insert(server, does);
    }

    fn seen(&self) -> Vec<(u32, FenceTag)> {
        self.network.seen.lock().expect("whole").clone()
    }

    fn servers(&self) -> Vec<u32> {
        self.seen().iter().map(|&(server, _)| server).collect()
    }
}

/// Lets spawned work run until it waits.
async fn settle() {
    tokio::time::sleep(Duration::from_millis(1)).await;
}

#[tokio::test(start_paused = true)]
async fn hints_lead_to_the_leader_and_it_is_remembered() {
    let knows = Does::Says(NOT_LEADER, Some(3));
    let session = session(OnUnavailable::Wait, [knows, knows, Does::Serves]);
    assert_eq!(write(&session).await, Ok(SpanAnswer::Written));
    assert_eq!(write(&session).await, Ok(SpanAnswer::Written));
    assert_eq!(session.servers(), [1, 3, 3]);
}

#[tokio::test(start_paused = true)]
async fn a_stalled_leader_is_left_after_its_deadline_and_its_attempt_is_dead_before_the_next() {
    let session = session(OnUnavailable::Wait, [Does::Stalls, Does::Serves, Does::Serves]);
    let started = Instant::now();
    assert_eq!(write(&session).await, Ok(SpanAnswer::Written));
    let took = started.elapsed();
    assert!(took >= session.config.attempt_timeout && took < session.config.attempt_timeout * 2, "{took:?}");
    let seen = session.seen();
    assert_eq!(session.servers(), [1, 2]);
    assert!(seen[1].1.floor > seen[0].1.seq, "the retry kills the abandoned attempt: {seen:?}");
}

#[tokio::test(start_paused = true)]
async fn an_election_is_waited_out() {
    let nobody = Does::Says(NOT_LEADER, None);
    let session = session(OnUnavailable::Wait, [nobody, nobody, Does::Refuses]);
    let writing = tokio::spawn({
        let session = session.clone();
        async move { write(&session).await }
    });
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(!writing.is_finished());
    let attempts = session.seen().len();
    assert!(attempts < 60 * 3 * 3, "pauses keep it from spinning: attempts={attempts}");
    session.script(2, Does::Serves);
    assert_eq!(writing.await.expect("no panic"), Ok(SpanAnswer::Written));
}

#[tokio::test(start_paused = true)]
async fn known_copysets_are_served_without_the_metadata_server() {
    let session = session(OnUnavailable::Wait, [Does::Serves, Does::Serves, Does::Serves]);
    assert_eq!(write(&session).await, Ok(SpanAnswer::Written));
    session.network.mds_is_down.store(true, Ordering::SeqCst);
    session.script(1, Does::Refuses);
    let started = Instant::now();
    assert_eq!(write(&session).await, Ok(SpanAnswer::Written));
    assert_eq!(started.elapsed(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn fail_after_fails_past_its_time_and_not_before() {
    let limit = Duration::from_secs(7);
    let session = session(OnUnavailable::FailAfter(limit), [Does::Refuses, Does::Stalls, Does::Loses]);
    let started = Instant::now();
    assert_eq!(write(&session).await, Err(Fault::Unavailable(Unavailable::Unreachable)));
    let took = started.elapsed();
    assert!(took >= limit && took < limit + Duration::from_millis(10), "{took:?}");
    // Whatever comes next kills what was abandoned.
    let highest = session.seen().last().expect("some").1.seq;
    assert!(session.attempts.begin(SET).fence.floor > highest);
}

#[tokio::test(start_paused = true)]
async fn a_fault_that_no_retry_mends_is_answered_at_once() {
    let session =
        session(OnUnavailable::Wait, [Does::Says(Fault::NoSpace, None), Does::Serves, Does::Serves]);
    assert_eq!(write(&session).await, Err(Fault::NoSpace));
    assert_eq!(session.seen().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_fenced_session_fails_those_that_wait_and_those_that_come() {
    let session = session(OnUnavailable::Wait, [Does::Refuses, Does::Refuses, Does::Refuses]);
    let waiting = tokio::spawn({
        let session = session.clone();
        async move { write(&session).await }
    });
    settle().await;
    assert!(!waiting.is_finished());
    session.fence.shut();
    assert_eq!(waiting.await.expect("no panic"), Err(Fault::Fenced));
    assert_eq!(write(&session).await, Err(Fault::Fenced));
}

#[tokio::test(start_paused = true)]
async fn one_refusal_by_a_newer_epoch_ends_the_session() {
    let session = session(OnUnavailable::Wait, [Does::Stalls, Does::Stalls, Does::Stalls]);
    let waiting = tokio::spawn({
        let session = session.clone();
        async move { write(&session).await }
    });
    settle().await;
    session.script(1, Does::Says(Fault::Fenced, None));
    assert_eq!(write(&session).await, Err(Fault::Fenced));
    assert_eq!(waiting.await.expect("no panic"), Err(Fault::Fenced));
    session.fence.shut_down().await;
}

/// no_late_duplicate: an older write that is still running holds the floor down, so the retry of an abandoned one waits
/// for it; otherwise the abandoned one could land after the retry and after whatever was written beside it.
#[tokio::test(start_paused = true)]
async fn a_retry_waits_until_the_floor_has_passed_what_was_abandoned() {
    let session = session(OnUnavailable::Wait, [Does::Serves, Does::Serves, Does::Serves]);
    assert_eq!(write(&session).await, Ok(SpanAnswer::Written));
    let older = session.attempts.begin(SET);
    session.network.first.lock().expect("whole").push(Does::Loses);
    let writing = tokio::spawn({
        let session = session.clone();
        async move { write(&session).await }
    });
    settle().await;
    assert_eq!(session.seen().len(), 2, "lost, and not yet tried again");
    // Others go on meanwhile.
    assert_eq!(write(&session).await, Ok(SpanAnswer::Written));
    assert!(!writing.is_finished());
    drop(older);
    assert_eq!(writing.await.expect("no panic"), Ok(SpanAnswer::Written));
    let seen = session.seen();
    let (abandoned, retry) = (seen[1].1, seen[3].1);
    assert!(retry.floor > abandoned.seq, "{seen:?}");
}

#[tokio::test(start_paused = true)]
async fn a_read_does_not_wait_for_older_attempts() {
    let session = session(OnUnavailable::Wait, [Does::Serves, Does::Serves, Does::Serves]);
    let _older = session.attempts.begin(SET);
    session.network.first.lock().expect("whole").push(Does::Loses);
    let read = session
        .execute(Span { range: ChunkRange::new(0, 0).expect("inside"), ..span(ChunkOp::Read) }, Vec::new());
    assert_eq!(read.await, Ok(SpanAnswer::Data(Bytes::new())));
}

#[tokio::test(start_paused = true)]
async fn a_reply_of_the_wrong_length_is_not_taken_for_data() {
    let session = session(OnUnavailable::Wait, [Does::Serves, Does::Serves, Does::Serves]);
    assert_eq!(session.execute(span(ChunkOp::Read), Vec::new()).await, Err(Fault::Internal));
    assert_eq!(session.execute(span(ChunkOp::Status), Vec::new()).await, Err(Fault::Internal));
}

/// no_late_duplicate: a fault after which the write may still land is told only when the next write would kill it.
#[tokio::test(start_paused = true)]
async fn a_fault_of_unknown_effect_is_answered_only_when_the_floor_has_passed_it() {
    let session =
        session(OnUnavailable::Wait, [Does::Says(Fault::Internal, None), Does::Serves, Does::Serves]);
    let older = session.attempts.begin(SET);
    let writing = tokio::spawn({
        let session = session.clone();
        async move { write(&session).await }
    });
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(session.seen().len(), 1);
    assert!(!writing.is_finished());
    drop(older);
    assert_eq!(writing.await.expect("no panic"), Err(Fault::Internal));
}
