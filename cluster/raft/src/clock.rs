//! The clock of leases and promises: it goes on while the machine is suspended.
//!
//! Read by everything that decides whether a lease or a promise still holds. std's `Instant` (CLOCK_MONOTONIC) stands still
//! during a suspension, while the peers go on and elect another leader. tokio's timers go by that clock too: they decide
//! when to look again, never what holds.

use std::ops::Add;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// A moment of CLOCK_BOOTTIME (clock_getres(2)): the time since the machine started, suspensions included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Moment(Duration);

impl Moment {
    pub(crate) fn now() -> Moment {
        let now = clock_gettime(ClockId::Boottime);
        // Neither is negative: the clock counts up from zero.
        Moment(Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs() as u32))
    }

    /// Time since then; zero if it lies ahead.
    pub(crate) fn elapsed(self) -> Duration {
        Moment::now().since(self)
    }

    /// Time from `earlier` to this; zero if it is not earlier.
    pub(crate) fn since(self, earlier: Moment) -> Duration {
        self.0.saturating_sub(earlier.0)
    }

    /// As much earlier, but not before the start of the machine.
    pub(crate) fn before(self, duration: Duration) -> Moment {
        Moment(self.0.saturating_sub(duration))
    }
}

impl Add<Duration> for Moment {
    type Output = Moment;

    fn add(self, duration: Duration) -> Moment {
        Moment(self.0.saturating_add(duration))
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    const DAY: Duration = Duration::from_secs(86_400);
    /// Set in the process that runs in the future.
    const IN_THE_FUTURE: &str = "SPLINE_TEST_IN_THE_FUTURE";

    /// After a suspension of a day CLOCK_BOOTTIME is a day ahead of CLOCK_MONOTONIC. A time namespace can be made so.
    #[test]
    fn a_suspension_counts() {
        if std::env::var_os(IN_THE_FUTURE).is_some() {
            println!("moment={}", Moment::now().0.as_secs());
            return;
        }
        let before = Moment::now();
        let mut unshare = Command::new("unshare");
        if !rustix::process::geteuid().is_root() {
            unshare.args(["--user", "--map-root-user"]);
        }
        let me = std::env::current_exe().expect("this program");
        unshare.args(["--time", "--boottime", &DAY.as_secs().to_string()]).arg(me);
        unshare.args(["--exact", "--nocapture", "clock::tests::a_suspension_counts"]);
        let output = unshare.env(IN_THE_FUTURE, "1").output().expect("unshare of util-linux 2.36 or newer");
        let text = String::from_utf8_lossy(&output.stdout);
        let moment = text.split("moment=").nth(1).and_then(|rest| rest.lines().next());
        let moment = moment.unwrap_or_else(|| panic!("it has said its time: {output:?}"));
        let moment = Duration::from_secs(moment.trim().parse().expect("a number"));
        assert!(moment + Duration::from_secs(1) > before.0 + DAY, "{moment:?} after {before:?}");
    }

    #[test]
    fn moments_are_ordered_and_differences_never_negative() {
        let (first, later) = (Moment(Duration::from_secs(5)), Moment(Duration::from_secs(7)));
        assert_eq!((later.since(first), first.since(later)), (Duration::from_secs(2), Duration::ZERO));
        assert_eq!((first + Duration::from_secs(2), later.before(DAY)), (later, Moment(Duration::ZERO)));
        assert!(Moment::now() <= Moment::now() && (Moment::now() + DAY).elapsed().is_zero());
    }
}
