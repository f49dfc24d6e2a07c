//! A Linux guest in QEMU: `qemu/run-guest` with a script of the test, what it says, and how long its disk kept it waiting.
//!
//! The script talks with the test by lines: the test waits for a line ([`Guest::wait_for`]) and sends one ([`Guest::tell`]).
//! A script that says `beat` over and over, each time after a request of its disk was answered, shows how long the disk
//! stalls ([`Guest::wait_for_beats`]).

use crate::qmp::Qmp;
use crate::wait_until;
use anyhow::{Context, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

/// Longest wait for a line. A guest under emulation boots in 10 s; the machine may be busy with other tests.
pub const GUEST_LIMIT: Duration = Duration::from_secs(180);
/// Time for run-guest to end when it is told to.
const END_LIMIT: Duration = Duration::from_secs(20);
/// Seconds after which a guest is killed whatever its test does.
const LIFE_SECONDS: &str = "3600";
/// What the prober says when its disk has answered.
const BEAT: &str = "beat";
/// What a script says in front of what went wrong.
const FAILED: &str = "failed";
/// What the kernel says when a disk or a file system on it does badly.
const COMPLAINTS: [&str; 9] = [
    "I/O error",
    "critical target error",
    "critical medium error",
    "EXT4-fs error",
    "EXT4-fs warning",
    "orruption",
    "blocked for more than",
    "emounting filesystem read-only",
    "Connection timed out",
];
/// Lines of the console that are shown when a test fails.
const CONSOLE_TAIL_LINES: usize = 30;

/// A guest's hardware.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Processors.
    pub cpus: u32,
    /// Sockets of vhost-user-blk devices and the queues to use: /dev/vda, /dev/vdb, ...
    pub disks: Vec<(PathBuf, u16)>,
    /// Boot the system on this disk; the script's place is taken by its console.
    pub root: Option<String>,
}

impl Machine {
    /// Two processors, and disks of so many queues.
    pub fn new<'a>(disks: impl IntoIterator<Item = (&'a Path, u16)>) -> Self {
        let disks = disks.into_iter().map(|(socket, queues)| (socket.to_owned(), queues)).collect();
        Self { cpus: 2, disks, root: None }
    }
}

/// A running guest. Dropping it kills it.
#[derive(Debug)]
pub struct Guest {
    child: Child,
    input: ChildStdin,
    lines: Receiver<(Instant, String)>,
    /// What the script has said, beats aside.
    said: Vec<String>,
    last_beat: Option<Instant>,
    longest_gap: Duration,
    console: PathBuf,
    errors: PathBuf,
    qmp: PathBuf,
}

impl Guest {
    /// Starts a guest that runs `script`; its files lie in `dir` under `name`.
    ///
    /// # Errors
    /// If it can not be started.
    pub fn start(dir: &Path, name: &str, machine: &Machine, script: &str) -> anyhow::Result<Self> {
        let file = |ending: &str| dir.join(format!("guest-{name}.{ending}"));
        let (console, errors, qmp) = (file("console"), file("errors"), file("qmp"));
        let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../qemu/run-guest");
        let mut command = Command::new(program);
        command.args(["--timeout", LIFE_SECONDS, "--cpus", &machine.cpus.to_string()]);
        command.arg("--serial").arg(&console).arg("--qmp").arg(&qmp);
        for (socket, queues) in &machine.disks {
            command.arg("--disk").arg(format!("{},queues={queues}", socket.display()));
        }
        match &machine.root {
            Some(device) => command.args(["--root", device]),
            None => {
                std::fs::write(file("sh"), script)?;
                command.arg(file("sh"))
            }
        };
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(std::fs::File::create(&errors)?);
        let mut child = command.spawn().context("can not start run-guest")?;
        let input = child.stdin.take().context("piped")?;
        let output = BufReader::new(child.stdout.take().context("piped")?);
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if sender.send((Instant::now(), line)).is_err() {
                    break;
                }
            }
        });
        let (said, last_beat, longest_gap) = (Vec::new(), None, Duration::ZERO);
        Ok(Self { child, input, lines, said, last_beat, longest_gap, console, errors, qmp })
    }

    /// Waits until the script says a line that begins with `start`, and answers the rest of it.
    ///
    /// # Errors
    /// If it ends before that, or says that something failed.
    pub fn wait_for(&mut self, start: &str) -> anyhow::Result<String> {
        let deadline = Instant::now() + GUEST_LIMIT;
        loop {
            let line = self.next_line(deadline).with_context(|| format!("waits for line={start:?}"))?;
            if let Some(rest) = line.strip_prefix(start) {
                return Ok(rest.trim().to_owned());
            }
        }
    }

    /// Sends a line to the script.
    ///
    /// # Errors
    /// If the guest has ended.
    pub fn tell(&mut self, line: &str) -> anyhow::Result<()> {
        writeln!(self.input, "{line}").with_context(|| self.shown("has ended"))
    }

    /// Takes what was said until now; answers the longest time between two beats since the last call, the time since the
    /// last beat included.
    ///
    /// # Errors
    /// As [`Guest::wait_for`].
    pub fn longest_gap(&mut self) -> anyhow::Result<Duration> {
        while let Ok(line) = self.lines.try_recv() {
            self.take(line)?;
        }
        let open = self.last_beat.map_or(Duration::ZERO, |last| last.elapsed());
        Ok(std::mem::take(&mut self.longest_gap).max(open))
    }

    /// Waits for so many beats from now on.
    ///
    /// # Errors
    /// As [`Guest::wait_for`].
    pub fn wait_for_beats(&mut self, count: usize) -> anyhow::Result<()> {
        while let Ok(line) = self.lines.try_recv() {
            self.take(line)?;
        }
        let deadline = Instant::now() + GUEST_LIMIT;
        for _ in 0..count {
            while self.next_line(deadline).context("waits for a beat")? != BEAT {}
        }
        Ok(())
    }

    /// Waits until the script has ended; it must have succeeded, and the kernel must not have complained. Answers what it said.
    ///
    /// # Errors
    /// What was wrong.
    pub fn finish(mut self) -> anyhow::Result<Vec<String>> {
        let status = wait_until("the guest to end", GUEST_LIMIT, || {
            while let Ok(line) = self.lines.try_recv() {
                self.take(line)?;
            }
            Ok(self.child.try_wait()?)
        });
        let status = status.with_context(|| self.shown("does not end"))?;
        while let Ok(line) = self.lines.try_recv() {
            self.take(line)?;
        }
        ensure!(status.success(), self.shown(&format!("ended: {status}")));
        let console = self.console()?;
        let complaint = console.lines().find(|line| COMPLAINTS.iter().any(|word| line.contains(word)));
        ensure!(complaint.is_none(), self.shown(&format!("its kernel complained: {complaint:?}")));
        Ok(std::mem::take(&mut self.said))
    }

    /// What the kernel has said on its console.
    ///
    /// # Errors
    /// If there is none yet.
    pub fn console(&self) -> anyhow::Result<String> {
        Ok(String::from_utf8_lossy(&std::fs::read(&self.console)?).into_owned())
    }

    /// Waits until the console shows `text`.
    ///
    /// # Errors
    /// If it does not in time.
    pub fn wait_for_console(&mut self, text: &str) -> anyhow::Result<()> {
        let shown = wait_until(text, GUEST_LIMIT, || {
            let ended = self.child.try_wait()?.is_some();
            let shown = self.console()?.contains(text);
            Ok((shown || ended).then_some(shown))
        });
        let shown = shown.with_context(|| self.shown(&format!("did not show {text:?}")))?;
        ensure!(shown, self.shown(&format!("ended before it showed {text:?}")));
        Ok(())
    }

    /// A connection to its QEMU.
    ///
    /// # Errors
    /// If QEMU does not answer.
    pub fn qmp(&self) -> anyhow::Result<Qmp> {
        wait_until("qemu to listen", GUEST_LIMIT, || Qmp::connect(&self.qmp).map(Some))
    }

    fn next_line(&mut self, deadline: Instant) -> anyhow::Result<String> {
        match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => self.take(line),
            Err(RecvTimeoutError::Timeout) => bail!(self.shown("said nothing more")),
            Err(RecvTimeoutError::Disconnected) => bail!(self.shown("has ended")),
        }
    }

    fn take(&mut self, (at, line): (Instant, String)) -> anyhow::Result<String> {
        if line == BEAT {
            if let Some(last) = self.last_beat.replace(at) {
                self.longest_gap = self.longest_gap.max(at - last);
            }
            return Ok(line);
        }
        self.said.push(line.clone());
        ensure!(!line.starts_with(FAILED), self.shown("says that something failed"));
        Ok(line)
    }

    fn shown(&self, what: &str) -> String {
        let read =
            |path: &Path| String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into_owned();
        let console = read(&self.console);
        let lines: Vec<&str> = console.lines().collect();
        let tail = lines[lines.len().saturating_sub(CONSOLE_TAIL_LINES)..].join("\n");
        format!(
            "the guest {what}\n---- script ----\n{}\n---- run-guest ----\n{}\n---- console ----\n{tail}",
            self.said.join("\n"),
            read(&self.errors)
        )
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // By a signal that it can catch, so that it takes QEMU and its temporary files with it.
        if let Some(pid) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw)
            && let Ok(None) = self.child.try_wait()
        {
            let _ = kill_process(pid, Signal::TERM);
            let ended = wait_until("run-guest to end", END_LIMIT, || Ok(self.child.try_wait()?));
            if ended.is_err() {
                let _ = self.child.kill();
            }
        }
        let _ = self.child.wait();
    }
}
