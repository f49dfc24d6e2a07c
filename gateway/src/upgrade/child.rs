//! The new process, as the old one sees it: started with one end of a channel, listened to, killed if it does not make it.
//!
//! Called by the hand-over. Must not know what is said over the channel. A child that is dropped is killed: nothing that was not
//! taken over by the end of an upgrade stays behind.

use super::launch::Launch;
use rustix::process::{Pid, Signal, kill_process_group};
use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::{ChildStderr, Command};
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// Tells a process which descriptor is its end of the channel. It is always the standard input, which every process has.
pub(crate) const VARIABLE: &str = "SPLINE_HANDOVER_FD";
/// Lines that a child has written last and that tell why it failed.
const TAIL_LINES: usize = 4;
/// Longest line that is kept, bytes.
const LINE_BYTES_MAX: usize = 512;
/// Time for a child that has closed its end to be gone, and for its last lines to be read; children of its own may hold its log
/// open.
const LAST_WORDS: Duration = Duration::from_millis(300);
/// Time for a killed child to be gone: one that hangs in the kernel is left to it.
const KILL_LIMIT: Duration = Duration::from_secs(5);

/// A running child.
pub(crate) struct Child {
    process: tokio::process::Child,
    /// Its process group, which it leads; `None` once it is nobody's child any more.
    group: Option<Pid>,
    tail: Tail,
    relay: JoinHandle<()>,
}

type Tail = Arc<Mutex<VecDeque<String>>>;

impl Child {
    /// Starts `binary` as `launch` says, with `socket` as its standard input. What it writes to its standard error appears in
    /// ours, until it is given a log of its own.
    ///
    /// # Errors
    /// If it can not be started.
    pub(crate) fn start(binary: &Path, launch: &Launch, socket: OwnedFd) -> io::Result<Self> {
        let mut process = Command::new(binary)
            .args(&launch.arguments)
            .env(VARIABLE, "0")
            // What systemd has told us is not its.
            .env_remove("LISTEN_FDS")
            .env_remove("LISTEN_PID")
            .env_remove("LISTEN_FDNAMES")
            .env_remove("WATCHDOG_PID")
            .stdin(Stdio::from(socket))
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()?;
        let group = process.id().and_then(|id| Pid::from_raw(id.try_into().ok()?));
        let tail = Tail::default();
        let said = process.stderr.take().ok_or(io::ErrorKind::BrokenPipe)?;
        let relay = tokio::spawn(relay(said, Arc::clone(&tail)));
        Ok(Self { process, group, tail, relay })
    }

    /// Its process id; 0 once it has ended.
    pub(crate) fn id(&self) -> u32 {
        self.process.id().unwrap_or(0)
    }

    /// It has taken over: it is not killed any more.
    pub(crate) fn release(&mut self) {
        self.group = None;
    }

    /// Gives it a moment to end by itself, kills it, waits until it is gone, and answers how it ended, if it did so by itself,
    /// and what it said last.
    pub(crate) async fn end(mut self) -> String {
        let ended = timeout(LAST_WORDS, self.process.wait()).await;
        self.kill();
        if timeout(KILL_LIMIT, self.process.wait()).await.is_err() {
            tracing::warn!(pid = self.id(), "new process does not end though it was killed");
        }
        self.group = None;
        let _ = timeout(LAST_WORDS, &mut self.relay).await;
        self.relay.abort();
        let said = self.tail.lock().unwrap_or_else(PoisonError::into_inner);
        let said = said.iter().map(|line| line.trim()).collect::<Vec<_>>().join(" | ");
        match ended {
            Ok(Ok(status)) => format!("status={:?} stderr={said:?}", status.to_string()),
            _ => format!("stderr={said:?}"),
        }
    }

    fn kill(&self) {
        if let Some(group) = self.group {
            // What has ended already need not be killed.
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Copies what a child says to our log, and keeps the end of it. Ends with the child, and with whoever else has the pipe.
async fn relay(said: ChildStderr, tail: Tail) {
    let mut reader = BufReader::new(said);
    let mut line = Vec::new();
    loop {
        line.clear();
        let mut limited = (&mut reader).take(LINE_BYTES_MAX as u64);
        match limited.read_until(b'\n', &mut line).await {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let text = String::from_utf8_lossy(&line).trim_end().to_owned();
        // With nobody to read our log either, there is nobody to tell.
        let _ = writeln!(io::stderr(), "{text}");
        // The frames of a panic's backtrace would hide what it said.
        if text.is_empty() || text.starts_with(' ') {
            continue;
        }
        let mut tail = tail.lock().unwrap_or_else(PoisonError::into_inner);
        if tail.len() >= TAIL_LINES {
            tail.pop_front();
        }
        tail.push_back(text);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::upgrade::channel::Channel;

    fn shell(script: &str) -> (Channel, Child) {
        let (ours, theirs) = Channel::pair().expect("opens");
        let launch = Launch { binary: "/bin/sh".into(), arguments: vec!["-c".into(), script.into()] };
        let child = Child::start(&launch.binary, &launch, theirs).expect("starts");
        (ours, child)
    }

    #[tokio::test]
    async fn why_a_child_ended_is_told() {
        let script = "for n in 1 2 3 4 5; do echo line $n >&2; echo \"   1: frame\" >&2; done; exit 3";
        let (channel, child) = shell(script);
        assert!(channel.hear().await.is_err(), "its end of the channel is closed");
        assert_eq!(
            child.end().await,
            "status=\"exit status: 3\" stderr=\"line 2 | line 3 | line 4 | line 5\""
        );
    }

    #[tokio::test]
    async fn a_child_that_hangs_is_killed_with_its_own_children() {
        let (channel, child) = shell("echo begun >&2; sleep 1000; sleep 1000");
        let said = child.end().await;
        assert!(said.starts_with("stderr="), "{said}");
        // Whoever still lived would hold the other end.
        assert!(channel.hear().await.is_err());
    }

    #[tokio::test]
    async fn a_line_without_end_is_no_line_without_limit() {
        let (channel, child) = shell("head -c 5000 /dev/zero | tr '\\0' x >&2");
        assert!(channel.hear().await.is_err(), "it has ended");
        assert!(child.end().await.len() < (TAIL_LINES + 1) * LINE_BYTES_MAX);
    }
}
