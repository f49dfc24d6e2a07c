//! qemu-img: convert, compare, map and bench against an export.

use anyhow::ensure;
use spline_conformance::{MIB, sparse_image};
use spline_harness::{Rig, Tool};

#[test]
fn convert_and_compare() -> anyhow::Result<()> {
    Rig::both(|rig| {
        let bytes = 96 * MIB;
        let (raw, qcow2) = (rig.dir().join("image"), rig.dir().join("image.qcow2"));
        sparse_image(&raw, bytes, &[(0, 70_000), (31 * MIB, 3 << 20), (90 * MIB + 512, 4096)])?;
        let (raw, qcow2) = (raw.to_string_lossy().into_owned(), qcow2.to_string_lossy().into_owned());
        Tool::new("qemu-img").args(["convert", "-f", "raw", "-O", "qcow2", &raw, &qcow2]).run()?;
        let export = rig.serve("disk", bytes)?;
        let uri = export.uri();
        Tool::new("qemu-img").args(["convert", "-n", "-f", "qcow2", "-O", "raw", &qcow2, &uri]).run()?;
        Tool::new("qemu-img").args(["compare", "-f", "raw", "-F", "raw", &raw, &uri]).run()?;

        let map = Tool::new("qemu-img").args(["map", "--output=json", "-f", "raw", &uri]).json()?;
        let runs = map.as_array().map(Vec::as_slice).unwrap_or_default();
        let total: u64 = runs.iter().filter_map(|run| run["length"].as_u64()).sum();
        ensure!(total == bytes, "{map}");
        ensure!(runs.iter().any(|run| run["zero"] == true), "holes are seen: {map}");
        Ok(())
    })
}

#[test]
fn a_difference_is_seen() -> anyhow::Result<()> {
    let rig = Rig::file()?;
    let raw = rig.dir().join("image");
    sparse_image(&raw, 2 * MIB, &[(MIB, 4096)])?;
    let export = rig.serve("disk", 2 * MIB)?;
    Tool::new("qemu-img")
        .args(["compare", "-f", "raw", "-F", "raw", &*raw.to_string_lossy(), &export.uri()])
        .fails()?;
    Ok(())
}

#[test]
fn bench_runs_without_an_error() -> anyhow::Result<()> {
    Rig::both(|rig| {
        let export = rig.serve("disk", 64 * MIB)?;
        let common =
            ["bench", "-f", "raw", "-t", "none", "-c", "1500", "-d", "32", "-s", "4096", "-S", "36864"];
        Tool::new("qemu-img").args(common).args(["-w", "--flush-interval=64", &export.uri()]).run()?;
        Tool::new("qemu-img").args(common).args([&export.uri()]).run()?;
        Ok(())
    })
}
