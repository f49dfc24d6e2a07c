//! What happens to a cluster, at random: a sequence of steps without end, which its seed decides.
//!
//! Pure. Called by the test that carries the steps out. A schedule leaves at most one chunkserver away at a time, and not for
//! long: there is always a majority, so that every request is answered in the end.

use crate::workload::Wait;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use spline_harness::Stalls;
use std::fmt;
use std::time::{Duration, Instant};

/// Chunkservers of the cluster.
const CHUNKSERVERS: usize = 3;
/// Steps after which a chunkserver that was killed is back at the latest.
const AWAY_STEPS_MAX: usize = 4;
/// Most answers that are waited for between two steps.
const ANSWERS_MAX: u64 = 120;
/// Longest of the usual freezes, milliseconds: some requests are under way all the time.
const FREEZE_MS_MAX: u64 = 1500;
/// One that is longer than the lease of a session (10 s).
const LONG_FREEZE: Duration = Duration::from_secs(12);

/// One thing that happens.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// The gateway is upgraded.
    Upgrade,
    /// The gateway is killed and started again.
    KillGateway,
    /// The gateway is told to end, and started again.
    StopGateway,
    /// The gateway is stopped in its tracks for so long.
    FreezeGateway(Duration),
    /// The same, but then it is killed and started again, as a watchdog does.
    KillFrozenGateway(Duration),
    /// Every connection between nebds and the gateway is cut.
    CutLinks,
    /// The metadata server is killed and started again.
    KillMetadataServer,
    /// A chunkserver is killed.
    KillChunkserver(usize),
    /// The one that was killed is started again.
    StartChunkserver(usize),
}

impl Step {
    /// What kind of step it is, for a table.
    pub const fn kind(self) -> &'static str {
        match self {
            Self::Upgrade => "gateway upgraded",
            Self::KillGateway => "gateway killed",
            Self::StopGateway => "gateway stopped and started",
            Self::FreezeGateway(_) => "gateway frozen",
            Self::KillFrozenGateway(_) => "gateway frozen and killed",
            Self::CutLinks => "links cut",
            Self::KillMetadataServer => "metadata server killed",
            Self::KillChunkserver(_) => "chunkserver killed",
            Self::StartChunkserver(_) => "chunkserver started",
        }
    }
}

/// A step, and when it happens.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Planned {
    /// So many requests of each client are answered first; 0: right after the step before.
    pub answers: u64,
    /// What happens then.
    pub step: Step,
}

impl fmt::Display for Planned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "after {} answers: {:?}", self.answers, self.step)
    }
}

/// What each step has cost: the longest wait of a client that passed, for its most part, between this step and the next. Of two
/// steps at once the second one has what both have cost.
#[derive(Debug, Default)]
pub struct Costs(Vec<(Instant, Step, Duration)>);

impl Costs {
    /// A step begins.
    pub fn begin(&mut self, at: Instant, step: Step) {
        self.0.push((at, step, Duration::ZERO));
    }

    /// A client has waited.
    pub fn add(&mut self, wait: Wait) {
        let mut next = wait.since + wait.time;
        let mut most = (Duration::ZERO, None);
        for (at, _, cost) in self.0.iter_mut().rev() {
            let shared = next.saturating_duration_since(wait.since.max(*at));
            if shared > most.0 {
                most = (shared, Some(cost));
            }
            next = next.min(*at);
            if *at <= wait.since {
                break;
            }
        }
        if let Some(cost) = most.1 {
            *cost = wait.time.max(*cost);
        }
    }

    /// By kind of step.
    pub fn stalls(&self) -> Stalls {
        let mut stalls = Stalls::default();
        for (_, step, longest) in &self.0 {
            stalls.add(step.kind(), *longest);
        }
        stalls
    }
}

/// The steps of a seed.
#[derive(Debug)]
pub struct Schedule {
    random: StdRng,
    /// The chunkserver that is away, and for how many more steps it may be.
    away: Option<(usize, usize)>,
}

impl Schedule {
    /// The schedule of `seed`: always the same one.
    pub fn new(seed: u64) -> Self {
        Self { random: StdRng::seed_from_u64(seed), away: None }
    }

    fn step(&mut self) -> Step {
        match &mut self.away {
            Some((number, 0)) => return Step::StartChunkserver(*number),
            Some((_, left)) => *left -= 1,
            None => {}
        }
        match self.random.random_range(0..12) {
            0..=2 => Step::Upgrade,
            3..=4 => Step::KillGateway,
            5 => Step::StopGateway,
            6 => Step::FreezeGateway(self.freeze()),
            7 => Step::KillFrozenGateway(self.freeze()),
            8 => Step::CutLinks,
            9 => Step::KillMetadataServer,
            _ => match self.away {
                Some((number, _)) => Step::StartChunkserver(number),
                None => Step::KillChunkserver(self.random.random_range(0..CHUNKSERVERS)),
            },
        }
    }

    fn freeze(&mut self) -> Duration {
        if self.random.random_range(0..16) == 0 {
            return LONG_FREEZE;
        }
        Duration::from_millis(self.random.random_range(10..=FREEZE_MS_MAX))
    }
}

impl Iterator for Schedule {
    type Item = Planned;

    fn next(&mut self) -> Option<Planned> {
        let at_once = self.random.random_range(0..4) == 0;
        let answers = if at_once { 0 } else { self.random.random_range(1..=ANSWERS_MAX) };
        let step = self.step();
        match step {
            Step::KillChunkserver(number) => self.away = Some((number, AWAY_STEPS_MAX)),
            Step::StartChunkserver(_) => self.away = None,
            _ => {}
        }
        Some(Planned { answers, step })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    const STEPS: usize = 300;

    #[test]
    fn a_wait_counts_for_the_step_in_whose_time_most_of_it_passed() {
        let start = Instant::now();
        let at = |second| start + Duration::from_secs(second);
        let mut costs = Costs::default();
        let wait = |from, to| Wait { since: at(from), time: at(to) - at(from) };
        costs.begin(at(1), Step::Upgrade);
        costs.add(wait(0, 3));
        costs.begin(at(5), Step::FreezeGateway(LONG_FREEZE));
        costs.begin(at(17), Step::CutLinks);
        costs.add(wait(4, 18));
        costs.add(wait(16, 19));
        costs.add(wait(16, 17));
        let longest: Vec<_> = costs.0.iter().map(|(_, _, longest)| longest.as_secs()).collect();
        assert_eq!(longest, [3, 14, 3]);
    }

    proptest! {
        #[test]
        fn equal_seeds_give_equal_schedules(seed: u64) {
            let steps = || Schedule::new(seed).take(STEPS).collect::<Vec<_>>();
            prop_assert_eq!(steps(), steps());
            prop_assert_ne!(steps(), Schedule::new(seed ^ 1).take(STEPS).collect::<Vec<_>>());
        }

        #[test]
        fn at_most_one_chunkserver_is_away_and_not_for_long(seed: u64) {
            let mut away = None;
            for (at, Planned { step, .. }) in Schedule::new(seed).take(STEPS).enumerate() {
                match step {
                    Step::KillChunkserver(number) => {
                        prop_assert!(number < CHUNKSERVERS);
                        prop_assert_eq!(away.replace((number, at)), None);
                    }
                    Step::StartChunkserver(number) => {
                        let (killed, since) = away.take().expect("one that is away");
                        prop_assert_eq!(killed, number);
                        prop_assert!(at - since <= AWAY_STEPS_MAX + 1);
                    }
                    _ => {}
                }
            }
        }

        #[test]
        fn everything_happens_in_the_end(seed: u64) {
            let kinds: HashSet<_> = Schedule::new(seed).take(STEPS).map(|planned| planned.step.kind()).collect();
            prop_assert_eq!(kinds.len(), 9);
        }
    }
}
