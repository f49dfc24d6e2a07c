//! Builds of Spline that fail once they have proved that they can serve: before the commit the old gateway goes on, afterwards
//! systemd starts one again. Clients see a pause and no error.

use crate::host::{self, GATEWAY, NEBD};
use crate::load::Load;
use crate::upgrade::{links_opened, reload_fails};
use anyhow::{Context, ensure};
use spline_harness::{Machine, Stalls, binaries};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

/// Rounds of the load to see before and after each of them.
const BEATS: u64 = 5;
/// Where such builds lie.
const PLACE: &str = "/usr/lib/spline-test";
/// Broken if it is to take over; if systemd starts it, a gateway like every other, which will be upgraded to what is installed.
const SCRIPT: &str = "#!/bin/bash
[ -z \"$SPLINE_HANDOVER_FD\" ] || exec $PLACE/$NAME \"$@\"
exec -a /usr/bin/spline-gateway $PLACE/real \"$@\"
";
/// What a new process may take, so that one that hangs does not take long.
const CONFIG: &str = "upgrade_limit = \"6s\"\n";

/// Builds that fail before the commit, and what the reason must name. Kinds of messages: 5 sockets, the first one after the proof;
/// 9 prepared.
const BEFORE: [(&str, &[&str]); 3] = [
    ("dies-at-5", &["phase=preparation", "exit status: 3"]),
    ("panics-at-5", &["phase=preparation", "exit status: 101", "a build that panics"]),
    ("hangs-at-9", &["phase=preparation", "did not get so far in time: limit=6s"]),
];

/// Builds that fail after it: 10 commit, 11 yours.
const AFTER: [&str; 3] = ["dies-at-10", "dies-at-11", "hangs-at-10"];

/// Installs a build that breaks as its name says in an upgrade, and is a gateway like every other when systemd starts it.
fn install(machine: &Machine, name: &str) -> anyhow::Result<()> {
    let place = machine.path(PLACE);
    std::fs::create_dir_all(&place)?;
    for (program, to) in [("broken_gateway", name), ("spline-gateway", "real")] {
        let to = place.join(to);
        // The real one may be running.
        if to.exists() {
            continue;
        }
        std::fs::copy(binaries::find(program)?, &to)?;
        std::fs::set_permissions(&to, std::fs::Permissions::from_mode(0o755))?;
    }
    std::fs::write(place.join(format!("{name}.real")), format!("{PLACE}/real"))?;
    let program = SCRIPT.replace("$NAME", name).replace("$PLACE", PLACE);
    host::replace(machine, "spline-gateway", program.as_bytes())
}

fn beat(loads: &mut [Load; 2]) -> anyhow::Result<()> {
    loads.iter_mut().try_for_each(|load| load.wait_for_beats(BEATS))
}

/// The longest that a client waited since this was asked before.
fn longest(loads: &[Load; 2]) -> Duration {
    loads[0].longest().max(loads[1].longest())
}

#[test]
fn one_that_fails_before_the_commit_leaves_the_old_one_serving() -> anyhow::Result<()> {
    let machine = host::with_a_guest_and(CONFIG)?;
    let mut loads = host::loads(&machine)?;
    beat(&mut loads)?;
    let (gateway, links) = (host::main_pid(&machine, GATEWAY)?, links_opened(&machine)?);
    for (name, said) in BEFORE {
        install(&machine, name)?;
        let told = reload_fails(&machine).with_context(|| name.to_owned())?;
        for word in said {
            ensure!(told.contains(word), "build={name} expected={word:?}\n{told}");
        }
        beat(&mut loads).context(name)?;
        ensure!(host::main_pid(&machine, GATEWAY)? == gateway, "build={name}: the old one serves");
    }
    ensure!(links_opened(&machine)? == links, "nobody has noticed:\n{}", machine.journal(NEBD)?);
    ensure!(machine.property(GATEWAY, "NRestarts")? == "0");
    for load in loads {
        load.finish()?;
    }
    machine.finish();
    Ok(())
}

#[test]
fn one_that_fails_after_the_commit_is_a_crash() -> anyhow::Result<()> {
    let machine = host::with_a_guest_and(CONFIG)?;
    let nebd = host::main_pid(&machine, NEBD)?;
    let mut loads = host::loads(&machine)?;
    let mut stalls = Stalls::default();
    for (restarts, name) in (1..).zip(AFTER) {
        install(&machine, name)?;
        beat(&mut loads)?;
        longest(&loads);
        let before = host::main_pid(&machine, GATEWAY)?;
        let told = reload_fails(&machine).with_context(|| name.to_owned())?;
        ensure!(told.contains("failed after the commit"), "build={name}\n{told}");
        host::wait_for_another(&machine, GATEWAY, &before)?;
        beat(&mut loads).context(name)?;
        ensure!(machine.property(GATEWAY, "NRestarts")? == restarts.to_string(), "build={name}");
        stalls.add(name, longest(&loads));
    }
    for load in loads {
        load.finish()?;
    }
    ensure!(host::main_pid(&machine, NEBD)? == nebd, "nebd lives on");
    machine.finish();
    // Not by a macro: the test harness would keep the table of a test that passes.
    let _ = write!(std::io::stderr(), "\n{stalls}");
    Ok(())
}

#[test]
fn one_that_hangs_when_the_old_one_has_left_is_replaced_by_the_watchdog() -> anyhow::Result<()> {
    let machine = host::with_a_guest_and(CONFIG)?;
    let mut loads = host::loads(&machine)?;
    // 15 main: it serves everything, and is told that it is the only one.
    install(&machine, "hangs-at-15")?;
    beat(&mut loads)?;
    longest(&loads);
    let before = host::main_pid(&machine, GATEWAY)?;
    machine.systemctl(&["reload", GATEWAY])?;
    let hangs = host::main_pid(&machine, GATEWAY)?;
    ensure!(hangs != before, "systemd follows the new one");
    host::wait_for_another(&machine, GATEWAY, &hangs)?;
    beat(&mut loads)?;
    let mut stalls = Stalls::default();
    stalls.add("hangs-at-15", longest(&loads));
    for load in loads {
        load.finish()?;
    }
    let journal = machine.journal(GATEWAY)?;
    ensure!(journal.contains("Watchdog timeout"), "{journal}");
    machine.finish();
    let _ = write!(std::io::stderr(), "\n{stalls}");
    Ok(())
}
