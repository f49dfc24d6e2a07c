//! The gateway is killed or hangs: systemd starts another one, nebd replays, clients see a pause and no error.

use crate::host::{self, GATEWAY, LIMIT, NEBD};
use crate::load::Load;
use anyhow::ensure;
use spline_harness::{Machine, Stalls, rounds};
use std::io::Write;

/// Rounds in `make test`.
const USUAL_ROUNDS: usize = 3;
/// Rounds of the load to see before and after each crash.
const BEATS: u64 = 5;

/// Hits the running gateway with `signal` and waits until both loads go on with another one.
fn survive(machine: &Machine, loads: &mut [Load; 2], signal: &str) -> anyhow::Result<()> {
    for load in loads.iter_mut() {
        load.wait_for_beats(BEATS)?;
        load.longest();
    }
    let before = host::main_pid(machine, GATEWAY)?;
    machine.systemctl(&["kill", "--signal", signal, GATEWAY])?;
    host::wait_for_another(machine, GATEWAY, &before)?;
    loads.iter_mut().try_for_each(|load| load.wait_for_beats(BEATS))
}

#[test]
fn a_gateway_that_is_killed_is_a_pause() -> anyhow::Result<()> {
    let machine = host::with_a_guest()?;
    let nebd = host::main_pid(&machine, NEBD)?;
    let mut loads = host::loads(&machine)?;
    let mut stalls = Stalls::default();
    for _ in 0..rounds(USUAL_ROUNDS) {
        survive(&machine, &mut loads, "KILL")?;
        stalls.add("gateway killed, nbd", loads[0].longest());
        stalls.add("gateway killed, vhost-user-blk", loads[1].longest());
    }
    for load in loads {
        load.finish()?;
    }
    ensure!(host::main_pid(&machine, NEBD)? == nebd, "the gateway's end must not touch nebd");
    ensure!(machine.property("spline-gateway.socket", "NRefused")? == "0");
    // Not by a macro: the test harness would keep the table of a test that passes.
    let _ = write!(std::io::stderr(), "\n{stalls}");
    machine.finish();
    Ok(())
}

#[test]
fn a_gateway_that_runs_out_of_memory_is_a_pause() -> anyhow::Result<()> {
    let mut machine = host::with_a_guest()?;
    let nebd = host::main_pid(&machine, NEBD)?;
    let mut loads = host::loads(&machine)?;
    loads.iter_mut().try_for_each(|load| load.wait_for_beats(BEATS))?;
    machine.starve(GATEWAY)?;
    for mut load in loads {
        load.wait_for_beats(BEATS)?;
        load.finish()?;
    }
    ensure!(machine.property(GATEWAY, "NRestarts")? != "0", "{}", machine.journal(GATEWAY)?);
    ensure!(host::main_pid(&machine, NEBD)? == nebd, "the gateway's end must not touch nebd");
    machine.finish();
    Ok(())
}

#[test]
fn a_gateway_that_hangs_is_replaced_by_the_watchdog() -> anyhow::Result<()> {
    let machine = host::with_a_guest()?;
    let nebd = host::main_pid(&machine, NEBD)?;
    let mut loads = host::loads(&machine)?;
    survive(&machine, &mut loads, "STOP")?;
    for load in loads {
        load.finish()?;
    }
    let journal = machine.journal(GATEWAY)?;
    ensure!(journal.contains("Watchdog timeout"), "{journal}");
    ensure!(machine.property(GATEWAY, "NRestarts")? == "1", "one that is fed lives on:\n{journal}");
    ensure!(host::main_pid(&machine, NEBD)? == nebd, "the gateway's end must not touch nebd");
    machine.finish();
    Ok(())
}

#[test]
fn a_nebd_that_is_killed_comes_back_and_the_gateway_goes_on() -> anyhow::Result<()> {
    let machine = host::with_a_guest()?;
    let gateway = host::main_pid(&machine, GATEWAY)?;
    let nebd = host::main_pid(&machine, NEBD)?;
    machine.systemctl(&["kill", "--signal", "KILL", NEBD])?;
    host::wait_for_another(&machine, NEBD, &nebd)?;
    machine.wait_for(NEBD, "NRestarts", "1", LIMIT)?;
    for load in host::loads(&machine)? {
        load.finish()?;
    }
    ensure!(host::main_pid(&machine, GATEWAY)? == gateway, "nebd's end must not touch the gateway");
    machine.finish();
    Ok(())
}
