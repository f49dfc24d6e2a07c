//! The retry policy: what the outcome of an attempt proves, and what to do next. Pure; called by `volume`. Must never
//! know sockets or clocks.

use crate::client::ClientConfig;
use bytes::Bytes;
use rand::RngExt;
use spline_types::{ChunkOp, ChunkserverId, Fault, Unavailable};
use spline_wire::CallError;
use std::time::Duration;

/// What came of an attempt: an answer of the chunkserver, or none.
pub(crate) type Outcome = Result<Answer, CallError>;

/// A chunkserver's answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Answer {
    /// The reply's payload, or why there is none.
    pub(crate) result: Result<Bytes, Fault>,
    /// Who leads, as far as the replica knows.
    pub(crate) leader_hint: Option<ChunkserverId>,
}

/// Why an attempt is made again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Reason {
    NotLeader,
    Overloaded,
    Unreachable,
    NotSent,
    Lost,
    Deadline,
}

impl Reason {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::NotLeader => "not_leader",
            Self::Overloaded => "overloaded",
            Self::Unreachable => "no_majority",
            Self::NotSent => "not_sent",
            Self::Lost => "connection_lost",
            Self::Deadline => "deadline",
        }
    }
}

/// What to do next.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Step {
    /// It is answered.
    Finish(Result<Bytes, Fault>),
    /// Ask the replica that is said to lead, or else one that was not asked yet; pause when all were.
    Elsewhere { reason: Reason, leader_hint: Option<ChunkserverId> },
    /// Pause, then ask the same replica.
    Later { reason: Reason },
}

/// What an outcome means.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Judgement {
    pub(crate) step: Step,
    /// It may have been carried out, or still be: the request must not be answered while a later command could be
    /// overtaken by it (`no_late_duplicate`).
    pub(crate) abandoned: bool,
}

/// Judges the outcome of an attempt.
pub(crate) fn judge(op: ChunkOp, outcome: Outcome) -> Judgement {
    let elsewhere = |reason| Step::Elsewhere { reason, leader_hint: None };
    // A read that comes late harms nobody.
    let unless_read = op.modifies();
    let (step, abandoned) = match outcome {
        Ok(Answer { result: Err(Fault::Unavailable(why)), leader_hint }) => match why {
            Unavailable::NotLeader => (Step::Elsewhere { reason: Reason::NotLeader, leader_hint }, false),
            Unavailable::Overloaded => (Step::Later { reason: Reason::Overloaded }, false),
            // It was logged, and may still get its majority.
            Unavailable::Unreachable => (elsewhere(Reason::Unreachable), unless_read),
        },
        // What went wrong there is not known, so neither is how far it got.
        Ok(Answer { result: Err(Fault::Internal), .. }) => (Step::Finish(Err(Fault::Internal)), unless_read),
        Ok(Answer { result, .. }) => (Step::Finish(result), false),
        Err(CallError::NotSent(_)) => (elsewhere(Reason::NotSent), false),
        Err(CallError::Lost(_)) => (elsewhere(Reason::Lost), unless_read),
        Err(CallError::Deadline) => (elsewhere(Reason::Deadline), unless_read),
    };
    Judgement { step, abandoned }
}

/// Growing pauses with jitter: half of the step is fixed, half is drawn, so that waiters do not come back as one.
#[derive(Debug)]
pub(crate) struct Backoff {
    step: Duration,
    max: Duration,
}

impl Backoff {
    pub(crate) fn new(config: &ClientConfig) -> Self {
        Self { step: config.backoff_min, max: config.backoff_max }
    }

    /// The next pause, at most the configured longest.
    pub(crate) fn pause(&mut self, random: &mut impl rand::Rng) -> Duration {
        let step = self.step.min(self.max);
        self.step = (step * 2).min(self.max);
        step.mul_f64(random.random_range(0.5..=1.0))
    }
}

#[cfg(test)]
mod tests;
