//! Which process the kernel is to kill for want of memory: the new one, as long as the old one serves. The old one has more memory,
//! guests' own that it has touched included, so that by itself the kernel would choose that.
//!
//! Called by the gateway's start. Must not know what an upgrade is.

use std::io;

/// What the kernel is told of this process, -1000 to 1000 (proc_pid_oom_score_adj(5)).
const SCORE: &str = "/proc/self/oom_score_adj";
/// As if all of the machine's memory were this process's: no process has more. Guests, with the usual score, are spared by it too.
const MORE: i32 = 1000;
/// The kernel knows none above.
const SCORE_MAX: i32 = 1000;

/// This process is the first to be killed until it is dropped.
pub(crate) struct Expendable {
    before: i32,
}

impl Expendable {
    /// From now on. `None` if the kernel does not hear of it, which is logged: the upgrade goes on as well.
    pub(crate) fn begin() -> Option<Self> {
        let before = score().and_then(|before| set(before.saturating_add(MORE)).map(|()| before));
        match before {
            Ok(before) => Some(Self { before }),
            Err(error) => {
                tracing::warn!(%error, path = SCORE, "kernel may kill the old process rather than this one if memory runs out");
                None
            }
        }
    }
}

impl Drop for Expendable {
    fn drop(&mut self) {
        // Nobody needs a capability to go back to what a process was started with.
        if let Err(error) = set(self.before) {
            tracing::warn!(%error, path = SCORE, "kernel goes on to take this process for expendable if memory runs out");
        }
    }
}

fn score() -> io::Result<i32> {
    std::fs::read_to_string(SCORE)?.trim().parse().map_err(|_| io::ErrorKind::InvalidData.into())
}

fn set(score: i32) -> io::Result<()> {
    std::fs::write(SCORE, score.min(SCORE_MAX).to_string())
}
