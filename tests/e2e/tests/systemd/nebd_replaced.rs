//! The rare case: another build of nebd takes a running one's place. QEMU reconnects and its record of what was not answered is
//! carried out; NBD clients connect again.

use crate::host::{self, GATEWAY, LIMIT, NBD_SOCKET, NEBD, VHOST_SOCKET};
use crate::scripts::script;
use anyhow::{Context, ensure};
use spline_fault::history::History;
use spline_fault::workload::{BLOCKS, Workload};
use spline_harness::guest::Machine as Hardware;
use spline_harness::{Guest, Machine, Stalls, binaries, rounds};
use std::io::Write;

/// Answers of the guest's disk to see before and after each of them.
const BEATS: usize = 5;
/// Answers to the NBD client.
const PROGRESS: u64 = 200;
/// Rounds in `make test`.
const USUAL_ROUNDS: usize = 1;
const PROGRAM: &str = "spline-nebd";

/// How the one that runs makes place, and what the table calls it.
const WAYS: [(&str, &[&str]); 2] = [
    ("nebd replaced by restart", &["restart", NEBD]),
    ("nebd replaced after a kill", &["kill", "--signal", "KILL", NEBD]),
];

/// What the process that runs says of its version.
fn running(machine: &Machine) -> anyhow::Result<String> {
    let program = format!("/proc/{}/exe", host::main_pid(machine, NEBD)?);
    let said = machine.run(&program, &["--version"])?;
    said.split_whitespace().last().map(str::to_owned).context("a version")
}

#[test]
fn another_build_of_nebd_takes_over_under_load() -> anyhow::Result<()> {
    let machine = host::with_a_guest()?;
    let gateway = host::main_pid(&machine, GATEWAY)?;
    let first = std::fs::read(binaries::find(PROGRAM)?)?;
    let version = running(&machine)?;
    let (other, other_version) = host::another_build(&first, &version)?;
    let dir = tempfile::tempdir()?;
    let hardware = Hardware::new([(&*machine.path(VHOST_SOCKET), 4)]);
    let text = script(&[], include_str!("../guest/scripts/faults.sh"));
    let mut guest = Guest::start(dir.path(), "nebd", &hardware, &text)?;
    // A client without a name: this export has none.
    let client = Workload::start(&machine.path(NBD_SOCKET), "", History::new(BLOCKS), 1);
    client.expect_nebd_to_die();
    let mut stalls = Stalls::default();
    for round in 0..rounds(USUAL_ROUNDS) {
        for ((what, deed), (program, wanted)) in
            WAYS.into_iter().zip([(&other, &other_version), (&first, &version)])
        {
            guest.wait_for_beats(BEATS)?;
            client.wait_for_progress(PROGRESS)?;
            guest.longest_gap()?;
            host::replace(&machine, PROGRAM, program)?;
            let (before, connected) = (host::main_pid(&machine, NEBD)?, client.reconnected());
            machine.systemctl(deed).with_context(|| format!("round={round} {what}"))?;
            host::wait_for_another(&machine, NEBD, &before)?;
            machine.wait_for(NEBD, "ActiveState", "active", LIMIT)?;
            guest.wait_for_beats(BEATS)?;
            client.wait_for_progress(PROGRESS)?;
            ensure!(running(&machine)? == *wanted, "{what}: the new build runs");
            ensure!(client.reconnected() > connected, "{what}: NBD clients connect again");
            stalls.add(what, guest.longest_gap()?);
        }
    }
    client.finish().context("nothing of the NBD client is lost")?;
    guest.tell("stop")?;
    ensure!(guest.wait_for("passes ")? != "0", "fio has verified nothing");
    guest.finish().context("no error in the guest")?;
    ensure!(host::main_pid(&machine, GATEWAY)? == gateway, "the gateway lives on");
    machine.finish();
    // Not by a macro: the test harness would keep the table of a test that passes.
    let _ = write!(std::io::stderr(), "\n{stalls}");
    Ok(())
}
