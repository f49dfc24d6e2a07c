//! `systemctl reload`: another build takes over under running clients, and one that can not serve changes nothing.

use crate::host::{self, GATEWAY, LIMIT, NEBD, another_build};
use crate::load::Load;
use anyhow::{Context, ensure};
use serde_json::Value;
use spline_harness::{Machine, Stalls, binaries, rounds, wait_until};
use std::io::Write;

/// Rounds in `make test`.
const USUAL_ROUNDS: usize = 2;
/// Rounds of the load to see before and after each upgrade.
const BEATS: u64 = 5;
/// The gateway's program.
const PROGRAM: &str = "spline-gateway";
/// Said by nebd for each link that it opens.
const LINK_IS_UP: &str = "link to the gateway is up";

fn status(machine: &Machine) -> anyhow::Result<Value> {
    Ok(serde_json::from_str(&machine.run("spline", &["gateway", "status", "--json"])?)?)
}

fn version(machine: &Machine) -> anyhow::Result<String> {
    status(machine)?["version"].as_str().map(str::to_owned).context("a version")
}

pub(crate) fn links_opened(machine: &Machine) -> anyhow::Result<usize> {
    Ok(machine.journal(NEBD)?.matches(LINK_IS_UP).count())
}

/// What the kernel is told of a process, should memory run out. A container's may be another than the unit's.
fn killed_early(machine: &Machine, pid: &str) -> anyhow::Result<String> {
    machine.run("cat", &[&format!("/proc/{pid}/oom_score_adj")])
}

/// Reloads under both loads; they go on, and nothing is restarted.
fn reload(machine: &Machine, loads: &mut [Load; 2]) -> anyhow::Result<()> {
    loads.iter_mut().try_for_each(|load| load.wait_for_beats(BEATS))?;
    for load in loads.iter() {
        load.longest();
    }
    let before = host::main_pid(machine, GATEWAY)?;
    let score = killed_early(machine, &before)?;
    let reloaded = machine.systemctl(&["reload", GATEWAY]);
    reloaded.with_context(|| machine.journal(GATEWAY).unwrap_or_default())?;
    host::wait_for_another(machine, GATEWAY, &before)?;
    loads.iter_mut().try_for_each(|load| load.wait_for_beats(BEATS))?;
    let running: u64 = host::main_pid(machine, GATEWAY)?.parse()?;
    ensure!(status(machine)?["pid"] == running, "systemd follows the process that serves");
    ensure!(
        killed_early(machine, &running.to_string())? == score,
        "expendable no longer than until it served"
    );
    Ok(())
}

#[test]
fn to_another_build_and_back_is_not_noticed() -> anyhow::Result<()> {
    let machine = host::with_a_guest()?;
    let nebd = host::main_pid(&machine, NEBD)?;
    let mut loads = host::loads(&machine)?;
    let program = std::fs::read(binaries::find("spline-gateway")?)?;
    let first = version(&machine)?;
    let (other_program, other) = another_build(&program, &first)?;
    loads.iter_mut().try_for_each(|load| load.wait_for_beats(BEATS))?;
    let links = links_opened(&machine)?;
    let mut stalls = Stalls::default();
    for _ in 0..rounds(USUAL_ROUNDS) {
        for (program, wanted) in [(&other_program, &other), (&program, &first)] {
            host::replace(&machine, PROGRAM, program)?;
            reload(&machine, &mut loads)?;
            ensure!(version(&machine)? == *wanted);
            stalls.add("gateway upgraded, nbd", loads[0].longest());
            stalls.add("gateway upgraded, vhost-user-blk", loads[1].longest());
        }
    }
    ensure!(links_opened(&machine)? == links, "links are not even reconnected:\n{}", machine.journal(NEBD)?);
    ensure!(machine.property(GATEWAY, "NRestarts")? == "0");
    for load in loads {
        load.finish()?;
    }
    ensure!(host::main_pid(&machine, NEBD)? == nebd, "an upgrade never restarts nebd");
    let journal = machine.journal(GATEWAY)?;
    ensure!(!journal.contains("oom_score_adj"), "the unit lets it be expendable:\n{journal}");
    machine.finish();
    // Not by a macro: the test harness would keep the table of a test that passes.
    let _ = write!(std::io::stderr(), "\n{stalls}");
    Ok(())
}

#[test]
fn the_one_that_took_over_is_watched_and_restarted_as_the_first_was() -> anyhow::Result<()> {
    let machine = host::with_a_guest()?;
    let mut loads = host::loads(&machine)?;
    reload(&machine, &mut loads)?;
    // The new process feeds the watchdog.
    let fed = || machine.property(GATEWAY, "WatchdogTimestampMonotonic");
    for _ in 0..2 {
        let before = fed()?;
        wait_until("the watchdog to be fed", LIMIT, || Ok((fed()? != before).then_some(())))?;
    }
    ensure!(machine.property(GATEWAY, "NRestarts")? == "0", "{}", machine.journal(GATEWAY)?);
    let before = host::main_pid(&machine, GATEWAY)?;
    machine.systemctl(&["kill", "--signal", "KILL", GATEWAY])?;
    host::wait_for_another(&machine, GATEWAY, &before)?;
    loads.iter_mut().try_for_each(|load| load.wait_for_beats(BEATS))?;
    // One that took over also stops as it should.
    reload(&machine, &mut loads)?;
    machine.systemctl(&["restart", GATEWAY])?;
    loads.iter_mut().try_for_each(|load| load.wait_for_beats(BEATS))?;
    for load in loads {
        load.finish()?;
    }
    let journal = machine.journal(GATEWAY)?;
    ensure!(journal.matches("gateway has left").count() == 1, "{journal}");
    machine.finish();
    Ok(())
}

/// Reloads to a build that fails, and answers the reason that the command told: its own words, not those of the processes.
pub(crate) fn reload_fails(machine: &Machine) -> anyhow::Result<String> {
    let since = machine.run("date", &["+%s.%N"])?;
    machine.fails("systemctl", &["reload", GATEWAY])?;
    let since = format!("--since=@{}", since.trim());
    let journal = machine.run("journalctl", &["--no-pager", "--unit", GATEWAY, &since])?;
    let told = journal.lines().filter(|line| line.contains("spline["));
    Ok(told.collect::<Vec<_>>().join("\n"))
}

/// Builds that can not serve, and what the reason must name.
const BAD: [(&str, &str, &str); 3] = [
    ("exits", "#!/bin/sh\necho 'no such thing as a disk' >&2\nexit 1\n", "no such thing as a disk"),
    (
        "panics late",
        "#!/bin/sh\nsleep 2\necho 'panicked at main.rs' >&2\nkill -ABRT $$\n",
        "panicked at main.rs",
    ),
    ("hangs", "#!/bin/sh\nexec sleep 1000\n", "did not get so far in time"),
];

#[test]
fn a_build_that_can_not_serve_leaves_the_old_one_serving() -> anyhow::Result<()> {
    let machine = host::with_a_guest()?;
    let mut loads = host::loads(&machine)?;
    let (gateway, nebd) = (host::main_pid(&machine, GATEWAY)?, host::main_pid(&machine, NEBD)?);
    let links = links_opened(&machine)?;
    for (what, program, reason) in BAD {
        host::replace(&machine, PROGRAM, program.as_bytes())?;
        let journal = reload_fails(&machine).with_context(|| what.to_owned())?;
        ensure!(journal.contains(reason), "build={what} reason={reason:?}\n{journal}");
        ensure!(machine.property(GATEWAY, "ActiveState")? == "active", "{journal}");
        ensure!(host::main_pid(&machine, GATEWAY)? == gateway, "build={what}: the old one serves\n{journal}");
        loads.iter_mut().try_for_each(|load| load.wait_for_beats(BEATS)).context(what)?;
    }
    let group = machine.run("systemctl", &["show", "--value", "--property", "ControlGroup", GATEWAY])?;
    let left = machine.run("cat", &[&format!("/sys/fs/cgroup/systemd{}/cgroup.procs", group.trim())])?;
    ensure!(left.lines().count() == 1, "those that failed are gone: {left:?}");
    ensure!(links_opened(&machine)? == links, "nobody has noticed:\n{}", machine.journal(NEBD)?);
    host::replace(&machine, PROGRAM, &std::fs::read(binaries::find(PROGRAM)?)?)?;
    reload(&machine, &mut loads)?;
    for load in loads {
        load.finish()?;
    }
    ensure!(host::main_pid(&machine, NEBD)? == nebd, "nebd lives on");
    machine.finish();
    Ok(())
}
