//! Saying that a process serves: systemd's notify socket and a pid file.
//!
//! Called once by each `main.rs`, after everything listens.

use crate::watchdog::Watchdog;
use sd_notify::NotifyState;
use std::io;
use std::path::{Path, PathBuf};

/// A pid file that is written but not in its place yet. Dropping it removes it, wherever it is.
#[derive(Debug)]
pub struct PidFile {
    path: PathBuf,
    partial: PathBuf,
}

impl PidFile {
    /// Writes the process id beside `path`: what is left is a rename, which a process can do that may write no file any more.
    ///
    /// # Errors
    /// If it can not be written.
    pub fn prepare(path: &Path) -> io::Result<Self> {
        let mut partial = path.as_os_str().to_owned();
        partial.push(".new");
        let file = Self { path: path.to_owned(), partial: partial.into() };
        std::fs::write(&file.partial, format!("{}\n", std::process::id()))?;
        Ok(file)
    }

    /// Where it will lie.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where it lies until the process serves.
    pub fn partial(&self) -> &Path {
        &self.partial
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        if std::fs::remove_file(&self.partial).is_err() {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// The process has said that it serves. Dropping it says that it stops, and removes the pid file.
#[must_use = "dropping it says that the process stops"]
#[derive(Debug)]
pub struct Announced {
    _pid_file: Option<PidFile>,
}

/// Sends `READY=1` to systemd (if it started this process with a notify socket), logs `what` is served, and puts the pid
/// file in its place, atomically: whoever sees the file sees a whole number.
///
/// # Errors
/// If the pid file can not be renamed. A notify socket that does not answer is only logged.
pub fn announce(what: &str, pid_file: Option<PidFile>) -> io::Result<Announced> {
    if let Some(file) = &pid_file {
        std::fs::rename(&file.partial, &file.path)?;
    }
    notify(first_words(Watchdog::of_environment()));
    tracing::info!("ready: {what}");
    Ok(Announced { _pid_file: pid_file })
}

/// What a process says that serves from now on. The watchdog is fed at once: one that takes over is watched in place of one that
/// may have fed it long ago, and may be taken over from before it would feed it again.
fn first_words(watchdog: Option<Watchdog>) -> &'static [NotifyState<'static>] {
    match watchdog {
        Some(_) => &[NotifyState::Ready, NotifyState::Watchdog],
        None => &[NotifyState::Ready],
    }
}

impl Announced {
    /// Another process goes on with the service: nothing is said to stop, and the pid file is left to that one.
    pub fn pass_on(self) {
        std::mem::forget(self);
    }
}

/// Tells systemd (if it started this process with a notify socket) that another process is the service's main one from now on.
/// systemd believes it of the main process only, and of a process of the same service.
pub fn name_main(pid: u32) {
    notify(&[NotifyState::MainPid(pid)]);
}

impl Drop for Announced {
    fn drop(&mut self) {
        notify(&[NotifyState::Stopping]);
    }
}

pub(crate) fn notify(state: &[NotifyState]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!(%error, "systemd's notify socket does not answer, see NOTIFY_SOCKET");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_watchdog_is_fed_from_the_first_word_on() {
        let said = |watchdog| first_words(watchdog).iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(said(None), ["READY=1"]);
        assert_eq!(said(Watchdog::parse("1000000")), ["READY=1", "WATCHDOG=1"]);
    }

    #[test]
    fn the_pid_file_lives_as_long_as_the_announcement() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("x.pid");
        let prepared = PidFile::prepare(&path).expect("writes");
        assert!(!path.exists(), "it does not serve yet");
        let announced = announce("an example", Some(prepared)).expect("announces");
        let text = std::fs::read_to_string(&path).expect("reads");
        assert_eq!(text.trim().parse(), Ok(std::process::id()));
        drop(announced);
        assert!(!path.exists());
        drop(PidFile::prepare(&path).expect("writes"));
        assert_eq!(
            std::fs::read_dir(dir.path()).expect("reads").count(),
            0,
            "one that never served leaves nothing"
        );
        assert!(PidFile::prepare(&dir.path().join("none/x.pid")).is_err());
    }
}
