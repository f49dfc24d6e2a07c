//! Builds of the gateway that break in the middle of an upgrade, made where a gateway under test takes them.
//!
//! Called by tests that upgrade. Must not know how they break: their names say it, to the program `broken_gateway` too.

use crate::workload::RECOVERY_LIMIT;
use anyhow::Context;
use spline_harness::{binaries, wait_until};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

/// The build that breaks as `name` says, in `dir`, where nobody else may write; `program` is where `broken_gateway` lies.
///
/// # Errors
/// Those of the system.
pub fn build(dir: &Path, program: &Path, name: &str) -> anyhow::Result<PathBuf> {
    let (path, own) = (dir.join(name), dir.join("broken_gateway"));
    if !own.exists() {
        // The build's directory may be anybody's.
        std::fs::copy(program, &own)?;
    }
    let real = binaries::find("spline-gateway")?;
    std::fs::write(dir.join(format!("{name}.real")), real.to_str().context("a path of letters")?)?;
    symlink(&own, &path)?;
    Ok(path)
}

/// Waits until the message is said at which `build` waits; answers the process id of the real gateway behind it.
///
/// # Errors
/// If it is not said.
pub fn reached(build: &Path) -> anyhow::Result<u32> {
    let path = build.with_extension("reached");
    wait_until("the message", RECOVERY_LIMIT, || {
        let told = std::fs::read_to_string(&path).unwrap_or_default();
        // Whole with its line's end.
        told.strip_suffix('\n').map(|pid| pid.parse().context("process id")).transpose()
    })
}

/// Lets a build go on that waits.
///
/// # Errors
/// Those of the system.
pub fn go_on(build: &Path) -> anyhow::Result<()> {
    Ok(std::fs::write(build.with_extension("go"), "")?)
}
