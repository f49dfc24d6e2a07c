//! When a link connects: times are given, the socket is not there.

use super::*;
use spline_link::{InstanceId, Mode, Refusal, VersionRange};

/// One that has not connected.
pub(super) fn link(now: Instant) -> Link {
    let hello = Hello {
        versions: VersionRange::OURS,
        features: 0,
        mode: Mode::Open,
        read_only: false,
        force: false,
        instance: InstanceId(1),
        identity: None,
        volume: "disk0".parse().expect("a name"),
    };
    Link::new("/nowhere/gateway.sock".into(), hello, now)
}

/// Milliseconds between attempts that fail in the same way, for so many of them.
fn waits(count: usize, mut attempt: impl FnMut(&mut Link, Instant) -> LinkDown) -> Vec<u128> {
    let start = Instant::now();
    let mut link = link(start);
    let mut now = start;
    let mut waits = Vec::new();
    for _ in 0..count {
        let why = attempt(&mut link, now);
        assert_eq!(link.fail(&why, 0, now), Next::Retry);
        let next = link.deadline().expect("it is tried again");
        waits.push((next - now).as_millis());
        now = next;
    }
    waits
}

#[test]
fn a_gateway_that_is_started_anew_is_found_at_once_and_one_that_stays_away_is_not_looked_for_all_the_time() {
    let poller = Poller::new().expect("creates");
    let waits = waits(120, |link, now| link.tick(now, &poller, 1).expect_err("nobody is there"));
    let quick = waits.iter().take_while(|wait| **wait == 20).count();
    // One at the beginning, one right after the time is over.
    assert_eq!(quick as u128, RESTART_TIME.as_millis() / 20 + 2);
    assert_eq!(waits[quick..quick + 6], [40, 80, 160, 320, 500, 500]);
}

#[test]
fn a_gateway_that_refuses_is_asked_less_and_less_often() {
    let refused = Refused { refusal: Refusal::Unavailable, text: String::new() };
    let waits = waits(6, |_, _| LinkDown::Refused(refused.clone()));
    assert_eq!(waits, [20, 40, 80, 160, 320, 500]);
}
