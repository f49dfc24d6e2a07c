//! docs/upgrade.md, followed as written on a machine of its own.

use crate::host;
use anyhow::{Context, ensure};

/// What the first block does was done by the test, with the binaries under test.
const FIRST: &str = "make build\nsudo make install";

/// The shell blocks of a page, in order.
fn blocks(page: &str) -> Vec<String> {
    let parts = page.split("\n```sh\n").skip(1);
    parts.filter_map(|part| part.split("\n```").next()).map(str::to_owned).collect()
}

#[test]
fn the_page_works_as_written() -> anyhow::Result<()> {
    let page = std::fs::read_to_string(host::repository().join("docs/upgrade.md"))?;
    let blocks = blocks(&page);
    let (first, rest) = blocks.split_first().context("shell blocks")?;
    ensure!(first == FIRST, "{first}");
    ensure!(rest.len() == 9, "{rest:?}");
    let mut machine = spline_harness::Machine::new()?;
    host::make("install", &machine.files())?;
    machine.boot()?;
    for block in rest {
        // A new build is installed in the same way.
        let block = block.replace(FIRST, ":").replace("sudo ", "");
        machine.run("bash", &["-euo", "pipefail", "-c", &block]).with_context(|| block.clone())?;
    }
    machine.finish();
    Ok(())
}
