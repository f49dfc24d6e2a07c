//! Gathers proposals into rounds: what arrives at a host's groups while a round is under way makes up the next one.
//!
//! Called by `group`, for every proposal; hands them to `replica`. Who writes one at a time never waits here. Who has much
//! in flight shares the cost of a round among many: a log record, a message to each peer, a commit and wake-ups per group,
//! a sync and system calls per host. That is why the groups of a host start their rounds together.
//! Must not know what a proposal means.
//!
//! `bounded`: a group's queue has [`QUEUE`] places. Large proposals neither wait nor are waited for, and what is not done
//! after [`ROUND_WAIT`] is left behind: a group without a majority must not stop its neighbours.

use std::iter::Peekable;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::FutureExt;
use tokio::sync::{Notify, mpsc};

use crate::bundle;
use crate::metrics::Metrics;
use crate::places::{Place, Placed};
use crate::replica::Replica;
use crate::types::{Proposed, Proposer};

/// Proposals of one group that wait for a round; the next proposer waits for a place. As many as a copyset has in hand.
const QUEUE: usize = 2048;
/// A round that has gathered so many bytes goes at once: more would save nothing and only hold large writes back.
const ROUND_BYTES: usize = 64 << 10;
/// Longest wait for the round before, to the timer's exactness of a millisecond: a round of healthy groups takes about
/// as long.
const ROUND_WAIT: Duration = Duration::from_millis(1);
/// Turns that the runtime's other tasks have before a round of several goes. Measured: 3 give a tenth more small writes at
/// depth 32, 10 and more none.
const LAST_CALLS: usize = 3;

/// A command and who waits for its outcome.
pub(crate) struct Proposal {
    pub(crate) command: Placed,
    pub(crate) proposer: Proposer<Proposed>,
}

/// The proposals of a host's rounds under way, large ones excepted.
#[derive(Default)]
pub(crate) struct Flight {
    aboard: Mutex<Aboard>,
    landed: Notify,
}

/// What is waited for: the proposals since the last time that somebody gave up waiting.
#[derive(Clone, Copy, Default)]
struct Aboard {
    number: u64,
    proposals: usize,
}

/// One proposal's part in a round: dropped with its outcome.
pub(crate) struct Seat {
    flight: Arc<Flight>,
    number: u64,
}

impl Seat {
    fn take(flight: &Arc<Flight>) -> Seat {
        let mut aboard = flight.aboard();
        aboard.proposals += 1;
        Seat { flight: flight.clone(), number: aboard.number }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut aboard = self.flight.aboard();
        if aboard.number != self.number {
            return;
        }
        aboard.proposals -= 1;
        if aboard.proposals == 0 {
            self.flight.landed.notify_waiters();
        }
    }
}

impl Flight {
    fn aboard(&self) -> MutexGuard<'_, Aboard> {
        // Assignments only run under the lock.
        self.aboard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ready once no proposal is under way, or none was at some moment since the call, or [`ROUND_WAIT`] has passed:
    /// what is under way then is waited for no more, by nobody.
    async fn landed(&self) {
        let mut landed = std::pin::pin!(self.landed.notified());
        // Before the look, so that no landing is missed.
        landed.as_mut().enable();
        let Aboard { number, proposals } = *self.aboard();
        if proposals > 0 && tokio::time::timeout(ROUND_WAIT, landed).await.is_err() {
            let mut aboard = self.aboard();
            if aboard.number == number {
                *aboard = Aboard { number: number + 1, proposals: 0 };
                self.landed.notify_waiters();
            }
        }
    }
}

/// Starts gathering for `replica`; ends when the sender is dropped. `flight` is the host's.
pub(crate) fn start(
    replica: Arc<dyn Replica>,
    flight: Arc<Flight>,
    metrics: Arc<Metrics>,
) -> mpsc::Sender<Proposal> {
    let (queue, proposals) = mpsc::channel(QUEUE);
    tokio::spawn(run(replica, flight, metrics, proposals));
    queue
}

async fn run(
    replica: Arc<dyn Replica>,
    flight: Arc<Flight>,
    metrics: Arc<Metrics>,
    mut queue: mpsc::Receiver<Proposal>,
) {
    let mut round = Vec::new();
    while gather(&mut round, &mut queue, &flight).await {
        metrics.round_proposals.observe(round.len() as f64);
        let mut proposals = round.drain(..).peekable();
        while let Some(first) = proposals.next() {
            let mut proposal = bundled(first, &mut proposals);
            if proposal.command.is_bundle || proposal.command.bytes() <= ROUND_BYTES {
                proposal.proposer.seat = Some(Seat::take(&flight));
            }
            // A replica that has stopped drops the proposer, which is what its owners hear.
            let _ = replica.propose(proposal.command, proposal.proposer).await;
        }
    }
}

/// `first`, and in a bundle with it those of `rest` that follow and are small.
fn bundled(first: Proposal, rest: &mut Peekable<impl Iterator<Item = Proposal>>) -> Proposal {
    let is_small = |proposal: &Proposal| proposal.command.bytes() <= bundle::COMMAND_BYTES_MAX;
    if !is_small(&first) || !rest.peek().is_some_and(is_small) {
        return first;
    }
    let Proposal { command: Placed { command, mut place, .. }, mut proposer } = first;
    let mut bytes = command.bytes();
    let mut commands = vec![command];
    while bytes < bundle::BYTES
        && commands.len() < bundle::COMMANDS_MAX
        && let Some(next) = rest.next_if(is_small)
    {
        bytes += next.command.bytes();
        Place::join(&mut place, next.command.place);
        commands.push(next.command.command);
        proposer.join(next.proposer);
    }
    Proposal { command: Placed { command: bundle::tie(&commands), place, is_bundle: true }, proposer }
}

/// The next round into `round`; false if nobody can propose any more.
async fn gather(round: &mut Vec<Proposal>, queue: &mut mpsc::Receiver<Proposal>, flight: &Flight) -> bool {
    if queue.recv_many(round, QUEUE).await == 0 {
        return false;
    }
    // What arrived in the same read of a connection is proposed by tasks that are ready by now.
    tokio::task::yield_now().await;
    let mut landed = std::pin::pin!(flight.landed());
    while has_room(round) {
        tokio::select! {
            biased;
            more = queue.recv_many(round, QUEUE) => if more == 0 { break },
            () = &mut landed => break,
        }
    }
    if round.len() > 1 {
        last_calls(round, queue).await;
    }
    true
}

/// Adds what whoever was answered by the round before asks next: it is on its way while the runtime has other things to do.
async fn last_calls(round: &mut Vec<Proposal>, queue: &mut mpsc::Receiver<Proposal>) {
    for _ in 0..LAST_CALLS {
        tokio::task::yield_now().await;
        if has_room(round) {
            // What is there; `gather` sees a queue that is closed.
            let _ = queue.recv_many(round, QUEUE).now_or_never();
        }
    }
}

fn has_room(round: &[Proposal]) -> bool {
    let bytes: usize = round.iter().map(|proposal| proposal.command.bytes()).sum();
    round.len() < QUEUE && bytes < ROUND_BYTES
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use tokio::time::Instant;

    use super::*;
    use crate::command::LogCommand;
    use crate::types::proposer;

    fn proposal(bytes: usize) -> Proposal {
        let command = LogCommand { meta: Bytes::new(), payload: Bytes::from(vec![0; bytes]) };
        Proposal { command: Placed::from(command), proposer: proposer().0 }
    }

    #[tokio::test(start_paused = true)]
    async fn what_arrives_during_a_round_makes_up_the_next_one() {
        let (sender, mut queue) = mpsc::channel(QUEUE);
        let flight = Arc::<Flight>::default();
        let mut round = Vec::new();
        let begun = Instant::now();
        sender.send(proposal(4096)).await.expect("there is room");
        assert!(gather(&mut round, &mut queue, &flight).await);
        assert_eq!((round.len(), begun.elapsed()), (1, Duration::ZERO), "nothing is under way: no wait");

        let seats = [Seat::take(&flight), Seat::take(&flight)];
        let mut next = Vec::new();
        {
            let mut gathering = std::pin::pin!(gather(&mut next, &mut queue, &flight));
            for _ in 0..3 {
                sender.send(proposal(4096)).await.expect("there is room");
                assert!(gathering.as_mut().now_or_never().is_none(), "the round before is under way");
            }
            let [first, second] = seats;
            drop(first);
            assert!(gathering.as_mut().now_or_never().is_none(), "half of it is");
            drop(second);
            assert!(gathering.await);
        }
        assert_eq!((next.len(), begun.elapsed()), (3, Duration::ZERO));
        drop(sender);
        assert!(!gather(&mut next, &mut queue, &flight).await);
    }

    #[test]
    fn small_proposals_in_a_row_become_bundles() {
        let sizes = [4096, 512, 1 << 20, 4096, 32 << 10, 16 << 10, 16 << 10, 16 << 10, 16 << 10, 16 << 10, 1];
        let mut round = sizes.map(proposal).into_iter().peekable();
        let mut entries = Vec::new();
        while let Some(first) = round.next() {
            let Proposal { command, proposer } = bundled(first, &mut round);
            let commands = match command.is_bundle {
                true => bundle::untie(&command.command).expect("a bundle"),
                false => vec![command.command],
            };
            assert_eq!(proposer.waiting(), commands.len());
            entries.push(commands.iter().map(|command| command.payload.len()).collect::<Vec<_>>());
        }
        let expected: [&[usize]; 6] =
            [&[4096, 512], &[1 << 20], &[4096], &[32 << 10], &[16 << 10; 4], &[16 << 10, 1]];
        assert_eq!(entries, expected);

        let mut round = (0..bundle::COMMANDS_MAX + 1).map(|_| proposal(1)).peekable();
        let first = round.next().expect("there is one");
        assert_eq!(bundled(first, &mut round).proposer.waiting(), bundle::COMMANDS_MAX);
    }

    #[tokio::test(start_paused = true)]
    async fn large_proposals_and_those_behind_a_stuck_group_do_not_wait_long() {
        let (sender, mut queue) = mpsc::channel(QUEUE);
        let flight = Arc::<Flight>::default();
        let stuck = Seat::take(&flight);
        let (mut round, begun) = (Vec::new(), Instant::now());
        sender.send(proposal(1 << 20)).await.expect("there is room");
        assert!(gather(&mut round, &mut queue, &flight).await);
        assert_eq!((round.len(), begun.elapsed()), (1, Duration::ZERO));
        round.clear();
        sender.send(proposal(4096)).await.expect("there is room");
        assert!(gather(&mut round, &mut queue, &flight).await);
        assert_eq!(round.len(), 1);
        let waited = begun.elapsed();
        assert!(waited <= 2 * ROUND_WAIT, "{waited:?}");

        // It has been left behind: nobody waits for it a second time, nor is anything amiss when it ends.
        round.clear();
        sender.send(proposal(4096)).await.expect("there is room");
        assert!(gather(&mut round, &mut queue, &flight).await);
        assert_eq!((round.len(), begun.elapsed()), (1, waited));
        let seat = Seat::take(&flight);
        drop(stuck);
        assert_eq!(flight.aboard().proposals, 1);
        drop(seat);
        assert_eq!(flight.aboard().proposals, 0);
    }
}
