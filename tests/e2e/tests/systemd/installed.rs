//! What `make install` puts where, what systemd thinks of the units, and who may reach what.

use crate::host::{self, BINARIES, GATEWAY, NEBD};
use anyhow::{Context, ensure};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

const UNITS: [&str; 6] = [
    "spline-gateway.socket",
    "spline-gateway.service",
    "spline-nebd@vm.service",
    "spline-chunkserver@disk0.service",
    "spline-mds.service",
    "spline.target",
];
/// What `systemd-analyze security` may say of each service at most; it calls this "OK".
const EXPOSURE_MAX: f64 = 3.0;

/// All files below `root`, relative to it.
fn files(root: &Path) -> anyhow::Result<BTreeSet<PathBuf>> {
    let (mut found, mut left) = (BTreeSet::new(), vec![root.to_owned()]);
    while let Some(dir) = left.pop() {
        for entry in std::fs::read_dir(dir)? {
            let path = entry?.path();
            if path.is_dir() {
                left.push(path);
            } else {
                found.insert(path.strip_prefix(root)?.to_owned());
            }
        }
    }
    Ok(found)
}

#[test]
fn installing_again_keeps_the_configuration_and_uninstalling_leaves_nothing_else() -> anyhow::Result<()> {
    let root = tempfile::tempdir()?;
    host::make("install", root.path())?;
    let all = files(root.path())?;
    for name in BINARIES {
        ensure!(all.contains(&Path::new("usr/bin").join(name)), "{name} {all:?}");
    }
    let config = root.path().join("etc/spline/gateway.toml");
    std::fs::write(&config, "mds = []\n")?;
    host::make("install", root.path())?;
    ensure!(std::fs::read_to_string(&config)? == "mds = []\n", "a configuration is never overwritten");
    ensure!(files(root.path())? == all, "the second installation leaves nothing of its own");
    host::make("uninstall", root.path())?;
    let left = files(root.path())?;
    ensure!(left.iter().all(|path| path.starts_with("etc/spline")) && !left.is_empty(), "{left:?}");
    Ok(())
}

#[test]
fn the_units_are_right_and_confined() -> anyhow::Result<()> {
    let machine = host::installed()?;
    let said =
        machine.run("sh", &["-c", &format!("systemd-analyze --man=no verify {} 2>&1", UNITS.join(" "))])?;
    ensure!(said.trim().is_empty(), "{said}");
    for unit in UNITS.iter().filter(|unit| unit.ends_with(".service")) {
        let said = machine.run("systemd-analyze", &["--no-pager", "security", unit])?;
        let overall =
            said.lines().find_map(|line| line.split_once("exposure level for ")).context("a summary")?;
        let level: f64 = overall.1.split_whitespace().nth(1).context("a level")?.parse()?;
        ensure!(level < EXPOSURE_MAX, "{said}");
    }
    // A new gateway that is killed for want of memory must not take the old one with it.
    ensure!(machine.property(GATEWAY, "OOMPolicy")? == "continue");
    for unit in [GATEWAY, NEBD] {
        let allowed = machine.property(unit, "SystemCallFilter")?;
        ensure!(
            allowed.contains("sched_setaffinity"),
            "a thread goes to its neighbour's processor: {allowed}"
        );
    }
    for (program, config) in [
        ("spline-gateway", "gateway.toml"),
        ("spline-mds", "mds.toml"),
        ("spline-chunkserver", "chunkserver/disk0.toml.example"),
        ("spline-nebd", "nebd/guest0.toml.example"),
    ] {
        machine.run(program, &["--config", &format!("/etc/spline/{config}"), "--print-config"])?;
    }
    machine.finish();
    Ok(())
}

#[test]
fn each_process_is_its_own_user_and_sockets_are_for_their_groups() -> anyhow::Result<()> {
    let machine = host::with_a_guest()?;
    for (path, wanted) in [
        ("/run/spline/gateway.sock", "spline:spline 660"),
        ("/run/spline/nebd/first.sock", "spline-nebd:spline-nebd 660"),
        ("/run/spline/nebd/second.vhost.sock", "spline-nebd:spline-nebd 660"),
        ("/var/lib/spline/images", "spline:spline 750"),
    ] {
        let found = machine.run("stat", &["--format=%U:%G %a", path])?;
        ensure!(found.trim() == wanted, "path={path} found={found} wanted={wanted}");
    }
    for (unit, wanted) in [(GATEWAY, "spline"), (NEBD, "spline-nebd")] {
        let process = format!("/proc/{}", host::main_pid(&machine, unit)?);
        let found = machine.run("stat", &["--format=%U", &process])?;
        ensure!(found.trim() == wanted, "unit={unit} user={found}");
    }
    // nebd is confined by itself too, which the unit must not prevent.
    let journal = machine.journal(NEBD)?;
    ensure!(journal.contains("seccomp=true"), "{journal}");
    machine.finish();
    Ok(())
}
