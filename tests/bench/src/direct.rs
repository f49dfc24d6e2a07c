//! Servers that do without a link: nebd's vhost-user-blk device, or its NBD connections, and the gateway's file engine in one
//! process. What nebd and the gateway cost beyond it is the cost of the split.
//!
//! Called by the binary `spline-bench-direct`. Of a device one thread speaks vhost-user, as in nebd, and one serves the queues
//! ([`worker`]); [`nbd`] is one thread. Must not know: links, sessions, replay.
#![allow(unsafe_code)]

pub mod nbd;
pub mod worker;

use anyhow::Context;
use prometheus_client::registry::Registry;
use rustix::event::EventfdFlags;
use spline_gateway::local::LocalFile;
use spline_link::{Accepted, Hello, InstanceId, LinkVersion, Mode, VersionRange, VolumeTraits};
use spline_nebd::config::{Checked, Config, ExportConfig};
use spline_nebd::doors::Doors;
use spline_nebd::export::Export;
use spline_nebd::metrics::Families;
use spline_nebd::vhost::control;
use spline_nebd::vhost::order::{Mailbox, Order, Report};
use spline_types::limits::{REQUEST_BYTES_MAX, VOLUME_INFLIGHT_BYTES, VOLUME_INFLIGHT_REQUESTS};
use spline_types::{BlockSize, Epoch, Geometry, OnUnavailable};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::channel;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use worker::Worker;

/// Serves `file` at `socket` to one front-end at a time, until the process is killed. `dir` is for status files.
///
/// # Errors
/// If the file can not be served, or the socket not be listened on.
pub fn serve(file: &Path, socket: &Path, dir: PathBuf) -> anyhow::Result<()> {
    let export = ExportConfig {
        volume: format!("file:{}", file.display()),
        vhost_socket: Some(socket.to_owned()),
        vhost_queues: 1,
        ..ExportConfig::default()
    };
    let config = Config { runtime_dir: dir, exports: vec![export], ..Config::default() };
    let checked = config.check()?.pop().context("one export was asked for")?;
    let doors = Doors::take(&checked)?.vhost.context("it has a socket")?;
    let (orders, reports) = (Arc::new(Mailbox::new()?), Arc::new(Mailbox::new()?));
    let (file, theirs) = (file.to_owned(), (Arc::clone(&orders), Arc::clone(&reports)));
    let shown = shown(&checked);
    let export = shown.clone();
    let thread = std::thread::Builder::new().name("queues".into()).spawn(move || {
        let (orders, reports) = theirs;
        let served = serve_queues(&file, export, &orders, &reports);
        // Control waits for this.
        reports.put(Report::Ended(served));
    })?;
    let (tell, _serving) = channel();
    let setup = control::Setup {
        export: shown,
        device: checked.vhost.clone().context("it has a device")?,
        doors,
        hello: hello(&checked),
        workers: vec![Arc::clone(&orders)],
        reports,
        metrics: Families::new(&mut Registry::default()).of("direct", "vhost"),
        // Never rung: whoever started the process ends it.
        stop: rustix::event::eventfd(0, EventfdFlags::CLOEXEC)?,
        serving: tell,
    };
    let result = control::run(setup);
    orders.put(Order::End);
    anyhow::ensure!(thread.join().is_ok(), "the thread of the queues panicked");
    result
}

fn shown(checked: &Checked) -> Export {
    Export {
        name: checked.name.clone(),
        description: String::new(),
        // Known when the file is open.
        geometry: Geometry { size: 0, block_size: BlockSize::B512 },
        traits: VolumeTraits::default(),
        read_only: false,
    }
}

fn hello(checked: &Checked) -> Hello {
    Hello {
        versions: VersionRange::OURS,
        features: 0,
        mode: Mode::Open,
        read_only: false,
        force: false,
        instance: InstanceId(1),
        identity: None,
        volume: checked.volume.clone(),
    }
}

fn serve_queues(
    path: &Path,
    mut export: Export,
    orders: &Arc<Mailbox<Order>>,
    reports: &Arc<Mailbox<Report>>,
) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let file = LocalFile::open(path)?;
        let accepted = accepted(&file);
        export.update(&accepted, false);
        reports.put(Report::Accepted(Box::new(accepted)));
        let mut worker = Worker::new(file, export, Arc::clone(orders), Arc::clone(reports))?;
        std::future::poll_fn(|cx| worker.poll(cx)).await?;
        worker.close().await;
        Ok(())
    })
}

/// What a gateway would say of the file.
fn accepted(file: &LocalFile) -> Accepted {
    Accepted {
        version: LinkVersion::V3,
        features: 0,
        epoch: Epoch::new(0),
        identity: file.identity(),
        geometry: file.geometry(),
        traits: file.traits(),
        on_unavailable: OnUnavailable::Wait,
        request_bytes_max: REQUEST_BYTES_MAX,
        requests_max: VOLUME_INFLIGHT_REQUESTS as u32,
        bytes_max: VOLUME_INFLIGHT_BYTES,
    }
}

/// A descriptor that tells the runtime's thread when it can be read.
fn watched(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: it is owned, so that the number stays its own until it is dropped.
    Ok(unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?)
}
