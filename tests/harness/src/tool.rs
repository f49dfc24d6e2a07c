//! Foreign clients: qemu-img, qemu-io, nbdinfo, nbdcopy, fio.

use anyhow::{Context, bail};
use std::path::Path;
use std::process::Command;

/// A program that nobody here wrote.
#[derive(Debug)]
pub struct Tool(Command);

impl Tool {
    /// The program `name`. `make test` installs all that tests use.
    pub fn new(name: &str) -> Self {
        Self(Command::new(name))
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<I: IntoIterator<Item = S>, S: AsRef<std::ffi::OsStr>>(mut self, arguments: I) -> Self {
        self.0.args(arguments);
        self
    }

    /// Runs it in `dir`: where a tool leaves files behind.
    #[must_use]
    pub fn within(mut self, dir: &Path) -> Self {
        self.0.current_dir(dir);
        self
    }

    /// Runs it and answers what it printed.
    ///
    /// # Errors
    /// If it is not installed or fails; the message holds all that it said.
    pub fn run(mut self) -> anyhow::Result<String> {
        run(&mut self.0)
    }

    /// Runs it and answers what it printed, parsed as JSON.
    ///
    /// # Errors
    /// As [`Tool::run`], and if it is not JSON.
    pub fn json(self) -> anyhow::Result<serde_json::Value> {
        let text = self.run()?;
        // fio prints notes in front of its report.
        let start = text.find(['{', '[']).unwrap_or(0);
        serde_json::from_str(&text[start..]).with_context(|| format!("not json: {text}"))
    }

    /// Runs it; it must fail. Answers all that it said.
    ///
    /// # Errors
    /// If it is not installed, or succeeds.
    pub fn fails(mut self) -> anyhow::Result<String> {
        let output = self.0.output().with_context(|| format!("can not run {:?}, see make test", self.0))?;
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        if output.status.success() {
            bail!("should have failed: {:?}\n{said}", self.0);
        }
        Ok(said)
    }
}

/// Runs a command and answers its standard output.
///
/// # Errors
/// If it can not be run or fails; the message holds all that it said.
pub fn run(command: &mut Command) -> anyhow::Result<String> {
    let output = command.output().with_context(|| format!("can not run {command:?}, see make test"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        bail!("failed: {command:?} {}\n{text}{}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(text)
}
