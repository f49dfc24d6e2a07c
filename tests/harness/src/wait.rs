//! Waiting on conditions, with deadlines.

use std::time::{Duration, Instant};

/// How often a condition is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Waits until `condition` answers a value.
///
/// # Errors
/// If it has not within `limit`; the message names `what` and the last error of the condition.
pub fn wait_until<T>(
    what: &str,
    limit: Duration,
    mut condition: impl FnMut() -> anyhow::Result<Option<T>>,
) -> anyhow::Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        let outcome = condition();
        match outcome {
            Ok(Some(value)) => return Ok(value),
            Ok(None) if Instant::now() > deadline => {
                anyhow::bail!("waited in vain: for={what} limit={limit:?}")
            }
            Err(error) if Instant::now() > deadline => {
                return Err(error.context(format!("waited in vain: for={what} limit={limit:?}")));
            }
            _ => std::thread::sleep(LOOK_EVERY),
        }
    }
}
