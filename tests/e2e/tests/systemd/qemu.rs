//! A virtual machine in QEMU on a disk of the machine's nebd, while the operator and accidents have their way with the gateway.

use crate::host::{self, GATEWAY, NEBD, VHOST_SOCKET};
use crate::scripts::script;
use anyhow::{Context, ensure};
use spline_harness::guest::Machine as Hardware;
use spline_harness::{Guest, Machine, Stalls, rounds};
use std::io::Write;

/// Answers of the disk to see before and after each of them.
const BEATS: usize = 5;
/// Rounds in `make test`.
const USUAL_ROUNDS: usize = 1;

type Deed = fn(&Machine) -> anyhow::Result<()>;

const DEEDS: [(&str, Deed); 4] = [
    ("gateway killed, in a guest", |machine| {
        machine.systemctl(&["kill", "--signal", "KILL", GATEWAY]).map(drop)
    }),
    ("gateway stopped and started, in a guest", |machine| {
        machine.systemctl(&["stop", "spline-gateway.socket"])?;
        machine.systemctl(&["start", GATEWAY]).map(drop)
    }),
    ("gateway upgraded, in a guest", |machine| machine.systemctl(&["reload", GATEWAY]).map(drop)),
    ("gateway restarted, in a guest", |machine| machine.systemctl(&["restart", GATEWAY]).map(drop)),
];

#[test]
fn a_guest_that_verifies_goes_on_whatever_happens_to_the_gateway() -> anyhow::Result<()> {
    let machine = host::with_a_guest()?;
    let nebd = host::main_pid(&machine, NEBD)?;
    let dir = tempfile::tempdir()?;
    let hardware = Hardware::new([(&*machine.path(VHOST_SOCKET), 4)]);
    let text = script(&[], include_str!("../guest/scripts/faults.sh"));
    let mut guest = Guest::start(dir.path(), "systemd", &hardware, &text)?;
    let mut stalls = Stalls::default();
    for round in 0..rounds(USUAL_ROUNDS) {
        for (what, deed) in DEEDS {
            guest.wait_for_beats(BEATS)?;
            guest.longest_gap()?;
            let before = host::main_pid(&machine, GATEWAY)?;
            deed(&machine).with_context(|| format!("round={round} {what}"))?;
            host::wait_for_another(&machine, GATEWAY, &before)?;
            guest.wait_for_beats(BEATS)?;
            stalls.add(what, guest.longest_gap()?);
        }
    }
    guest.tell("stop")?;
    ensure!(guest.wait_for("passes ")? != "0", "fio has verified nothing");
    guest.finish()?;
    ensure!(host::main_pid(&machine, NEBD)? == nebd, "nebd lives on");
    machine.finish();
    // Not by a macro: the test harness would keep the table of a test that passes.
    let _ = write!(std::io::stderr(), "\n{stalls}");
    Ok(())
}
