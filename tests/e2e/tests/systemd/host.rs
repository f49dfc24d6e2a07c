//! A machine on which Spline is installed as docs/upgrade.md says, with one guest whose two disks are files.

use crate::load::Load;
use anyhow::{Context, ensure};
use spline_conformance::disk::nbd::NbdDisk;
use spline_conformance::disk::virtio::GuestDisk;
use spline_harness::{Machine, binaries, tool};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Far above what systemd needs to start or restart a unit, however busy the machine is.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);
/// The programs, as `make install` knows them.
pub(crate) const BINARIES: [&str; 5] =
    ["spline", "spline-mds", "spline-chunkserver", "spline-gateway", "spline-nebd"];
pub(crate) const GATEWAY: &str = "spline-gateway.service";
/// The guest's nebd.
pub(crate) const NEBD: &str = "spline-nebd@vm.service";
/// Where NBD clients find the guest's first disk, and its URI.
pub(crate) const NBD_SOCKET: &str = "/run/spline/nebd/first.sock";
pub(crate) const NBD_URI: &str = "nbd+unix:///?socket=/run/spline/nebd/first.sock";
/// Where the second is a vhost-user-blk device.
pub(crate) const VHOST_SOCKET: &str = "/run/spline/nebd/second.vhost.sock";
/// Size of each disk.
const DISK: &str = "128M";

const FILES_ONLY: &str = "mds = []\nfile_roots = [\"/var/lib/spline/images\"]\n";
const GUEST: &str = r#"
[[export]]
volume = "file:/var/lib/spline/images/first"
listen_unix = "/run/spline/nebd/first.sock"

[[export]]
volume = "file:/var/lib/spline/images/second"
vhost_socket = "/run/spline/nebd/second.vhost.sock"
"#;

/// The repository.
pub(crate) fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Runs a target of the Makefile that takes the binaries under test and installs below `root`.
pub(crate) fn make(target: &str, root: &Path) -> anyhow::Result<String> {
    let mut place = None;
    for name in BINARIES {
        place = binaries::find(name)?.parent().map(Path::to_owned);
    }
    let place = place.context("a directory of binaries")?;
    let mut command = Command::new("make");
    command.arg(target).arg("--directory").arg(repository());
    command.arg(format!("DESTDIR={}", root.display())).arg(format!("BIN_DIR={}", place.display()));
    tool::run(&mut command)
}

/// A booted machine with Spline installed, and nothing configured or started.
pub(crate) fn installed() -> anyhow::Result<Machine> {
    let mut machine = Machine::new()?;
    make("install", &machine.files())?;
    machine.boot()?;
    machine.run("systemd-sysusers", &[])?;
    machine.run("systemd-tmpfiles", &["--create"])?;
    machine.systemctl(&["daemon-reload"])?;
    Ok(machine)
}

/// Writes a file of the machine.
pub(crate) fn write(machine: &Machine, path: &str, text: &str) -> anyhow::Result<()> {
    std::fs::write(machine.path(path), text).with_context(|| path.to_owned())
}

/// A machine whose gateway and nebd are enabled and run; the guest's disks are files.
pub(crate) fn with_a_guest() -> anyhow::Result<Machine> {
    with_a_guest_and("")
}

/// As [`with_a_guest`], with more lines in the gateway's config.
pub(crate) fn with_a_guest_and(gateway_config: &str) -> anyhow::Result<Machine> {
    let machine = installed()?;
    write(&machine, "/etc/spline/gateway.toml", &format!("{FILES_ONLY}{gateway_config}"))?;
    write(&machine, "/etc/spline/nebd/vm.toml", GUEST)?;
    machine.systemctl(&["enable", "spline.target", GATEWAY, NEBD])?;
    machine.systemctl(&["start", GATEWAY])?;
    for name in ["first", "second"] {
        let path = format!("/var/lib/spline/images/{name}");
        machine.run("truncate", &["--size", DISK, &path])?;
        machine.run("chown", &["spline:", &path])?;
    }
    machine.systemctl(&["start", NEBD])?;
    Ok(machine)
}

/// Puts a program in the place of one that is installed, as `make install` does.
pub(crate) fn replace(machine: &Machine, name: &str, program: &[u8]) -> anyhow::Result<()> {
    let (new, place) =
        (machine.path(&format!("/usr/bin/.{name}.new")), machine.path(&format!("/usr/bin/{name}")));
    std::fs::write(&new, program)?;
    std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o755))?;
    Ok(std::fs::rename(new, place)?)
}

/// The same build with another version: every place where the version begins is changed, to a number of the same length. An
/// optimised build has the first four bytes as an operand of one instruction, the rest as that of another.
pub(crate) fn another_build(program: &[u8], version: &str) -> anyhow::Result<(Vec<u8>, String)> {
    let (major, rest) = version.split_once('.').context("a version")?;
    let other = format!("{}.{rest}", if major == "9" { "8" } else { "9" });
    let (from, to) = (version.get(..4).context("a version")?.as_bytes(), &other.as_bytes()[..4]);
    let mut changed = program.to_vec();
    let mut at = 0;
    while let Some(found) = changed[at..].windows(from.len()).position(|window| window == from) {
        at += found;
        changed[at..at + to.len()].copy_from_slice(to);
        at += to.len();
    }
    ensure!(changed != program, "the version does not stand in the program: version={version}");
    Ok((changed, other))
}

/// Clients of both disks at work.
pub(crate) fn loads(machine: &Machine) -> anyhow::Result<[Load; 2]> {
    let (nbd, vhost) = (machine.path(NBD_SOCKET), machine.path(VHOST_SOCKET));
    Ok([
        Load::start("nbd", move || Ok(Box::new(NbdDisk::open(&nbd, "", 2)?)))?,
        Load::start("vhost-user-blk", move || Ok(Box::new(GuestDisk::open(&vhost, 2, false)?)))?,
    ])
}

/// What tells one life of a unit's process from another.
pub(crate) fn main_pid(machine: &Machine, unit: &str) -> anyhow::Result<String> {
    let pid = machine.property(unit, "MainPID")?;
    ensure!(pid != "0", "does not run: unit={unit}");
    Ok(pid)
}

/// Waits until a unit runs as another process than `before`.
pub(crate) fn wait_for_another(machine: &Machine, unit: &str, before: &str) -> anyhow::Result<()> {
    spline_harness::wait_until(&format!("{unit} to be another process"), LIMIT, || {
        let state = machine.property(unit, "ActiveState")?;
        ensure!(state == "active", "unit={unit} state={state}");
        Ok((main_pid(machine, unit)? != before).then_some(()))
    })
}
