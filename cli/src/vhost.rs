//! `spline vhost …`
//!
//! Called by `main`. Must not know the vhost-user protocol or nebd's flags; [`attach`] knows what QEMU and libvirt want.

pub mod attach;

use crate::args;
use crate::export;
use crate::nebd::status::{self, ExportStatus, Kind};
use crate::nebd::{Listen, VhostDevice};
use crate::output::Output;
use anyhow::Context;
use attach::Disk;
use serde::Serialize;
use std::path::{Path, PathBuf};

/// What `vhost export` prints.
#[derive(Serialize)]
struct Exported {
    volume: String,
    socket: PathBuf,
    queues: u16,
    pid: u32,
    log: PathBuf,
    /// QEMU's arguments for the disk.
    qemu: Vec<String>,
    /// QEMU's arguments for memory that the export's process can map; `SIZE` stands for the guest's.
    qemu_memory: Vec<String>,
}

/// What `vhost xml` prints.
#[derive(Serialize)]
struct Xml {
    memory_backing: String,
    disk: String,
}

/// Carries out one command on exports.
///
/// # Errors
/// Why the export does not serve, or the status files can not be read.
pub fn run(command: args::Vhost, output: Output) -> anyhow::Result<()> {
    match command {
        args::Vhost::Export(wanted) => {
            let exported = export(wanted)?;
            if !output.json {
                eprint!("{}", hint(&exported));
            }
            output.print(&exported, |exported| format!("{}\n", exported.socket.display()))
        }
        args::Vhost::Rm { volume, runtime_dir } => {
            output.print(&export::remove(Kind::Vhost, &volume, &runtime_dir)?, export::Removed::line)
        }
        args::Vhost::Ls { runtime_dir } => output
            .print(&status::read_all(&runtime_dir, Kind::Vhost)?, |found| export::list(found, &runtime_dir)),
        args::Vhost::Xml { volume, target, runtime_dir } => {
            let export = export::find(Kind::Vhost, &volume, &runtime_dir)?;
            let disk = disk(&export)?;
            let xml = Xml { memory_backing: attach::memory_xml(), disk: disk.xml(&target) };
            output.print(&xml, |xml| {
                format!(
                    "<!-- into <domain>, once -->\n{}<!-- into <devices> -->\n{}",
                    xml.memory_backing, xml.disk
                )
            })
        }
    }
}

fn export(wanted: args::VhostExport) -> anyhow::Result<Exported> {
    let socket = match wanted.socket {
        Some(path) => std::path::absolute(path)?,
        None => export::default_socket(&wanted.export, "vhost.sock")?,
    };
    let device = VhostDevice {
        socket: socket.clone(),
        queues: wanted.queues,
        threads: wanted.threads,
        serial: wanted.serial,
    };
    let (spec, pid) = export::start(wanted.export, Listen::Vhost(device), "vhost.log")?;
    let disk = Disk { volume: &spec.volume, socket: &socket, queues: wanted.queues };
    Ok(Exported {
        qemu: disk.qemu(),
        qemu_memory: attach::qemu_memory(),
        queues: wanted.queues,
        pid,
        volume: spec.volume.clone(),
        log: spec.log,
        socket: socket.clone(),
    })
}

fn disk(export: &ExportStatus) -> anyhow::Result<Disk<'_>> {
    let socket = export.sockets.first().context("the status file names no socket")?;
    Ok(Disk { volume: &export.volume, socket: Path::new(socket), queues: export.queues.unwrap_or(1) })
}

fn hint(exported: &Exported) -> String {
    let line = |arguments: &[String]| arguments.join(" ");
    format!("qemu-system-x86_64 … -m SIZE {} \\\n  {}\n", line(&exported.qemu_memory), line(&exported.qemu))
}
