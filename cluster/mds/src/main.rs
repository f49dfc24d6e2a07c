//! `spline-mds`: the metadata server as a process. A thin shell around [`spline_mds::Mds`].

use clap::Parser;
use prometheus_client::registry::Registry;
use spline_mds::{Config, Mds};
use spline_process::{CommonFlags, metrics, signals};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;
use tokio::net::UnixStream;

/// How long a shutdown may take after the log has failed: the disk may hang.
const END_LIMIT: Duration = Duration::from_secs(5);

/// Metadata server of a Spline cluster: volumes, sessions, placement
#[derive(Parser)]
#[command(name = "spline-mds", version, after_help = EXAMPLE)]
struct Flags {
    #[command(flatten)]
    common: CommonFlags,
    /// Keep tables and log here
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Serve gRPC here
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<SocketAddr>,
    /// Serve metrics over HTTP here
    #[arg(long, value_name = "ADDRESS")]
    metrics_listen: Option<SocketAddr>,
    /// Number of copysets of a new cluster
    #[arg(long, value_name = "COUNT")]
    copysets: Option<u32>,
    /// Replicas of each copyset of a new cluster
    #[arg(long, value_name = "COUNT")]
    replicas: Option<u32>,
}

const EXAMPLE: &str = "Example:\n  spline-mds --data-dir /var/lib/spline/mds --listen 10.0.0.1:6700";

impl Flags {
    fn apply_to(&self, config: &mut Config) {
        if let Some(dir) = &self.data_dir {
            config.data_dir.clone_from(dir);
        }
        config.listen = self.listen.unwrap_or(config.listen);
        config.metrics_listen = self.metrics_listen.or(config.metrics_listen);
        config.copysets = self.copysets.unwrap_or(config.copysets);
        config.replicas = self.replicas.unwrap_or(config.replicas);
    }
}

fn main() -> anyhow::Result<()> {
    let flags = Flags::parse();
    let Some(config) = flags.common.start::<Config>("mds", |config| {
        flags.apply_to(config);
        Ok(())
    })?
    else {
        return Ok(());
    };
    let stop = signals::Stop::install()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let mut registry = Registry::default();
    let metrics_listen = config.metrics_listen;
    let mds = runtime.block_on(Mds::start(config, &mut registry))?;
    let _metrics = metrics_listen.map(|listen| metrics::serve(listen, registry)).transpose()?;
    let _announced = flags.common.announce(&format!("metadata on {}", mds.address()))?;
    let stop = {
        let _inside = runtime.enter();
        UnixStream::from_std(stop.into_socket()?)?
    };
    let failed = runtime.block_on(async {
        tokio::select! {
            _ = stop.readable() => None,
            why = mds.failed() => Some(why),
        }
    });
    let Some(why) = failed else {
        tracing::info!("stopping");
        runtime.block_on(mds.shutdown());
        return Ok(());
    };
    tracing::error!(
        why,
        "metadata server can not go on and ends: see why, check the disk, then start it again"
    );
    // What hangs on the disk must not keep the process.
    let shutdown = runtime.spawn(mds.shutdown());
    if runtime.block_on(async { tokio::time::timeout(END_LIMIT, shutdown).await }).is_err() {
        tracing::warn!("ending although the disk does not let go");
    }
    runtime.shutdown_background();
    anyhow::bail!(why)
}
