//! `spline-nebd`: flags, start, announce, stop.

use anyhow::{Context, ensure};
use clap::Parser;
use prometheus_client::registry::Registry;
use spline_nebd::config::ExportConfig;
use spline_nebd::confine::{self, Reach};
use spline_nebd::doors::Doors;
use spline_nebd::metrics::Families;
use spline_nebd::{Config, Nebd};
use spline_process::CommonFlags;
use spline_process::metrics;
use spline_process::ready::{self, PidFile};
use spline_process::signals::Stop;
use spline_types::VolumeName;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};

/// Stack of a thread that only waits for an export: nebd counts its memory in MiB.
const WAITER_STACK_BYTES: usize = 256 << 10;

/// Serve Spline volumes to NBD clients and virtual machines; survives every restart of the gateway
#[derive(Parser)]
#[command(
    name = "spline-nebd",
    version,
    after_help = "The flags describe one export; a config file may hold several.\n\nExamples:\n  \
                  spline-nebd --volume disk0 --listen-unix /run/spline/disk0.sock\n  \
                  nbdinfo 'nbd+unix:///?socket=/run/spline/disk0.sock'\n  \
                  spline-nebd --volume disk1 --vhost-socket /run/spline/disk1.vhost"
)]
struct Flags {
    #[command(flatten)]
    common: CommonFlags,
    /// The gateway's unix socket
    #[arg(long, value_name = "PATH")]
    gateway_socket: Option<PathBuf>,
    /// TCP address for GET /metrics
    #[arg(long, value_name = "ADDRESS")]
    metrics_listen: Option<SocketAddr>,
    /// Directory for the status files
    #[arg(long, value_name = "DIR")]
    runtime_dir: Option<PathBuf>,
    /// User to become once the sockets are bound
    #[arg(long, value_name = "NAME")]
    user: Option<String>,
    /// Do not give up access to files, programs and most of the kernel; for debugging
    #[arg(long)]
    no_confine: bool,
    #[command(flatten)]
    export: ExportFlags,
}

/// What describes the one export of the command line.
#[derive(clap::Args, Clone, Default, PartialEq)]
struct ExportFlags {
    /// The volume to serve
    #[arg(long, value_name = "NAME")]
    volume: Option<String>,
    /// Name of the NBD export [default: the volume's name]
    #[arg(long = "export", value_name = "NAME")]
    name: Option<String>,
    /// Unix socket for NBD clients
    #[arg(long, value_name = "PATH")]
    listen_unix: Option<PathBuf>,
    /// TCP address for NBD clients, loopback only
    #[arg(long, value_name = "ADDRESS")]
    listen_tcp: Option<SocketAddr>,
    /// Allow TCP clients from elsewhere, unencrypted
    #[arg(long)]
    allow_insecure: bool,
    /// Refuse writes
    #[arg(long)]
    read_only: bool,
    /// Take the volume from another gateway that still serves it; that one's writes are refused from then on
    #[arg(long)]
    force: bool,
    /// Unix socket for a vhost-user front-end such as QEMU
    #[arg(long, value_name = "PATH")]
    vhost_socket: Option<PathBuf>,
    /// Most queues that a guest may use [default: 16]
    #[arg(long, value_name = "NUMBER")]
    vhost_queues: Option<u16>,
    /// Threads that serve the queues [default: as many as cores, at most 4]
    #[arg(long, value_name = "NUMBER")]
    vhost_threads: Option<u16>,
    /// Serial number of the device, at most 20 characters [default: the volume's name]
    #[arg(long, value_name = "TEXT")]
    serial: Option<String>,
}

impl Flags {
    fn apply(&self, config: &mut Config) -> anyhow::Result<()> {
        self.gateway_socket.clone_into_some(&mut config.gateway_socket);
        self.runtime_dir.clone_into_some(&mut config.runtime_dir);
        config.metrics_listen = self.metrics_listen.or(config.metrics_listen);
        config.user = self.user.clone().or(config.user.take());
        config.confine &= !self.no_confine;
        if self.export == ExportFlags::default() {
            return Ok(());
        }
        ensure!(
            config.exports.len() <= 1,
            "flags that describe an export do not go with a config file of several, write them there: exports={}",
            config.exports.len()
        );
        if config.exports.is_empty() {
            config.exports.push(ExportConfig::default());
        }
        self.export.apply(&mut config.exports[0]);
        Ok(())
    }
}

impl ExportFlags {
    fn apply(&self, config: &mut ExportConfig) {
        self.volume.clone_into_some(&mut config.volume);
        self.name.clone_into_some(&mut config.name);
        self.serial.clone_into_some(&mut config.serial);
        self.vhost_queues.clone_into_some(&mut config.vhost_queues);
        config.listen_unix = self.listen_unix.clone().or(config.listen_unix.take());
        config.listen_tcp = self.listen_tcp.or(config.listen_tcp);
        config.vhost_socket = self.vhost_socket.clone().or(config.vhost_socket.take());
        config.vhost_threads = self.vhost_threads.or(config.vhost_threads);
        config.allow_insecure |= self.allow_insecure;
        config.read_only |= self.read_only;
        config.force = self.force;
    }
}

/// A flag that overrides a config key if it was given.
trait Override<T> {
    fn clone_into_some(&self, key: &mut T);
}

impl<T: Clone> Override<T> for Option<T> {
    fn clone_into_some(&self, key: &mut T) {
        if let Some(value) = self {
            key.clone_from(value);
        }
    }
}

/// What becomes of an export.
enum Event {
    /// Clients may come, here.
    Serving(Vec<String>),
    /// It has ended: stopped, or why it can not go on.
    Ended { served: bool, result: anyhow::Result<()> },
}

fn main() -> anyhow::Result<()> {
    spline_nebd::memory::keep();
    let flags = Flags::parse();
    let Some(config) = flags.common.start("nebd", |config| flags.apply(config))? else { return Ok(()) };
    let exports = config.check()?;
    let stop = Stop::install()?;
    let doors = exports.iter().map(Doors::take).collect::<anyhow::Result<Vec<_>>>()?;
    let metrics_listen = config.metrics_listen.map(listen_for_scrapers).transpose()?;
    let pid_file = flags.common.prepare_pid_file().context("write the pid file")?;
    // From here on this process reaches only what it has, and every thread is confined: none was started before.
    let reach = Reach {
        removed: doors.iter().flat_map(Doors::files).map(Path::to_owned).collect(),
        renamed: pid_file.as_ref().map(|file| file.path().to_owned()),
    };
    let confinement = confine::enter(config.user.as_deref(), config.confine, &reach)?;
    let mut registry = Registry::default();
    confinement.register(&mut registry);
    let families = Families::new(&mut registry);
    let mut running = Vec::new();
    for (export, doors) in exports.iter().zip(doors) {
        let parts = Nebd::spawn(export, doors, &families)?;
        running.extend(parts.into_iter().map(|part| (export.volume.clone(), part)));
    }
    let _metrics = metrics_listen.map(|listener| metrics::serve_on(listener, registry)).transpose()?;
    let stoppers = running.iter().map(|(_, nebd)| nebd.stopper()).collect::<anyhow::Result<Vec<_>>>()?;
    std::thread::Builder::new().name("signals".into()).stack_size(WAITER_STACK_BYTES).spawn(move || {
        stop.wait();
        stoppers.iter().for_each(spline_nebd::Stopper::stop);
    })?;
    let (parts, (tell, events)) = (running.len(), channel());
    for (volume, nebd) in running {
        let tell = tell.clone();
        let waiter = std::thread::Builder::new().name("waiter".into()).stack_size(WAITER_STACK_BYTES);
        waiter.spawn(move || follow(&volume, nebd, &tell))?;
    }
    drop(tell);
    tend(&events, parts, pid_file)
}

fn listen_for_scrapers(address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).with_context(|| format!("listen for scrapers: metrics_listen={address}"))
}

/// Reports on one export until it has ended.
fn follow(volume: &VolumeName, mut nebd: Nebd, tell: &Sender<(VolumeName, Event)>) {
    let report = |event| {
        // Who does not listen any more is about to end this process.
        let _ = tell.send((volume.clone(), event));
    };
    match nebd.wait_ready() {
        Ok(Some(places)) => {
            report(Event::Serving(places));
            report(Event::Ended { served: true, result: nebd.join() });
        }
        Ok(None) => report(Event::Ended { served: false, result: Ok(()) }),
        Err(error) => report(Event::Ended { served: false, result: Err(error) }),
    }
}

/// Announces readiness when each export serves or has ended, and goes on until the last has ended.
///
/// # Errors
/// Why the last one ended, if it was not stopped. One that can not be served does not take the disks of the others' guests
/// away: it is logged.
fn tend(
    events: &Receiver<(VolumeName, Event)>,
    parts: usize,
    mut pid_file: Option<PidFile>,
) -> anyhow::Result<()> {
    let (mut undecided, mut alive) = (parts, parts);
    let (mut serving, mut announced, mut last) = (Vec::new(), None, Ok(()));
    for (volume, event) in events {
        match event {
            Event::Serving(places) => {
                undecided -= 1;
                serving.push(format!("volume {volume} at {}", places.join(" ")));
            }
            Event::Ended { served, result } => {
                undecided -= usize::from(!served);
                alive -= 1;
                if alive > 0
                    && let Err(error) = &result
                {
                    tracing::error!(%volume, error = format!("{error:#}"), "export ended, the others go on");
                }
                last = result;
            }
        }
        if undecided == 0 && alive > 0 && announced.is_none() {
            announced = Some(ready::announce(&serving.join(", "), pid_file.take())?);
        }
    }
    last
}
