//! How a process ends that can be replaced: it is told to stop, or another one goes on in its place. Decided once, by whatever comes
//! first: a stop gives up an upgrade that is not committed, and from the commit on it is for the new process.
//!
//! Asked by the gateway and by the hand-over.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// What came first; nothing yet.
#[derive(Debug, Default)]
pub(crate) struct Course(Mutex<Option<Way>>);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Way {
    Stops,
    GoesOver,
}

/// What became of an upgrade that was committed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Outcome {
    /// This process serves in place of the old one.
    Replaced { pid: u32 },
    /// Neither can go on.
    Broken,
}

impl Course {
    /// This process is told to stop; false if another one serves in its place, or is about to.
    pub(crate) fn stops(&self) -> bool {
        *self.decided().get_or_insert(Way::Stops) == Way::Stops
    }

    /// An upgrade is to be committed, which `tell` says to the new process; `None` if this process stops. If that is not told,
    /// nothing is decided.
    ///
    /// # Errors
    /// Those of `tell`.
    pub(crate) fn goes_over<E>(&self, tell: impl FnOnce() -> Result<(), E>) -> Result<Option<()>, E> {
        // A stop that comes meanwhile waits for this.
        let mut decided = self.decided();
        if *decided == Some(Way::Stops) {
            return Ok(None);
        }
        tell()?;
        *decided = Some(Way::GoesOver);
        Ok(Some(()))
    }

    fn decided(&self) -> MutexGuard<'_, Option<Way>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Tells the process that has taken over to stop, and waits until it has ended, at most for `limit`: a service manager that does
/// not know it for the main process yet would kill what is left when the old one ends.
///
/// # Errors
/// If it can not be told; it may have ended.
pub(crate) async fn stop_successor(pid: u32, limit: Duration) -> io::Result<()> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::NotFound)?;
    let process = pidfd_open(pid, PidfdFlags::empty())?;
    pidfd_send_signal(&process, Signal::TERM)?;
    let limit = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: 0 };
    let ended = tokio::task::spawn_blocking(move || {
        poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&limit)).map_err(io::Error::from)
    });
    match ended.await.map_err(io::Error::other)?? {
        0 => Err(io::ErrorKind::TimedOut.into()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_first_decides() {
        let told = || Ok::<(), ()>(());
        let course = Course::default();
        assert!(course.stops() && course.stops());
        assert_eq!(course.goes_over(|| -> Result<(), ()> { panic!("is told nothing") }), Ok(None));
        let course = Course::default();
        assert_eq!(course.goes_over(told), Ok(Some(())));
        assert!(!course.stops());
        let course = Course::default();
        assert_eq!(course.goes_over(|| Err("gone")), Err("gone"));
        assert!(course.stops(), "an upgrade that nobody was told of decides nothing");
    }

    #[tokio::test]
    async fn a_successor_is_told_and_waited_for() {
        let mut sleeper = std::process::Command::new("sleep").arg("600").spawn().expect("starts");
        stop_successor(sleeper.id(), Duration::from_secs(20)).await.expect("ends");
        assert!(!sleeper.wait().expect("has ended").success());
        assert!(stop_successor(0, Duration::ZERO).await.is_err());
    }
}
