//! systemd's watchdog: a process that does not say often enough that it gets on is killed and started again (WatchdogSec=).
//!
//! Called by whoever knows what getting on means, first by [`crate::ready`]. No thread and no timer of its own: the caller feeds, and only while work is
//! done. Must not know: what work.

use sd_notify::NotifyState;
use std::time::Duration;

/// Feedings within the time that systemd waits: one may be late.
const FEEDINGS: u32 = 3;

/// A watchdog that waits to be fed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Watchdog {
    limit: Duration,
}

impl Watchdog {
    /// The watchdog that systemd keeps for this service (`WATCHDOG_USEC`), if it does. `WATCHDOG_PID` is not looked at: a
    /// process that takes over from the one that systemd has started is watched in its place, and systemd itself ignores
    /// whoever is not the service's main process.
    pub fn of_environment() -> Option<Self> {
        Self::parse(&std::env::var("WATCHDOG_USEC").ok()?)
    }

    pub(crate) fn parse(microseconds: &str) -> Option<Self> {
        let limit = Duration::from_micros(microseconds.parse().ok()?);
        (!limit.is_zero()).then_some(Self { limit })
    }

    /// How long systemd waits before it kills.
    pub const fn limit(&self) -> Duration {
        self.limit
    }

    /// How often to feed it.
    pub fn period(&self) -> Duration {
        self.limit / FEEDINGS
    }

    /// Says that this process gets on (`WATCHDOG=1`).
    pub fn feed(&self) {
        crate::ready::notify(&[NotifyState::Watchdog]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_fed_often_enough() {
        let watchdog = Watchdog::parse("10000000").expect("a watchdog");
        assert_eq!(watchdog.limit(), Duration::from_secs(10));
        assert!(watchdog.period() * 2 < watchdog.limit(), "{:?}", watchdog.period());
        assert_eq!(Watchdog::parse("0"), None, "none is kept");
        assert_eq!(Watchdog::parse("soon"), None);
    }
}
