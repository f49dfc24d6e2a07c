//! Feeds systemd's watchdog, only while the gateway makes progress.
//!
//! Started by the gateway. A gateway that hangs would hold its guests' requests for ever: systemd kills it after the limit,
//! and the next one is served what nebd replays. Must not know: what a request is.

use spline_process::watchdog::Watchdog;
use tokio::time::{Instant, MissedTickBehavior, interval_at, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// Feeds `watchdog` until `gone`, as often as it wants and as long as there is [`progress`].
pub(crate) async fn feed(watchdog: Watchdog, gone: CancellationToken) {
    info!(limit = ?watchdog.limit(), "systemd watches");
    // Not at once: a process that is about to take over is not the one that systemd listens to yet.
    let mut ticks = interval_at(Instant::now() + watchdog.period(), watchdog.period());
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = gone.cancelled() => return,
            _ = ticks.tick() => {}
        }
        match timeout(watchdog.period(), progress()).await {
            Ok(()) => watchdog.feed(),
            Err(_) => warn!(period = ?watchdog.period(), "no progress, the watchdog is not fed"),
        }
    }
}

/// Comes back when everything that a request needs has run since it was called; hangs with what hangs. The one place that says
/// what progress is: the runtime carries out what is spawned.
async fn progress() {
    let _ = tokio::spawn(async {}).await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    #[tokio::test]
    async fn progress_is_what_the_runtime_makes_and_nothing_less() {
        assert!(progress().now_or_never().is_none(), "no other task has run yet");
        progress().await;
    }
}
