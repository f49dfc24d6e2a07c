//! `spline-gateway`: flags, then [`Gateway`] until a signal.

use anyhow::Context;
use clap::Parser;
use spline_gateway::{Config, Gateway, Launch, Predecessor};
use spline_process::{CommonFlags, metrics, signals};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

/// Owns the volume sessions of a host and serves them to nebd.
#[derive(Parser)]
#[command(
    name = "spline-gateway",
    version,
    after_help = "Example:\n  spline-gateway --link-socket /run/spline/gateway.sock --mds 10.0.0.1:6700 --mds 10.0.0.2:6700\n  \
                  spline-gateway --file-root /srv/images --mds ''"
)]
struct Flags {
    #[command(flatten)]
    common: CommonFlags,
    /// Stable name of this gateway; a restarted gateway takes its own sessions over
    #[arg(long)]
    id: Option<String>,
    /// Unix socket on which nebd connects
    #[arg(long, value_name = "PATH")]
    link_socket: Option<PathBuf>,
    /// TCP address of the administration service
    #[arg(long, value_name = "ADDRESS")]
    admin_listen: Option<SocketAddr>,
    /// TCP address of the metrics page
    #[arg(long, value_name = "ADDRESS")]
    metrics_listen: Option<SocketAddr>,
    /// Address of a metadata server; may be given several times; '' serves files only
    #[arg(long, value_name = "HOST:PORT")]
    mds: Vec<String>,
    /// Directory below which file:/abs/path volumes may lie; may be given several times
    #[arg(long, value_name = "DIR")]
    file_root: Vec<PathBuf>,
}

impl Flags {
    fn apply(&self, config: &mut Config) {
        if let Some(id) = &self.id {
            config.id.clone_from(id);
        }
        if let Some(path) = &self.link_socket {
            config.link_socket.clone_from(path);
        }
        config.admin_listen = self.admin_listen.or(config.admin_listen);
        config.metrics_listen = self.metrics_listen.or(config.metrics_listen);
        if !self.mds.is_empty() {
            config.mds = self.mds.iter().filter(|address| !address.is_empty()).cloned().collect();
        }
        if !self.file_root.is_empty() {
            config.file_roots.clone_from(&self.file_root);
        }
    }
}

fn main() -> ExitCode {
    match run(&Flags::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("spline-gateway: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(flags: &Flags) -> anyhow::Result<()> {
    let Some(config) = flags.common.start("spline-gateway", |config| {
        flags.apply(config);
        Ok(())
    })?
    else {
        return Ok(());
    };
    // Before anything else is opened, and before the path may lead elsewhere.
    let launch = Launch::of_this_process().context("can not tell how this process was started")?;
    let predecessor = Predecessor::of_environment()?;
    let stop = signals::Stop::install().context("can not take signals over")?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let mut registry = prometheus_client::registry::Registry::default();
    let (gateway, page) = runtime.block_on(async {
        match predecessor {
            Some(predecessor) => Gateway::take_over(config, launch, predecessor, &mut registry).await,
            None => Gateway::start_as_process(config, launch, &mut registry).await,
        }
    })?;
    let page = page.map(|socket| metrics::serve_on(socket, registry)).transpose()?;
    let announced = flags.common.announce(&format!("links at {}", gateway.link_path().display()))?;
    let stop = stop.into_socket()?;
    let replaced: Option<bool> = runtime.block_on(async {
        let stop = tokio::net::UnixStream::from_std(stop)?;
        tokio::select! {
            told = stop.readable() => {
                told?;
                Ok(gateway.stops().await)
            }
            replaced = gateway.replaced() => Ok::<_, std::io::Error>(Some(replaced)),
        }
    })?;
    if let Some(replaced) = replaced {
        announced.pass_on();
        // At once: sockets and sessions are another process's, and whatever is closed here in order would be closed there.
        std::process::exit(i32::from(!replaced));
    }
    drop(announced);
    runtime.block_on(gateway.shutdown());
    drop(page);
    Ok(())
}
