//! `spline nbd …`
//!
//! Called by `main`. Must not know the NBD protocol or nebd's flags.

use crate::args;
use crate::export;
use crate::nbd_client::NbdAddress;
use crate::nebd::Listen;
use crate::nebd::status::{self, Kind};
use crate::output::Output;
use serde::Serialize;
use std::path::PathBuf;

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
        args::Nbd::Rm { volume, runtime_dir } => {
            output.print(&export::remove(Kind::Nbd, &volume, &runtime_dir)?, export::Removed::line)
        }
        args::Nbd::Ls { runtime_dir } => output
            .print(&status::read_all(&runtime_dir, Kind::Nbd)?, |found| export::list(found, &runtime_dir)),
    }
}

fn export(wanted: args::NbdExport) -> anyhow::Result<Exported> {
    let listen = match (wanted.tcp, wanted.socket) {
        (Some(address), _) => NbdAddress::Tcp(address),
        (None, Some(path)) => NbdAddress::Unix(std::path::absolute(path)?),
        (None, None) => NbdAddress::Unix(export::default_socket(&wanted.export, "sock")?),
    };
    let (spec, pid) = export::start(wanted.export, Listen::Nbd(listen), "log")?;
    Ok(Exported { uri: spec.place(), pid, volume: spec.volume, log: spec.log })
}
