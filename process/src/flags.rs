//! The flags that every process has, and the start that they steer.
//!
//! Called by each `main.rs`, which flattens [`CommonFlags`] into its own clap struct.

use crate::ready::{self, PidFile};
use crate::{config, logs, open_files};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::path::PathBuf;

/// Flags that every process has. Use with `#[command(flatten)]`.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct CommonFlags {
    /// Read this TOML file; unknown keys are refused, flags override it
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Print the config with every default as TOML, and exit
    #[arg(long)]
    pub print_config: bool,
    /// Log one JSON object per line instead of text
    #[arg(long)]
    pub log_json: bool,
    /// Write the process id here once the process serves
    #[arg(long, value_name = "FILE")]
    pub pid_file: Option<PathBuf>,
}

impl CommonFlags {
    /// Loads the config file and lets `overrides` apply the process's own flags. With `--print-config` prints the
    /// result and answers `None`: the process has nothing else to do. Otherwise sets up logging for `process`, and lets it
    /// open as many files as it may.
    ///
    /// # Errors
    /// Those of [`config::load`], `overrides`, [`config::print`] and [`logs::init`].
    pub fn start<T>(
        &self,
        process: &str,
        overrides: impl FnOnce(&mut T) -> anyhow::Result<()>,
    ) -> anyhow::Result<Option<T>>
    where
        T: DeserializeOwned + Serialize + Default,
    {
        let mut loaded: T = config::load(self.config.as_deref())?;
        overrides(&mut loaded)?;
        if self.print_config {
            print!("{}", config::print(&loaded)?);
            return Ok(None);
        }
        logs::init(process, self.log_json)?;
        open_files::raise();
        Ok(Some(loaded))
    }

    /// Writes the pid file, if one is wanted, but not to its place: for [`ready::announce`] later, by a process that may then
    /// write no file any more.
    ///
    /// # Errors
    /// If it can not be written.
    pub fn prepare_pid_file(&self) -> std::io::Result<Option<PidFile>> {
        self.pid_file.as_deref().map(PidFile::prepare).transpose()
    }

    /// Tells the world that the process serves; see [`ready::announce`]. Keep the result until the process ends.
    ///
    /// # Errors
    /// If the pid file can not be written.
    pub fn announce(&self, what: &str) -> std::io::Result<ready::Announced> {
        ready::announce(what, self.prepare_pid_file()?)
    }
}
