//! `spline-nebd`: flags, start, announce, stop.

use clap::Parser;
use prometheus_client::registry::Registry;
use spline_nebd::{Config, Nebd};
use spline_process::CommonFlags;
use spline_process::metrics;
use spline_process::signals::Stop;
use std::net::SocketAddr;
use std::path::PathBuf;

/// Serve a Spline volume to NBD clients; survives every restart of the gateway
#[derive(Parser)]
#[command(
    name = "spline-nebd",
    version,
    after_help = "Example:\n  spline-nebd --volume disk0 --listen-unix /run/spline/disk0.sock\n  \
                  nbdinfo 'nbd+unix:///?socket=/run/spline/disk0.sock'"
)]
struct Flags {
    #[command(flatten)]
    common: CommonFlags,
    /// The volume to serve
    #[arg(long, value_name = "NAME")]
    volume: Option<String>,
    /// The gateway's unix socket
    #[arg(long, value_name = "PATH")]
    gateway_socket: Option<PathBuf>,
    /// Name of the NBD export [default: the volume's name]
    #[arg(long, value_name = "NAME")]
    export: Option<String>,
    /// Unix socket for clients
    #[arg(long, value_name = "PATH")]
    listen_unix: Option<PathBuf>,
    /// TCP address for clients, loopback only
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
    /// TCP address for GET /metrics
    #[arg(long, value_name = "ADDRESS")]
    metrics_listen: Option<SocketAddr>,
    /// Directory for the status file
    #[arg(long, value_name = "DIR")]
    runtime_dir: Option<PathBuf>,
}

impl Flags {
    fn apply(&self, config: &mut Config) {
        let Config { volume, gateway_socket, export, runtime_dir, .. } = config;
        self.volume.clone_into_some(volume);
        self.gateway_socket.clone_into_some(gateway_socket);
        self.export.clone_into_some(export);
        self.runtime_dir.clone_into_some(runtime_dir);
        config.listen_unix = self.listen_unix.clone().or(config.listen_unix.take());
        config.listen_tcp = self.listen_tcp.or(config.listen_tcp);
        config.metrics_listen = self.metrics_listen.or(config.metrics_listen);
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

fn main() -> anyhow::Result<()> {
    spline_nebd::memory::keep();
    let flags = Flags::parse();
    let Some(config) = flags.common.start("nebd", |config| flags.apply(config))? else { return Ok(()) };
    let stop = Stop::install()?;
    let mut registry = Registry::default();
    let metrics_listen = config.metrics_listen;
    let what = format!("volume {}", config.volume);
    let mut nebd = Nebd::spawn(config, &mut registry)?;
    let _metrics = metrics_listen.map(|address| metrics::serve(address, registry)).transpose()?;
    let stopper = nebd.stopper()?;
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        stop.wait();
        stopper.stop();
    })?;
    let Some(uris) = nebd.wait_ready()? else { return Ok(()) };
    let _announced = flags.common.announce(&format!("{what} at {}", uris.join(" ")))?;
    nebd.join()
}
