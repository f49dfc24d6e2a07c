//! `spline-chunkserver`: a chunkserver as a process. A thin shell around [`spline_chunkserver::Chunkserver`].

use clap::Parser;
use prometheus_client::registry::Registry;
use spline_chunkserver::{Chunkserver, Config};
use spline_process::{CommonFlags, metrics, signals};
use std::path::PathBuf;
use std::time::Duration;
use tokio::net::UnixStream;

/// Chunkserver of a Spline cluster: one per disk
#[derive(Parser)]
#[command(name = "spline-chunkserver", version, after_help = EXAMPLE)]
struct Flags {
    #[command(flatten)]
    common: CommonFlags,
    /// Keep chunks and log here
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Serve gateways and peers here
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<String>,
    /// Tell others this address instead
    #[arg(long, value_name = "ADDRESS")]
    advertise: Option<String>,
    /// Failure domain of this server
    #[arg(long, value_name = "NAME")]
    zone: Option<String>,
    /// Metadata server; may be given several times
    #[arg(long, value_name = "ADDRESS")]
    mds: Vec<String>,
    /// Bytes that chunks may take, such as 2T
    #[arg(long, value_name = "SIZE")]
    capacity: Option<String>,
    /// Serve metrics over HTTP here
    #[arg(long, value_name = "ADDRESS")]
    metrics_listen: Option<String>,
}

const EXAMPLE: &str = "Example:\n  spline-chunkserver --data-dir /data/disk0 --listen 10.0.0.1:6800 --zone rack1 --mds 10.0.0.1:6700";

/// How long a shutdown may take after the log has failed: the disk may hang.
const END_LIMIT: Duration = Duration::from_secs(5);

impl Flags {
    fn apply_to(&self, config: &mut Config) {
        let set = |to: &mut String, from: &Option<String>| {
            if let Some(from) = from {
                to.clone_from(from);
            }
        };
        if let Some(dir) = &self.data_dir {
            config.data_dir.clone_from(dir);
        }
        set(&mut config.listen, &self.listen);
        set(&mut config.advertise, &self.advertise);
        set(&mut config.zone, &self.zone);
        set(&mut config.capacity, &self.capacity);
        set(&mut config.metrics_listen, &self.metrics_listen);
        if !self.mds.is_empty() {
            config.mds.clone_from(&self.mds);
        }
    }
}

fn main() -> anyhow::Result<()> {
    let flags = Flags::parse();
    let Some(config) = flags.common.start::<Config>("chunkserver", |config| {
        flags.apply_to(config);
        Ok(())
    })?
    else {
        return Ok(());
    };
    let stop = signals::Stop::install()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let mut registry = Registry::default();
    let metrics_listen = config.metrics_listen()?;
    let stop = {
        let _inside = runtime.enter();
        UnixStream::from_std(stop.into_socket()?)?
    };
    // A new directory may wait for a metadata server for long.
    let started = runtime.block_on(async {
        tokio::select! {
            started = Chunkserver::start(config, &mut registry) => started.map(Some),
            _ = stop.readable() => Ok(None),
        }
    })?;
    let Some(chunkserver) = started else {
        tracing::info!("stopped before it served");
        return Ok(());
    };
    let _metrics = metrics_listen.map(|listen| metrics::serve(listen, registry)).transpose()?;
    let _announced = flags.common.announce(&format!("chunks on {}", chunkserver.wire_address()))?;
    let failed = runtime.block_on(async {
        tokio::select! {
            _ = stop.readable() => None,
            why = chunkserver.failed() => Some(why),
        }
    });
    let Some(why) = failed else {
        tracing::info!("stopping");
        runtime.block_on(chunkserver.shutdown());
        return Ok(());
    };
    tracing::error!(why, "chunkserver can not go on and ends: check the disk, then start it again");
    // What hangs on the disk must not keep the process.
    let shutdown = runtime.spawn(chunkserver.shutdown());
    if runtime.block_on(async { tokio::time::timeout(END_LIMIT, shutdown).await }).is_err() {
        tracing::warn!("ending although the disk does not let go");
    }
    runtime.shutdown_background();
    anyhow::bail!(why)
}
