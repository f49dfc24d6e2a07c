//! A whole cluster on one host, out of units: metadata server, three chunkservers, gateway, nebd.

use crate::host::{self, GATEWAY, LIMIT, NBD_SOCKET};
use crate::load::Load;
use anyhow::ensure;
use spline_conformance::disk::nbd::NbdDisk;
use spline_harness::{Machine, wait_until};

/// Rounds of the load to see before and after each fault.
const BEATS: u64 = 3;
const CHUNKSERVERS: [&str; 3] = ["disk0", "disk1", "disk2"];
const MDS: &str = "copysets = 3\n";
const NEBD: &str = "spline-nebd@guest0.service";
const GUEST: &str = "[[export]]\nvolume = \"disk0\"\nlisten_unix = \"/run/spline/nebd/first.sock\"\n";

fn chunkserver(number: usize, name: &str) -> String {
    format!(
        "data_dir = \"/var/lib/spline/chunkserver/{name}\"\nlisten = \"127.0.0.1:680{number}\"\nzone = \"z{number}\"\n\
         spare_chunks = 2\nlog_segment = \"32M\"\n"
    )
}

fn start() -> anyhow::Result<Machine> {
    let machine = host::installed()?;
    host::write(&machine, "/etc/spline/mds.toml", MDS)?;
    let mut units =
        vec!["enable".to_owned(), "spline.target".into(), "spline-mds".into(), GATEWAY.into(), NEBD.into()];
    for (number, name) in CHUNKSERVERS.iter().enumerate() {
        host::write(&machine, &format!("/etc/spline/chunkserver/{name}.toml"), &chunkserver(number, name))?;
        units.push(format!("spline-chunkserver@{name}"));
    }
    host::write(&machine, "/etc/spline/nebd/guest0.toml", GUEST)?;
    machine.systemctl(&units.iter().map(String::as_str).collect::<Vec<_>>())?;
    machine.systemctl(&["start", "--no-block", "spline.target"])?;
    machine.run("spline", &["cluster", "status", "--wait", "60"])?;
    machine.run("spline", &["volume", "create", "disk0", "64M"])?;
    Ok(machine)
}

fn wait_until_served(machine: &Machine) -> anyhow::Result<()> {
    // It was refused for as long as the volume did not exist, and tried again.
    machine.wait_for(NEBD, "ActiveState", "active", LIMIT)
}

#[test]
fn units_make_a_cluster_that_survives_kills_upgrades_and_a_reboot() -> anyhow::Result<()> {
    let mut machine = start()?;
    wait_until_served(&machine)?;
    let socket = machine.path(NBD_SOCKET);
    let mut load = Load::start("nbd", move || Ok(Box::new(NbdDisk::open(&socket, "", 2)?)))?;
    let kill = ["kill", "--signal", "KILL"].as_slice();
    for (deed, unit) in [
        (kill, GATEWAY),
        (&["reload"], GATEWAY),
        (kill, "spline-chunkserver@disk1.service"),
        (kill, "spline-mds.service"),
        (&["reload"], GATEWAY),
        (kill, GATEWAY),
    ] {
        load.wait_for_beats(BEATS)?;
        let before = host::main_pid(&machine, unit)?;
        machine.systemctl(&[deed, &[unit]].concat())?;
        host::wait_for_another(&machine, unit, &before)?;
        load.wait_for_beats(BEATS)?;
    }
    load.finish()?;
    let sum = machine
        .run("sh", &["-c", "nbdcopy 'nbd+unix:///?socket=/run/spline/nebd/first.sock' - | sha256sum"])?;

    machine.reboot()?;
    wait_until_served(&machine)?;
    let again = wait_until("the volume to be read", LIMIT, || {
        let read = "nbdcopy 'nbd+unix:///?socket=/run/spline/nebd/first.sock' - | sha256sum";
        machine.run("bash", &["-euo", "pipefail", "-c", read]).map(Some)
    })?;
    ensure!(again == sum, "what was written is there after a reboot");
    let journal = machine.run("journalctl", &["--no-pager", "--boot=-1", "--output=cat"])?;
    ensure!(!journal.contains("timed out"), "every part stops in time:\n{journal}");
    machine.finish();
    Ok(())
}
