//! Debian's nbd-client maps an NBD export over TCP with two connections; the gateway is killed under it.

use crate::scripts::script;
use anyhow::ensure;
use spline_harness::guest::Machine;
use spline_harness::{Cluster, Guest, Process, Stalls, Tool, binaries, cluster, ports, rounds, wait_until};
use std::io::Write;

/// Answers of the disk to see before a fault and after it.
const BEATS: usize = 10;
/// Rounds in `make test`.
const USUAL_ROUNDS: usize = 2;
const VOLUME: &str = "disk";
const SIZE: u64 = 128 << 20;

#[test]
fn in_a_guest_sees_only_latency_when_the_gateway_dies() -> anyhow::Result<()> {
    let mut cluster = Cluster::start()?;
    cluster.create_volume(VOLUME, &SIZE.to_string())?;
    let address = ports::free(1)?[0];
    let arguments = ["--volume", VOLUME, "--listen-tcp", &address.to_string(), "--gateway-socket"];
    let mut arguments: Vec<_> = arguments.map(Into::into).to_vec();
    arguments.extend([
        cluster.gateway_socket().into(),
        "--runtime-dir".into(),
        cluster.dir().join("run").into(),
    ]);
    let mut nebd = Process::new("nebd-tcp", binaries::find("spline-nebd")?, arguments, cluster.dir());
    nebd.start()?;
    wait_until("nebd to serve", cluster::START_LIMIT, || {
        nebd.assert_running()?;
        Tool::new("nbdinfo").args(["--size", &format!("nbd://{address}/{VOLUME}")]).run().map(Some)
    })?;

    let settings = [("port", address.port().to_string()), ("volume", VOLUME.to_owned())];
    let text = script(&settings, include_str!("scripts/nbd_client.sh"));
    let mut guest = Guest::start(cluster.dir(), "nbd-client", &Machine::new([]), &text)?;
    let size = guest.wait_for("mapped ")?;
    ensure!(size == SIZE.to_string(), "size={size}");
    let mut stalls = Stalls::default();
    for _ in 0..rounds(USUAL_ROUNDS) {
        guest.wait_for_beats(BEATS)?;
        guest.longest_gap()?;
        cluster.gateway.restart()?;
        guest.wait_for_beats(BEATS)?;
        stalls.add("gateway, under nbd-client", guest.longest_gap()?);
    }
    guest.tell("stop")?;
    guest.wait_for("unmapped")?;
    guest.finish()?;
    // Not by a macro: the test harness would keep the table of a test that passes.
    let _ = write!(std::io::stderr(), "\n{stalls}");
    Ok(())
}
