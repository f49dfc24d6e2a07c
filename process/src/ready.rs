//! Saying that a process serves: systemd's notify socket and a pid file.
//!
//! Called once by each `main.rs`, after everything listens.

use sd_notify::NotifyState;
use std::io;
use std::path::{Path, PathBuf};

/// The process has said that it serves. Dropping it says that it stops, and removes the pid file.
#[must_use = "dropping it says that the process stops"]
#[derive(Debug)]
pub struct Announced {
    pid_file: Option<PathBuf>,
}

/// Sends `READY=1` to systemd (if it started this process with a notify socket), logs `what` is served, and writes
/// the process id to `pid_file`, atomically: whoever sees the file sees a whole number.
///
/// # Errors
/// If the pid file can not be written. A notify socket that does not answer is only logged.
pub fn announce(what: &str, pid_file: Option<&Path>) -> io::Result<Announced> {
    if let Some(path) = pid_file {
        let mut partial = path.as_os_str().to_owned();
        partial.push(".new");
        std::fs::write(&partial, format!("{}\n", std::process::id()))?;
        std::fs::rename(&partial, path)?;
    }
    notify(&[NotifyState::Ready]);
    tracing::info!("ready: {what}");
    Ok(Announced { pid_file: pid_file.map(Path::to_owned) })
}

impl Drop for Announced {
    fn drop(&mut self) {
        notify(&[NotifyState::Stopping]);
        if let Some(path) = &self.pid_file {
            let _ = std::fs::remove_file(path);
        }
    }
}

fn notify(state: &[NotifyState]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!(%error, "systemd's notify socket does not answer, see NOTIFY_SOCKET");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pid_file_lives_as_long_as_the_announcement() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("x.pid");
        let announced = announce("an example", Some(&path)).expect("announces");
        let text = std::fs::read_to_string(&path).expect("reads");
        assert_eq!(text.trim().parse(), Ok(std::process::id()));
        drop(announced);
        assert!(!path.exists());
        assert!(announce("an example", Some(&dir.path().join("none/x.pid"))).is_err());
    }
}
