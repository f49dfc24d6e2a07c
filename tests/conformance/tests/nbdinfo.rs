//! nbdinfo: what an export says of itself.

use anyhow::ensure;
use spline_conformance::MIB;
use spline_harness::{Rig, Tool};

#[test]
fn what_an_export_says_of_itself() -> anyhow::Result<()> {
    Rig::both(|rig| {
        let export = rig.serve("disk", 64 * MIB)?;
        let info = Tool::new("nbdinfo").args(["--json", &export.uri()]).json()?;
        let shown = &info["exports"][0];
        ensure!(shown["export-size"] == 64 * MIB, "{info}");
        ensure!(shown["block_size_preferred"] == 4096, "{info}");
        ensure!(shown["is_read_only"] == false, "{info}");
        for can in ["can_flush", "can_fua", "can_trim", "can_zero", "can_multi_conn", "can_cache"] {
            ensure!(shown[can] == true, "{can}: {info}");
        }
        for can in [
            "connect",
            "flush",
            "fua",
            "trim",
            "zero",
            "multi-conn",
            "cache",
            "write",
            "structured-reply",
            "df",
        ] {
            Tool::new("nbdinfo").args(["--can", can, &export.uri()]).run()?;
        }
        Tool::new("nbdinfo").args(["--is", "read-only", &export.uri()]).fails()?;
        let contexts = shown["contexts"].as_array().map(Vec::as_slice).unwrap_or_default();
        ensure!(contexts.iter().any(|context| context == "base:allocation"), "{info}");

        let list = Tool::new("nbdinfo").args(["--list", "--json", &export.uri()]).json()?;
        let exports = list["exports"].as_array().map(Vec::as_slice).unwrap_or_default();
        ensure!(exports.iter().any(|shown| shown["export-name"] == export.volume.as_str()), "{list}");
        let said = Tool::new("nbdinfo").args(["--list", &export.uri()]).run()?;
        ensure!(said.contains(&export.volume), "{said}");
        Ok(())
    })
}

#[test]
fn the_empty_name_is_the_volume_too() -> anyhow::Result<()> {
    let rig = Rig::file()?;
    let export = rig.serve("disk", 3 * MIB)?;
    let uri = format!("nbd+unix:///?socket={}", export.socket.display());
    ensure!(Tool::new("nbdinfo").args(["--size", &uri]).run()?.trim() == (3 * MIB).to_string());
    let wrong = format!("nbd+unix:///other?socket={}", export.socket.display());
    Tool::new("nbdinfo").args(["--size", &wrong]).fails()?;
    Ok(())
}

#[test]
fn the_map_shows_what_is_allocated() -> anyhow::Result<()> {
    Rig::both(|rig| {
        let export = rig.serve("disk", 64 * MIB)?;
        Tool::new("qemu-io").args(["-f", "raw", "-c", "write -P 0x5a 20M 1M", &export.uri()]).run()?;
        let map = Tool::new("nbdinfo").args(["--map", "--json", &export.uri()]).json()?;
        let runs = map.as_array().map(Vec::as_slice).unwrap_or_default();
        let bytes = |run: &serde_json::Value, key: &str| run[key].as_u64().unwrap_or(0);
        let total: u64 = runs.iter().map(|run| bytes(run, "length")).sum();
        ensure!(total == 64 * MIB, "{map}");
        let data: Vec<_> = runs.iter().filter(|run| bytes(run, "type") & 1 == 0).collect();
        let covers = data.iter().any(|run| {
            bytes(run, "offset") <= 20 * MIB && bytes(run, "offset") + bytes(run, "length") >= 21 * MIB
        });
        ensure!(covers, "the written MiB is data: {map}");
        let allocated: u64 = data.iter().map(|run| bytes(run, "length")).sum();
        ensure!(allocated <= 16 * MIB, "most of the disk is holes: {map}");
        let said = Tool::new("nbdinfo").args(["--map", &export.uri()]).run()?;
        ensure!(said.contains("hole,zero") && said.contains("data"), "{said}");
        Ok(())
    })
}
