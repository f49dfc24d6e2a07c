//! Gathers a group's proposals into rounds: those that arrive while a round is under way make up the next one.
//!
//! Called by `group`, for every proposal; hands them to `replica`. Who writes one at a time never waits here; who has much
//! in flight shares the cost of a log record, a message to each peer, a commit and a wake-up among the whole round.
//! Must not know what a proposal means.
//!
//! `bounded`: the queue has [`QUEUE`] places; large proposals do not wait for a round.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::{Notify, mpsc};

use crate::command::LogCommand;
use crate::metrics::Metrics;
use crate::replica::Replica;
use crate::types::{Proposed, Proposer};

/// Proposals of one group that wait for a round; the next proposer waits for a place. As many as a copyset has in hand.
const QUEUE: usize = 2048;
/// A round that has gathered so many bytes goes at once: more would save nothing and only hold large writes back.
const ROUND_BYTES: usize = 64 << 10;

/// A command and who waits for its outcome.
pub(crate) struct Proposal {
    pub(crate) command: LogCommand,
    pub(crate) proposer: Proposer<Proposed>,
}

/// The proposals of the rounds under way.
#[derive(Default)]
pub(crate) struct Flight {
    proposals: AtomicUsize,
    landed: Notify,
}

/// One proposal's part in a round: dropped with its outcome.
pub(crate) struct Seat(Arc<Flight>);

impl Seat {
    fn take(flight: &Arc<Flight>) -> Seat {
        flight.proposals.fetch_add(1, Ordering::AcqRel);
        Seat(flight.clone())
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        if self.0.proposals.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.landed.notify_one();
        }
    }
}

impl Flight {
    async fn landed(&self) {
        while self.proposals.load(Ordering::Acquire) > 0 {
            // A landing between the look and the wait has left a permit.
            self.landed.notified().await;
        }
    }
}

/// Starts gathering for `replica`; ends when the sender is dropped.
pub(crate) fn start(replica: Arc<dyn Replica>, metrics: Arc<Metrics>) -> mpsc::Sender<Proposal> {
    let (queue, proposals) = mpsc::channel(QUEUE);
    tokio::spawn(run(replica, metrics, proposals));
    queue
}

async fn run(replica: Arc<dyn Replica>, metrics: Arc<Metrics>, mut queue: mpsc::Receiver<Proposal>) {
    let flight = Arc::<Flight>::default();
    let mut round = Vec::new();
    while gather(&mut round, &mut queue, &flight).await {
        metrics.round_proposals.observe(round.len() as f64);
        for Proposal { command, mut proposer } in round.drain(..) {
            proposer.seat = Some(Seat::take(&flight));
            // A replica that has stopped drops the proposer, which is what its owner hears.
            drop(replica.propose(command, proposer).await);
        }
    }
}

/// The next round into `round`; false if nobody can propose any more.
async fn gather(round: &mut Vec<Proposal>, queue: &mut mpsc::Receiver<Proposal>, flight: &Flight) -> bool {
    if queue.recv_many(round, QUEUE).await == 0 {
        return false;
    }
    // What arrived in the same read of a connection is proposed by tasks that are ready by now.
    tokio::task::yield_now().await;
    while bytes(round) < ROUND_BYTES && round.len() < QUEUE {
        tokio::select! {
            biased;
            more = queue.recv_many(round, QUEUE) => if more == 0 { break },
            () = flight.landed() => break,
        }
    }
    true
}

fn bytes(round: &[Proposal]) -> usize {
    round.iter().map(|proposal| proposal.command.meta.len() + proposal.command.payload.len()).sum()
}
