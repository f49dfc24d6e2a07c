//! A nebd process and what it exports.

use crate::cluster::{START_LIMIT, configured};
use crate::nbd::Connection;
use crate::process::Process;
use crate::wait_until;
use anyhow::{Context, ensure};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A nebd process and what it exports.
#[derive(Debug)]
pub struct Export {
    /// The process.
    pub nebd: Process,
    /// Its unix socket.
    pub socket: PathBuf,
    /// The volume, which is the export's name too.
    pub volume: String,
}

impl Export {
    /// Starts a nebd on a socket in `dir`, and waits until it serves.
    ///
    /// # Errors
    /// Why it does not serve.
    pub fn start(dir: &Path, gateway: &Path, volume: &str, read_only: bool) -> anyhow::Result<Self> {
        let mut export = Self::new(dir, "", gateway, volume, read_only)?;
        export.nebd.start()?;
        export.wait_until_serving()?;
        Ok(export)
    }

    /// As [`Export::start`], of a volume that is served by another gateway and is taken from it.
    ///
    /// # Errors
    /// Why it does not serve.
    pub fn start_by_force(dir: &Path, gateway: &Path, volume: &str) -> anyhow::Result<Self> {
        let mut export = Self::new(dir, "-forced", gateway, volume, false)?;
        export.nebd.add_arguments(&["--force"]);
        export.nebd.start()?;
        export.wait_until_serving()?;
        Ok(export)
    }

    /// Starts a nebd that the gateway must refuse; answers what it says when it ends.
    ///
    /// # Errors
    /// If it does not end.
    pub fn refused(dir: &Path, gateway: &Path, volume: &str) -> anyhow::Result<String> {
        let mut export = Self::new(dir, "-refused", gateway, volume, false)?;
        export.nebd.start()?;
        wait_until("nebd to be refused", START_LIMIT, || {
            ensure!(!export.nebd.is_running()?, "still runs:\n{}", export.nebd.log_tail());
            Ok(Some(()))
        })?;
        export.nebd.log()
    }

    fn new(dir: &Path, suffix: &str, gateway: &Path, volume: &str, read_only: bool) -> anyhow::Result<Self> {
        let read = if read_only { "-ro" } else { "" };
        let name = format!("nebd-{}{read}{suffix}", volume.replace(['/', ':'], "_"));
        let socket = dir.join(format!("{name}.sock"));
        let text = format!(
            "gateway_socket = {gateway:?}\nruntime_dir = {:?}\n\
             [[export]]\nvolume = {volume:?}\nlisten_unix = {socket:?}\nread_only = {read_only}\n",
            dir.join(format!("run-{name}"))
        );
        let nebd = configured(dir, &name, "spline-nebd", &text)?;
        Ok(Self { nebd, socket, volume: volume.to_owned() })
    }

    /// Waits until a client can enter the export.
    ///
    /// # Errors
    /// Why none can.
    pub fn wait_until_serving(&mut self) -> anyhow::Result<()> {
        wait_until("nebd to serve", START_LIMIT, || {
            self.nebd.assert_running()?;
            let connection = Connection::open(&self.socket, &self.volume, Duration::from_secs(10))?;
            connection.close()?;
            Ok(Some(()))
        })
        .with_context(|| self.nebd.log_tail())
    }

    /// Its NBD URI.
    pub fn uri(&self) -> String {
        format!("nbd+unix:///{}?socket={}", self.volume, self.socket.display())
    }
}
