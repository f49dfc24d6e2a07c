//! QEMU's machine protocol, as far as tests use it (QEMU's manual, "QMP protocol specification").

use anyhow::{Context, bail};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// Longest wait for an answer or an event: a guest under emulation on a busy machine unplugs a disk within seconds.
const LIMIT: Duration = Duration::from_secs(60);

/// A connection to a running QEMU.
#[derive(Debug)]
pub struct Qmp {
    reader: BufReader<UnixStream>,
    /// Events that came while something else was waited for.
    events: Vec<Value>,
}

impl Qmp {
    /// Connects and negotiates.
    ///
    /// # Errors
    /// If nobody listens, or it is not QEMU.
    pub fn connect(socket: &Path) -> anyhow::Result<Self> {
        let stream = UnixStream::connect(socket).with_context(|| socket.display().to_string())?;
        stream.set_read_timeout(Some(LIMIT))?;
        let mut qmp = Self { reader: BufReader::new(stream), events: Vec::new() };
        let greeting = qmp.read()?;
        greeting.get("QMP").with_context(|| format!("no greeting: {greeting}"))?;
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Runs a command and answers what it returns.
    ///
    /// # Errors
    /// What QEMU says.
    pub fn execute(&mut self, command: &str, arguments: Value) -> anyhow::Result<Value> {
        let line = json!({ "execute": command, "arguments": arguments });
        writeln!(self.reader.get_mut(), "{line}")?;
        loop {
            let mut answer = self.read()?;
            if answer.get("event").is_some() {
                self.events.push(answer);
            } else if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            } else {
                bail!("refused: command={command} {answer}");
            }
        }
    }

    /// Waits for an event whose data has `device`, such as `DEVICE_DELETED`. Events that came before count.
    ///
    /// # Errors
    /// If it does not come.
    pub fn wait_for_event(&mut self, name: &str, device: &str) -> anyhow::Result<()> {
        let wanted = |event: &Value| event["event"] == name && event["data"]["device"] == device;
        while !self.events.iter().any(wanted) {
            let event =
                self.read().with_context(|| format!("waited in vain: event={name} device={device}"))?;
            self.events.push(event);
        }
        self.events.retain(|event| !wanted(event));
        Ok(())
    }

    fn read(&mut self) -> anyhow::Result<Value> {
        let mut line = String::new();
        if self.reader.read_line(&mut line)? == 0 {
            bail!("qemu has ended");
        }
        Ok(serde_json::from_str(&line)?)
    }
}
