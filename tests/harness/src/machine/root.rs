//! The root file system of machines: Debian with systemd, made once by mmdebstrap, kept under `target/`.

use crate::tool;
use anyhow::Context;
use rustix::fs::{FlockOperation, flock};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Changed with the recipe below, so that it is made anew.
const VERSION: &str = "machine-root-1";
const SUITE: &str = "bookworm";
/// systemd as init, and an NBD client for what units of tests do.
const PACKAGES: &str = "--include=systemd-sysv,libnbd-bin";
/// What nothing reads. Time-based jobs of the distribution would run at any time.
const STRIP: &str = r#"--customize-hook=cd "$1" && rm -rf usr/share/doc/* usr/share/man/* usr/share/locale/* var/cache/apt var/lib/apt/lists &&
	chroot . systemctl mask apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service &&
	mkdir -p var/log/journal"#;

/// The directory of the root, which is made if it is not there.
///
/// # Errors
/// If it can not be made: mmdebstrap needs the network.
pub(super) fn find() -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe()?;
    // target/debug/deps/test
    let target = own.ancestors().nth(3).context("a test lies in target")?;
    let place = target.join(VERSION);
    let lock =
        File::options().create(true).truncate(false).write(true).open(target.join("machine-root.lock"))?;
    flock(&lock, FlockOperation::LockExclusive)?;
    if !place.exists() {
        make(&place)?;
    }
    Ok(place)
}

fn make(place: &Path) -> anyhow::Result<()> {
    let partial = place.with_extension("partial");
    let _ = std::fs::remove_dir_all(&partial);
    let mut command = Command::new("mmdebstrap");
    command.args(["--quiet", "--variant=minbase", PACKAGES, STRIP, SUITE]).arg(&partial);
    tool::run(&mut command).context("making the root of a machine")?;
    Ok(std::fs::rename(&partial, place)?)
}
