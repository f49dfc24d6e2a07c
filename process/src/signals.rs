//! SIGTERM and SIGINT as something to wait for: a thread blocks in [`Stop::wait`], an event loop polls its descriptor.
//!
//! Called by each `main.rs` before it starts anything that must be stopped cleanly.

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

/// Told of SIGTERM and SIGINT. Its descriptor becomes readable at the first of them and stays so.
#[derive(Debug)]
pub struct Stop {
    told: UnixStream,
}

impl Stop {
    /// Takes over SIGTERM and SIGINT from their default, which is to end the process at once.
    ///
    /// # Errors
    /// If there is no descriptor left, or the system refuses the handler.
    pub fn install() -> io::Result<Self> {
        let (told, tell) = UnixStream::pair()?;
        signal_hook::low_level::pipe::register(signal_hook::consts::SIGTERM, tell.try_clone()?)?;
        signal_hook::low_level::pipe::register(signal_hook::consts::SIGINT, tell)?;
        Ok(Self { told })
    }

    /// Blocks until a signal has come; each call takes one.
    pub fn wait(&self) {
        let mut byte = [0];
        while let Err(error) = (&self.told).read(&mut byte) {
            if error.kind() != io::ErrorKind::Interrupted {
                return;
            }
        }
    }

    /// The descriptor as a socket that does not block, for an async runtime: readable from the first signal on.
    ///
    /// # Errors
    /// Those of the system.
    pub fn into_socket(self) -> io::Result<UnixStream> {
        self.told.set_nonblocking(true)?;
        Ok(self.told)
    }
}

impl AsFd for Stop {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.told.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::{Signal, getpid, kill_process};

    #[test]
    fn a_signal_ends_the_wait_and_not_the_process() {
        let stop = Stop::install().expect("installs");
        kill_process(getpid(), Signal::TERM).expect("sends");
        stop.wait();
        kill_process(getpid(), Signal::INT).expect("sends");
        stop.wait();
    }
}
