//! docs/three-node.md, run as written.

use anyhow::{Context, ensure};
use spline_harness::binaries;
use std::path::Path;
use std::process::Command;

/// Far above what it takes, in seconds.
const LIMIT: &str = "240";
const BINARIES: [&str; 5] = ["spline", "spline-mds", "spline-chunkserver", "spline-gateway", "spline-nebd"];

/// The shell blocks of a page, in order.
fn blocks(page: &str) -> Vec<String> {
    let mut blocks = Vec::new();
    for part in page.split("\n```sh\n").skip(1) {
        blocks.extend(part.split("\n```").next().map(str::to_owned));
    }
    blocks
}

#[test]
fn the_page_works_as_written() -> anyhow::Result<()> {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/three-node.md");
    let blocks = blocks(&std::fs::read_to_string(page)?);
    let (build, rest) = blocks.split_first().context("shell blocks")?;
    // What it builds is under test already, and lies elsewhere.
    ensure!(build.lines().count() == 2 && build.contains("cargo build"), "{build}");
    ensure!(rest.len() == 7, "{rest:?}");
    let mut path = Vec::new();
    for name in BINARIES {
        path.push(binaries::find(name)?.parent().context("a directory")?.to_owned());
    }
    path.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()));
    let dir = tempfile::tempdir()?;
    // Whatever fails, nothing stays behind.
    let script =
        format!("trap 'spline nbd rm disk0; kill $(jobs -p)' EXIT\n{}\ntrap - EXIT", rest.join("\n"));
    let output = Command::new("timeout")
        .args([LIMIT, "bash", "-euc", &script])
        .env("PATH", std::env::join_paths(path)?)
        .env("TMPDIR", dir.path())
        .env_remove("SPLINE_MDS")
        .env_remove("SPLINE_GATEWAY")
        .env_remove("SPLINE_RUNTIME_DIR")
        .output()?;
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    ensure!(output.status.success(), "{} {said}", output.status);
    for wanted in ["copysets healthy", "export-size: 10737418240", "read 65536/65536", "export removed"] {
        ensure!(said.contains(wanted), "lacks {wanted:?}: {said}");
    }
    Ok(())
}
