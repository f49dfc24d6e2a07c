//! `spline nbd …`
//!
//! Called by `main`. Must not know the NBD protocol or nebd's flags.

pub mod status;

use crate::args;
use crate::nbd_client::NbdAddress;
use crate::nebd::{self, NebdSpec, file_name};
use crate::output::{Output, table};
use anyhow::Context;
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Time for a new export to serve: a gateway that must take the session of a dead one over waits for its lease (10 s).
const SERVE_LIMIT: Duration = Duration::from_secs(20);

/// Time for a nebd to answer what it has in hand and end, before it is killed.
const STOP_LIMIT: Duration = Duration::from_secs(10);

/// What `nbd rm` prints.
#[derive(Serialize)]
struct Removed {
    volume: String,
    pid: u32,
}

/// What `nbd export` prints.
#[derive(Serialize)]
struct Exported {
    volume: String,
    uri: String,
    pid: u32,
    log: PathBuf,
}

/// Carries out one command on exports.
///
/// # Errors
/// Why the export does not serve, or the status files can not be read.
pub fn run(command: args::Nbd, output: Output) -> anyhow::Result<()> {
    match command {
        args::Nbd::Export(wanted) => output.print(&export(wanted)?, |exported| format!("{}\n", exported.uri)),
        args::Nbd::Rm { volume, runtime_dir } => output.print(&remove(&volume, &runtime_dir)?, |removed| {
            format!("export removed: volume={} pid={}\n", removed.volume, removed.pid)
        }),
        args::Nbd::Ls { runtime_dir } => {
            let found = status::read_all(&runtime_dir)?;
            output.print(&found, |found| list(found, &runtime_dir))
        }
    }
}

fn export(wanted: args::NbdExport) -> anyhow::Result<Exported> {
    let name = file_name(&wanted.volume);
    let dir = wanted.runtime_dir.join("nebd");
    std::fs::create_dir_all(&dir)
        .with_context(|| format!("can not make the directory, set --runtime-dir: path={}", dir.display()))?;
    let listen = match (wanted.tcp, wanted.socket) {
        (Some(address), _) => NbdAddress::Tcp(address),
        (None, Some(path)) => NbdAddress::Unix(std::path::absolute(path)?),
        (None, None) => NbdAddress::Unix(std::path::absolute(dir.join(format!("{name}.sock")))?),
    };
    let spec = NebdSpec {
        volume: wanted.volume,
        gateway: std::path::absolute(wanted.gateway)?,
        listen,
        read_only: wanted.read_only,
        force: wanted.force,
        runtime_dir: std::path::absolute(wanted.runtime_dir)?,
        log: dir.join(format!("{name}.log")),
    };
    anyhow::ensure!(
        spec.probe(Duration::from_millis(200)).is_err(),
        "already exported there: volume={} uri={}",
        spec.volume,
        spec.uri()
    );
    let mut child = spec.spawn()?;
    if let Err(error) = spec.wait_until_serving(&mut child, SERVE_LIMIT) {
        // Nobody would know of a process that began to serve later.
        let _ = child.kill();
        let _ = child.wait();
        return Err(error);
    }
    Ok(Exported { uri: spec.uri(), pid: child.id(), volume: spec.volume, log: spec.log })
}

fn remove(volume: &str, runtime_dir: &Path) -> anyhow::Result<Removed> {
    let found = status::read_all(runtime_dir)?;
    let export = found.into_iter().find(|export| export.volume == volume);
    let export = export.with_context(|| {
        format!("not exported here, see spline nbd ls: volume={volume} runtime_dir={}", runtime_dir.display())
    })?;
    let pid = export.pid;
    if export.alive {
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

fn list(found: &[status::ExportStatus], runtime_dir: &Path) -> String {
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
