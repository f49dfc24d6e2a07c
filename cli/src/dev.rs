//! `spline dev`: metadata server, three chunkservers and a gateway in this process, and a nebd process per export.
//!
//! Called by `main`. Modules in the order of a start: [`state`] (the directory and what is remembered) → [`parts`]
//! (what runs in this process) → [`exports`] (nebd processes, kept alive) → [`check`] or [`instructions`].
//!
//! nebd processes are left alone by a crash of this one: the next start finds and keeps them, and their guests see
//! only latency. A clean stop ends them.

pub mod check;
pub mod exports;
pub mod instructions;
pub mod parts;
pub mod state;

use crate::args;
use crate::mds::MdsClient;
use crate::nbd_client::NbdAddress;
use crate::nebd::{Listen, NebdSpec};
use crate::output::Output;
use anyhow::Context;
use exports::Exports;
use parts::Parts;
use spline_process::signals::Stop;
use spline_types::{ByteSize, OnUnavailable, VolumeName};
use state::DevDir;
use std::time::{Duration, Instant};
use tokio::net::UnixStream;

/// The volume that a first start creates, thin.
const FIRST_VOLUME: (&str, ByteSize) = ("disk0", ByteSize(10 << 30));
/// The volume that `--check` writes to: nobody's data.
const CHECK_VOLUME: (&str, ByteSize) = ("check", ByteSize(1 << 30));
const BLOCK_BYTES: u32 = 4096;
/// Time for all parts to serve, far above the usual second: a loaded machine must not fail a demonstration.
const START_LIMIT: Duration = Duration::from_secs(60);

/// Runs the cluster until Ctrl-C, or until the check is done.
///
/// # Errors
/// What could not be started, or what the check found.
pub fn run(wanted: &args::Dev, output: Output) -> anyhow::Result<()> {
    let began = Instant::now();
    let dir = DevDir::open(&wanted.dir, wanted.fresh)?;
    spline_process::logs::init_to_file("dev", &dir.log(), "info,openraft=warn")?;
    let stop = Stop::install().context("can not take over SIGTERM and SIGINT")?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let parts = runtime.block_on(Parts::start(&dir, wanted.copysets))?;
    let until = || runtime.block_on(until_stopped(stop, &parts));
    let outcome = serve(wanted, output, &dir, &runtime, began, until);
    runtime.block_on(parts.shutdown());
    outcome
}

/// All that happens while the parts run: the parts must be stopped whatever comes of it.
fn serve(
    wanted: &args::Dev,
    output: Output,
    dir: &DevDir,
    runtime: &tokio::runtime::Runtime,
    began: Instant,
    until: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let (name, size) = if wanted.check { CHECK_VOLUME } else { FIRST_VOLUME };
    runtime.block_on(ready_volume(dir, name, size))?;
    let address = NbdAddress::Unix(dir.export_socket(name)?);
    let spec = NebdSpec {
        volume: name.to_owned(),
        gateway: dir.gateway_socket(),
        listen: Listen::Nbd(address.clone()),
        read_only: false,
        force: false,
        user: None,
        runtime_dir: dir.runtime_dir(),
        log: dir.nebd_log(name),
    };
    let exports = Exports::start(vec![spec.clone()], START_LIMIT)?;
    let outcome = match wanted.check {
        true => check::run(dir, &spec, &address, output),
        false => {
            output.print(&instructions::facts(dir, &spec, began.elapsed()), instructions::human)?;
            until()
        }
    };
    exports.stop();
    outcome
}

/// Waits for Ctrl-C.
///
/// # Errors
/// If a part can not go on.
async fn until_stopped(stop: Stop, parts: &Parts) -> anyhow::Result<()> {
    let stop = UnixStream::from_std(stop.into_socket()?)?;
    tokio::select! {
        _ = stop.readable() => Ok(()),
        why = parts.failed() => {
            tracing::error!(why, "a part can not go on");
            anyhow::bail!("a part of the cluster can not go on: {why}")
        }
    }
}

/// Waits until the cluster can serve and `name` is there; creates it if need be.
async fn ready_volume(dir: &DevDir, name: &str, size: ByteSize) -> anyhow::Result<()> {
    let mds = MdsClient::connect(&[dir.state().mds.to_string()]).await?;
    parts::wait_until_led(&mds, START_LIMIT).await?;
    let name: VolumeName = name.parse().map_err(anyhow::Error::msg)?;
    if mds.find(&name).await?.is_none() {
        mds.create(&name, size, BLOCK_BYTES, OnUnavailable::Wait).await?;
    }
    Ok(())
}
