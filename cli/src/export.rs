//! What exports over NBD and to virtual machines have in common: a nebd process is started, listed, stopped.
//!
//! Called by `nbd` and `vhost`. Must not know NBD, vhost-user or nebd's flags.

use crate::args;
use crate::nebd::status::{self, ExportStatus, Kind};
use crate::nebd::{self, Listen, NebdSpec, file_name};
use crate::output::table;
use anyhow::{Context, ensure};
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Time for a new export to serve: a gateway that must take the session of a dead one over waits for its lease (10 s).
const SERVE_LIMIT: Duration = Duration::from_secs(20);
/// Time for a nebd to answer what it has in hand and end, before it is killed.
const STOP_LIMIT: Duration = Duration::from_secs(10);

/// An export that was ended.
#[derive(Serialize)]
pub struct Removed {
    volume: String,
    pid: u32,
}

impl Removed {
    /// For people.
    pub fn line(&self) -> String {
        format!("export removed: volume={} pid={}\n", self.volume, self.pid)
    }
}

/// Where an export listens unless it was told: `<runtime_dir>/nebd/<volume>.<ending>`.
///
/// # Errors
/// If the working directory is not known.
pub fn default_socket(wanted: &args::Export, ending: &str) -> anyhow::Result<PathBuf> {
    let name = format!("{}.{ending}", file_name(&wanted.volume));
    Ok(std::path::absolute(wanted.runtime_dir.join("nebd").join(name))?)
}

/// Starts a nebd process that listens as `listen` says, and waits until it serves. Its log is `<volume>.<log_ending>`.
///
/// # Errors
/// Why it does not serve.
pub fn start(wanted: args::Export, listen: Listen, log_ending: &str) -> anyhow::Result<(NebdSpec, u32)> {
    let dir = wanted.runtime_dir.join("nebd");
    std::fs::create_dir_all(&dir)
        .with_context(|| format!("can not make the directory, set --runtime-dir: path={}", dir.display()))?;
    let spec = NebdSpec {
        log: dir.join(format!("{}.{log_ending}", file_name(&wanted.volume))),
        volume: wanted.volume,
        gateway: std::path::absolute(wanted.gateway)?,
        listen,
        read_only: wanted.read_only,
        force: wanted.force,
        user: wanted.user,
        runtime_dir: std::path::absolute(wanted.runtime_dir)?,
    };
    ensure!(
        spec.probe(Duration::from_millis(200)).is_err(),
        "already exported there: volume={} at={}",
        spec.volume,
        spec.place()
    );
    let mut child = spec.spawn()?;
    if let Err(error) = spec.wait_until_serving(&mut child, SERVE_LIMIT) {
        // Nobody would know of a process that began to serve later.
        let _ = child.kill();
        let _ = child.wait();
        return Err(error);
    }
    Ok((spec, child.id()))
}

/// The export of `volume`.
///
/// # Errors
/// If there is none, or the status files can not be read.
pub fn find(kind: Kind, volume: &str, runtime_dir: &Path) -> anyhow::Result<ExportStatus> {
    let found = status::read_all(runtime_dir, kind)?.into_iter().find(|export| export.volume == volume);
    found.with_context(|| {
        format!(
            "not exported here, see spline {} ls: volume={volume} runtime_dir={}",
            kind.command(),
            runtime_dir.display()
        )
    })
}

/// Stops the process of an export.
///
/// # Errors
/// If there is none, it has other exports too, or it can not be stopped.
pub fn remove(kind: Kind, volume: &str, runtime_dir: &Path) -> anyhow::Result<Removed> {
    let export = find(kind, volume, runtime_dir)?;
    let pid = export.pid;
    if export.alive {
        for other in [Kind::Nbd, Kind::Vhost].map(|kind| status::read_all(runtime_dir, kind)) {
            let shared = other?.into_iter().find(|other| other.pid == pid && other.file != export.file);
            ensure!(
                shared.is_none(),
                "its process has other exports too, stop that yourself: pid={pid} other={}",
                shared.map(|other| other.volume).unwrap_or_default()
            );
        }
        nebd::stop(pid, STOP_LIMIT, || !nebd::is_alive(pid))
            .with_context(|| format!("can not stop nebd: pid={pid}"))?;
    }
    // A nebd that was killed has left its file.
    std::fs::remove_file(&export.file).or_else(|error| match error.kind() {
        std::io::ErrorKind::NotFound => Ok(()),
        _ => Err(error).with_context(|| format!("can not remove: path={}", export.file.display())),
    })?;
    Ok(Removed { volume: volume.to_owned(), pid })
}

/// The exports as a table for people.
pub fn list(found: &[ExportStatus], runtime_dir: &Path) -> String {
    if found.is_empty() {
        return format!("no exports: runtime_dir={}\n", runtime_dir.display());
    }
    table(
        &["volume", "pid", "state", "sockets", "version"],
        &[1],
        found.iter().map(|export| {
            let state = if export.alive { "serving" } else { "dead" };
            let sockets = export.sockets.join(" ");
            vec![export.volume.clone(), export.pid.to_string(), state.into(), sockets, export.version.clone()]
        }),
    )
}
