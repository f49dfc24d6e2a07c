//! Feeds systemd's watchdog, only while the gateway makes progress.
//!
//! Started by the gateway. A gateway that hangs would hold its guests' requests for ever: systemd kills it after the limit,
//! and the next one is served what nebd replays. Must not know: what a request is.

use crate::registry::Registry;
use crate::session::Order;
use spline_process::watchdog::Watchdog;
use std::sync::Arc;
use tokio::sync::oneshot;
use tokio::time::{Instant, MissedTickBehavior, interval_at, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// Feeds `watchdog` until `gone`, as often as it wants and as long as there is [`progress`].
pub(crate) async fn feed(watchdog: Watchdog, registry: Arc<Registry>, gone: CancellationToken) {
    info!(limit = ?watchdog.limit(), "systemd watches");
    // Not at once: a process that is about to take over is not the one that systemd listens to yet.
    let mut ticks = interval_at(Instant::now() + watchdog.period(), watchdog.period());
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = gone.cancelled() => return,
            _ = ticks.tick() => {}
        }
        match timeout(watchdog.period(), progress(&registry)).await {
            Ok(()) => watchdog.feed(),
            Err(_) => warn!(period = ?watchdog.period(), "no progress, the watchdog is not fed"),
        }
    }
}

/// Comes back when everything that a request needs has run since it was called; hangs with what hangs. The one place that says
/// what progress is: the runtime carries out what is spawned, and the task of each link answers. Requests that wait for the
/// cluster or a disk do not count: no other gateway would have them sooner.
pub(crate) async fn progress(registry: &Registry) {
    let _ = tokio::spawn(async {}).await;
    for session in registry.sessions() {
        for orders in session.links_orders() {
            let (probe, answered) = oneshot::channel();
            if orders.send(Order::Probe(probe)).is_ok() {
                // A link that ends meanwhile does not answer, and needs not.
                let _ = answered.await;
            }
        }
    }
}
