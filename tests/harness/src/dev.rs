//! `spline dev`: a whole cluster in one process, and its export's nebd.

use crate::{Tool, binaries, tool, wait_until};
use anyhow::{Context, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

/// Far above what a start or a stop takes.
pub const DEV_LIMIT: Duration = Duration::from_secs(90);

/// A running `spline dev`, and what it said when it was ready. Dropping it asks it to stop, then kills it.
#[derive(Debug)]
pub struct Dev {
    child: Child,
    /// Everything that it has said until it was ready.
    pub said: String,
}

impl Dev {
    /// Starts it in `dir` with more `flags`, and waits until it has said a line that ends with `last`.
    ///
    /// # Errors
    /// If it ends before that.
    pub fn start_until(dir: &Path, flags: &[&str], last: &str) -> anyhow::Result<Self> {
        // The disk's process is found beside the command.
        binaries::find("spline-nebd")?;
        let mut command = Command::new(binaries::find("spline")?);
        let mut child =
            command.arg("dev").args(flags).arg("--dir").arg(dir).stdout(Stdio::piped()).spawn()?;
        let mut lines = BufReader::new(child.stdout.take().context("piped")?).lines();
        let mut dev = Self { child, said: String::new() };
        while !dev.said.trim_end().ends_with(last) {
            dev.said += &(lines.next().context("spline dev ended before it was ready")?? + "\n");
        }
        Ok(dev)
    }

    /// Starts it in `dir`, with facts for programs.
    ///
    /// # Errors
    /// If it does not become ready.
    pub fn start(dir: &Path) -> anyhow::Result<Self> {
        Self::start_until(dir, &["--json"], "}")
    }

    /// One of the facts of a start for programs, such as `uri`.
    ///
    /// # Errors
    /// If it has not said that.
    pub fn fact(&self, name: &str) -> anyhow::Result<String> {
        let facts: Value = serde_json::from_str(&self.said)?;
        Ok(facts[name].as_str().with_context(|| format!("no such fact: {name}"))?.to_owned())
    }

    /// The uri of its disk.
    ///
    /// # Errors
    /// If it has not said which.
    pub fn uri(&self) -> anyhow::Result<String> {
        self.fact("uri")
    }

    /// The socket of its disk.
    ///
    /// # Errors
    /// If it has not said which.
    pub fn socket(&self) -> anyhow::Result<PathBuf> {
        let uri = self.uri()?;
        Ok(uri.split_once("socket=").with_context(|| format!("no socket in {uri}"))?.1.into())
    }

    /// Its process and those that it has started.
    ///
    /// # Errors
    /// If it has ended.
    pub fn pids(&self) -> anyhow::Result<Vec<u32>> {
        let mut pids = vec![self.child.id()];
        for thread in std::fs::read_dir(format!("/proc/{}/task", self.child.id()))? {
            let children = std::fs::read_to_string(thread?.path().join("children")).unwrap_or_default();
            pids.extend(children.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
        }
        Ok(pids)
    }

    /// Runs a command of qemu-io on its disk.
    ///
    /// # Errors
    /// What qemu-io said.
    pub fn qemu_io(&self, command: &str) -> anyhow::Result<()> {
        let said = Tool::new("qemu-io").args(["-f", "raw", "-c", command, &self.uri()?]).run()?;
        ensure!(!said.contains("failed"), "{said}");
        Ok(())
    }

    /// Runs `spline` against its cluster and answers what it said.
    ///
    /// # Errors
    /// If it fails.
    pub fn spline(&self, arguments: &[&str]) -> anyhow::Result<Value> {
        let mut command = Command::new(binaries::find("spline")?);
        let text = tool::run(command.args(arguments).args(["--json", "--mds", &self.fact("mds")?]))?;
        Ok(serde_json::from_str(&text)?)
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// Those of the system.
    pub fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        let pid = Pid::from_raw(i32::try_from(self.child.id())?).context("a process id")?;
        Ok(kill_process(pid, signal)?)
    }

    /// Whether it has ended, and how.
    ///
    /// # Errors
    /// Those of the system.
    pub fn ended(&mut self) -> anyhow::Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Sends it a signal and waits until it has ended.
    ///
    /// # Errors
    /// If it does not end.
    pub fn end(&mut self, signal: Signal) -> anyhow::Result<ExitStatus> {
        self.signal(signal)?;
        wait_until("spline dev to end", DEV_LIMIT, || self.ended())
    }
}

impl Drop for Dev {
    fn drop(&mut self) {
        if let Ok(None) = self.ended()
            && self.end(Signal::TERM).is_err()
        {
            let _ = self.child.kill();
        }
    }
}
