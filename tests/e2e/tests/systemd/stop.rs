//! The gateway is stopped, started and restarted by an operator while clients are at work.

use crate::host::{self, GATEWAY, LIMIT, NEBD};
use crate::load::Load;
use anyhow::ensure;
use spline_harness::Machine;

const SOCKET: &str = "spline-gateway.socket";
/// Rounds of the load to see before and after.
const BEATS: u64 = 5;

fn beat(loads: &mut [Load; 2]) -> anyhow::Result<()> {
    loads.iter_mut().try_for_each(|load| load.wait_for_beats(BEATS))
}

/// The gateway left by itself and was not killed, `times` times.
fn drained(machine: &Machine, times: usize) -> anyhow::Result<()> {
    let journal = machine.journal(GATEWAY)?;
    ensure!(journal.matches("gateway has left").count() == times, "times={times}\n{journal}");
    ensure!(!journal.contains("SIGKILL"), "{journal}");
    Ok(())
}

#[test]
fn clients_wait_while_the_gateway_is_stopped_and_go_on() -> anyhow::Result<()> {
    let machine = host::with_a_guest()?;
    let nebd = host::main_pid(&machine, NEBD)?;
    let mut loads = host::loads(&machine)?;
    beat(&mut loads)?;
    machine.systemctl(&["stop", SOCKET])?;
    ensure!(machine.property(GATEWAY, "ActiveState")? == "inactive", "it goes with its socket");
    drained(&machine, 1)?;
    // A round that is under way may find its answers on their way; the next one can not begin and end.
    let stopped = loads.each_ref().map(Load::beats);
    machine.wait_for(NEBD, "ActiveState", "active", LIMIT)?;
    let waiting = loads.each_ref().map(Load::beats);
    ensure!(stopped.iter().zip(waiting).all(|(before, now)| now <= before + 1), "{stopped:?} {waiting:?}");
    machine.systemctl(&["start", GATEWAY])?;
    beat(&mut loads)?;
    for load in loads {
        load.finish()?;
    }
    ensure!(host::main_pid(&machine, NEBD)? == nebd, "nebd lives on");
    machine.finish();
    Ok(())
}

#[test]
fn a_restart_drains_and_clients_go_on() -> anyhow::Result<()> {
    let machine = host::with_a_guest()?;
    let nebd = host::main_pid(&machine, NEBD)?;
    let mut loads = host::loads(&machine)?;
    beat(&mut loads)?;
    machine.systemctl(&["restart", GATEWAY])?;
    beat(&mut loads)?;
    drained(&machine, 1)?;

    // While the socket is there, who waits at it starts the gateway again: a guest does not stay without one by mistake.
    let before = host::main_pid(&machine, GATEWAY)?;
    machine.systemctl(&["stop", GATEWAY])?;
    host::wait_for_another(&machine, GATEWAY, &before)?;
    beat(&mut loads)?;
    drained(&machine, 2)?;

    machine.systemctl(&["restart", "spline.target"])?;
    beat(&mut loads)?;
    for load in loads {
        load.finish()?;
    }
    drained(&machine, 2)?;
    ensure!(host::main_pid(&machine, NEBD)? == nebd, "nebd lives on");
    machine.finish();
    Ok(())
}
