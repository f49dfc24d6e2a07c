//! For how long a worker looks at its rings before it sleeps: a sleep that would be short costs more than looking.
//!
//! Called by the worker. Pure: time comes as arguments. `bounded`: at most [`LONGEST`] for each time that everything was
//! answered, and nothing at all while the guest's next request takes longer than that to come, so that an idle or slow guest
//! costs no polling.

use std::time::Duration;

/// Longest look: what a sleep and a wake cost between two processors, and what QEMU's own threads look at most.
pub const LONGEST: Duration = Duration::from_micros(32);
/// First look once it seems worth while.
const SHORTEST: Duration = Duration::from_micros(4);

/// The window, which follows the guest.
#[derive(Clone, Copy, Debug, Default)]
pub struct Polling {
    window: Duration,
}

impl Polling {
    /// For how long to look now.
    pub fn window(&self) -> Duration {
        self.window
    }

    /// The guest's next request came `waited` after the last one was answered, whether it was looked for or slept.
    pub fn learn(&mut self, waited: Duration) {
        if waited > LONGEST {
            self.window = Duration::ZERO;
        } else if waited > self.window {
            self.window = (self.window * 2).clamp(SHORTEST, LONGEST);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn us(count: u64) -> Duration {
        Duration::from_micros(count)
    }

    #[test]
    fn the_window_grows_while_requests_come_quickly_and_closes_when_they_do_not() {
        let mut polling = Polling::default();
        assert_eq!(polling.window(), Duration::ZERO);
        for expected in [4, 8, 16, 16, 16] {
            polling.learn(us(12));
            assert_eq!(polling.window(), us(expected));
        }
        polling.learn(us(30));
        polling.learn(us(32));
        assert_eq!(polling.window(), LONGEST);
        polling.learn(us(33));
        assert_eq!(polling.window(), Duration::ZERO);
    }
}
