//! `spline dev`: the first thing that anyone runs. One file per side of it; this one starts it.

mod life;
mod pasted_lines;

use anyhow::{Context, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use spline_harness::{Tool, binaries, tool, wait_until};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

/// Far above what a stop or a start takes.
const LIMIT: Duration = Duration::from_secs(90);

/// A running `spline dev`, and what it said when it was ready. Dropping it asks it to stop, then kills it.
struct Dev {
    child: Child,
    facts: Value,
}

/// Starts `spline dev` and answers what it says up to a line that ends with `last`.
fn start(dir: &Path, flags: &[&str], last: &str) -> anyhow::Result<(Child, String)> {
    // The disk's process is found beside the command.
    binaries::find("spline-nebd")?;
    let mut command = Command::new(binaries::find("spline")?);
    let mut child = command.arg("dev").args(flags).arg("--dir").arg(dir).stdout(Stdio::piped()).spawn()?;
    let mut lines = BufReader::new(child.stdout.take().context("piped")?).lines();
    let mut text = String::new();
    while !text.trim_end().ends_with(last) {
        text += &(lines.next().context("spline dev ended before it was ready")?? + "\n");
    }
    Ok((child, text))
}

impl Dev {
    fn start(dir: &Path) -> anyhow::Result<Self> {
        let (child, text) = start(dir, &["--json"], "}")?;
        Ok(Self { child, facts: serde_json::from_str(&text)? })
    }

    fn uri(&self) -> &str {
        self.facts["uri"].as_str().unwrap_or_default()
    }

    fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        let pid = Pid::from_raw(i32::try_from(self.child.id())?).context("a process id")?;
        Ok(kill_process(pid, signal)?)
    }

    fn end(&mut self, signal: Signal) -> anyhow::Result<ExitStatus> {
        self.signal(signal)?;
        wait_until("spline dev to end", LIMIT, || Ok(self.child.try_wait()?))
    }

    fn qemu_io(&self, command: &str) -> anyhow::Result<()> {
        let said = Tool::new("qemu-io").args(["-f", "raw", "-c", command, self.uri()]).run()?;
        ensure!(!said.contains("failed"), "{said}");
        Ok(())
    }

    fn spline(&self, arguments: &[&str]) -> anyhow::Result<Value> {
        let mds = self.facts["mds"].as_str().unwrap_or_default();
        let mut command = Command::new(binaries::find("spline")?);
        let text = tool::run(command.args(arguments).args(["--json", "--mds", mds]))?;
        Ok(serde_json::from_str(&text)?)
    }
}

impl Drop for Dev {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait()
            && self.end(Signal::TERM).is_err()
        {
            let _ = self.child.kill();
        }
    }
}
