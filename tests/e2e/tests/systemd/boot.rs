//! A host that reboots: volumes are there before the guests that want them, and until those have stopped.

use crate::host::{self, GATEWAY, NBD_URI, NEBD};
use anyhow::{Context, ensure};
use spline_conformance::pattern;
use spline_harness::Machine;
use std::time::Duration;

const GUEST: &str = "guest.service";
/// Reads its whole disk when it starts and again when it stops, without a second try: as strict as QEMU.
const GUEST_UNIT: &str = "[Unit]
Requires=spline-nebd@vm.service
After=spline-nebd@vm.service
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=sh -c 'nbdcopy \"$URI\" - >/root/at-start'
ExecStop=sh -c 'nbdcopy \"$URI\" - >/root/at-stop'
[Install]
WantedBy=multi-user.target
";
const IMAGE: &str = "/var/lib/spline/images/first";
const FACTS: [&str; 2] = ["/root/at-start", "/root/at-stop"];

fn read(machine: &Machine, path: &str) -> anyhow::Result<Vec<u8>> {
    std::fs::read(machine.path(path)).with_context(|| path.to_owned())
}

/// When a unit became active in this boot.
fn active_since(machine: &Machine, unit: &str) -> anyhow::Result<Duration> {
    ensure!(machine.property(unit, "ActiveState")? == "active", "{}", machine.journal(unit)?);
    Ok(Duration::from_micros(machine.property(unit, "ActiveEnterTimestampMonotonic")?.parse()?))
}

#[test]
fn a_guest_finds_its_disk_at_boot_and_keeps_it_until_it_has_stopped() -> anyhow::Result<()> {
    let mut machine = host::with_a_guest()?;
    let content = pattern(3, 0, std::fs::metadata(machine.path(IMAGE))?.len() as usize);
    std::fs::write(machine.path(IMAGE), &content)?;
    let unit = GUEST_UNIT.replace("$URI", NBD_URI);
    host::write(&machine, &format!("/etc/systemd/system/{GUEST}"), &unit)?;
    machine.systemctl(&["enable", GUEST])?;

    machine.reboot()?;
    ensure!(machine.systemctl(&["is-system-running"])?.trim() == "running");
    let (gateway, nebd) = (active_since(&machine, GATEWAY)?, active_since(&machine, NEBD)?);
    ensure!(gateway < nebd && nebd < active_since(&machine, GUEST)?, "each is there before who wants it");
    ensure!(nebd < active_since(&machine, "spline.target")?, "the target waits for volumes");
    ensure!(read(&machine, FACTS[0])? == content, "what it read when it started");
    ensure!(!machine.path(FACTS[1]).exists());

    machine.reboot()?;
    ensure!(read(&machine, FACTS[1])? == content, "what it read when the host went down");
    // One lifetime of each until the host went down, and nobody had to be killed for it.
    let journal = machine.run("journalctl", &["--no-pager", "--boot=-1", "--output=cat"])?;
    let at =
        |text: &str| journal.find(text).with_context(|| format!("the journal lacks {text:?}:\n{journal}"));
    ensure!(at("Stopped guest.service")? < at("Stopping spline-nebd@vm.service")?, "{journal}");
    ensure!(at("Stopped spline-nebd@vm.service")? < at("Stopping spline-gateway.service")?, "{journal}");
    ensure!(!journal.contains("SIGKILL") && !journal.contains("Scheduled restart"), "{journal}");
    machine.finish();
    Ok(())
}
