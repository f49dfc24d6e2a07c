//! Tests of the policy: one line per outcome.

use super::*;
use rand::SeedableRng;
use spline_types::Invalid;

fn said(fault: Fault, hint: Option<u32>) -> Outcome {
    Ok(Answer { result: Err(fault), leader_hint: hint.map(ChunkserverId::new) })
}

fn unavailable(why: Unavailable) -> Outcome {
    said(Fault::Unavailable(why), None)
}

fn elsewhere(reason: Reason, hint: Option<u32>) -> Step {
    Step::Elsewhere { reason, leader_hint: hint.map(ChunkserverId::new) }
}

#[test]
fn each_outcome_of_a_write_is_judged() {
    let not_leader = said(Fault::Unavailable(Unavailable::NotLeader), Some(7));
    let data = Bytes::from_static(b"x");
    for (outcome, step, abandoned) in [
        (Ok(Answer { result: Ok(data.clone()), leader_hint: None }), Step::Finish(Ok(data)), false),
        (not_leader, elsewhere(Reason::NotLeader, Some(7)), false),
        (unavailable(Unavailable::Overloaded), Step::Later { reason: Reason::Overloaded }, false),
        (unavailable(Unavailable::Unreachable), elsewhere(Reason::Unreachable, None), true),
        (Err(CallError::NotSent("x".into())), elsewhere(Reason::NotSent, None), false),
        (Err(CallError::Lost("x".into())), elsewhere(Reason::Lost, None), true),
        (Err(CallError::Deadline), elsewhere(Reason::Deadline, None), true),
        (said(Fault::Internal, None), Step::Finish(Err(Fault::Internal)), true),
    ] {
        assert_eq!(judge(ChunkOp::Write, outcome.clone()), Judgement { step, abandoned }, "{outcome:?}");
    }
}

#[test]
fn faults_that_no_retry_mends_are_answered_at_once() {
    for fault in [
        Fault::Invalid(Invalid::PastEnd),
        Fault::Unsupported,
        Fault::ReadOnly,
        Fault::NoSpace,
        Fault::Fenced,
        Fault::Corrupt,
    ] {
        let judgement = judge(ChunkOp::Write, said(fault, None));
        assert_eq!(judgement, Judgement { step: Step::Finish(Err(fault)), abandoned: false });
    }
}

#[test]
fn a_late_read_harms_nobody() {
    for op in [ChunkOp::Read, ChunkOp::Status] {
        assert!(!judge(op, Err(CallError::Deadline)).abandoned);
        assert!(!judge(op, Err(CallError::Lost("x".into()))).abandoned);
    }
}

#[test]
fn pauses_double_up_to_the_longest_and_are_drawn() {
    let config = ClientConfig::default();
    let (mut backoff, mut random) = (Backoff::new(&config), rand::rngs::StdRng::seed_from_u64(1));
    let mut step = config.backoff_min;
    for _ in 0..20 {
        let pause = backoff.pause(&mut random);
        assert!(pause >= step / 2 && pause <= step, "{pause:?} of {step:?}");
        step = (step * 2).min(config.backoff_max);
    }
}
