//! Where the binaries under test lie; built if they are not there.

use anyhow::{Context, ensure};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

/// The binary `name` of this workspace, of the same build profile as the running test. `SPLINE_BIN_DIR` names another
/// directory. A binary that is missing is built; one that is there is taken as it is (`make test` builds first).
///
/// # Errors
/// If it can not be built.
pub fn find(name: &str) -> anyhow::Result<PathBuf> {
    if let Some(dir) = std::env::var_os("SPLINE_BIN_DIR") {
        let path = PathBuf::from(dir).join(name);
        ensure!(path.is_file(), "no such binary, see SPLINE_BIN_DIR: path={}", path.display());
        return Ok(path);
    }
    let dir = profile_dir()?;
    let path = dir.join(name);
    // One build at a time in this process; cargo's own lock orders those of other processes.
    static BUILD: Mutex<()> = Mutex::new(());
    let _one = BUILD.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if !path.is_file() {
        build(name, &dir)?;
    }
    ensure!(path.is_file(), "built, but not found: path={}", path.display());
    Ok(path)
}

/// `target/debug` or `target/release`: the directory above the running test's, which is `deps`.
fn profile_dir() -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe().context("can not tell where this test lies")?;
    let dir = own.parent().context("a test lies in a directory")?;
    let dir = if dir.ends_with("deps") { dir.parent().unwrap_or(dir) } else { dir };
    Ok(dir.to_owned())
}

fn build(name: &str, dir: &Path) -> anyhow::Result<()> {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../Cargo.toml");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["build", "--workspace", "--bin", name, "--manifest-path"]).arg(manifest);
    if dir.ends_with("release") {
        command.arg("--release");
    }
    if let Some(target) = dir.parent() {
        command.arg("--target-dir").arg(target);
    }
    let status = command.status().context("can not run cargo")?;
    ensure!(status.success(), "can not build: binary={name} {status}");
    Ok(())
}
