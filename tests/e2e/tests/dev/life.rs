//! What a user of `spline dev` lives through: stops, crashes, checks, volumes coming and going.

use anyhow::{Context, ensure};
use rustix::process::{Pid, Signal, kill_process};
use spline_harness::{DEV_LIMIT, Dev, Tool, binaries, tool, wait_until};
use std::process::Command;
use tempfile::TempDir;

#[test]
fn data_stays_over_a_stop_and_a_crash() -> anyhow::Result<()> {
    let dir = TempDir::new()?;
    let mut dev = Dev::start(dir.path())?;
    let uri = dev.uri()?;
    ensure!(Tool::new("nbdinfo").args(["--size", &uri]).run()?.trim() == (10u64 << 30).to_string());
    dev.qemu_io("write -P 0x71 5G 3M")?;
    ensure!(dev.end(Signal::INT)?.success(), "Ctrl-C is a clean stop");
    ensure!(Tool::new("nbdinfo").args(["--size", &uri]).fails().is_ok(), "a clean stop ends the export");

    let mut dev = Dev::start(dir.path())?;
    dev.qemu_io("read -P 0x71 5G 3M")?;
    dev.qemu_io("write -P 0x72 5G 1M")?;
    dev.end(Signal::KILL)?;

    let dev = Dev::start(dir.path())?;
    dev.qemu_io("read -P 0x72 5G 1M")?;
    dev.qemu_io("read -P 0x71 5121M 2M")
}

#[test]
fn the_check_finds_what_the_check_before_wrote() -> anyhow::Result<()> {
    binaries::find("spline-nebd")?;
    let dir = TempDir::new()?;
    let check = || {
        tool::run(Command::new(binaries::find("spline")?).args(["dev", "--check", "--dir"]).arg(dir.path()))
    };
    ensure!(check()?.contains("all data is as written"));
    let second = check()?;
    ensure!(second.contains("found what the check before wrote"), "{second}");
    Ok(())
}

#[test]
fn volumes_from_birth_to_death() -> anyhow::Result<()> {
    let dir = TempDir::new()?;
    let dev = Dev::start(dir.path())?;
    ensure!(
        dev.spline(&["volume", "create", "vm/web", "1G", "--block-size", "512"])?["size_bytes"] == 1u64 << 30
    );
    ensure!(dev.spline(&["volume", "create", "vm/web", "1G"]).is_err(), "the name is taken");
    ensure!(dev.spline(&["volume", "resize", "vm/web", "2G"])?["size_bytes"] == 2u64 << 30);
    ensure!(dev.spline(&["volume", "resize", "vm/web", "1G"]).is_err(), "volumes do not shrink");
    dev.spline(&["volume", "rename", "vm/web", "vm/db"])?;
    let names = dev.spline(&["volume", "ls"])?;
    let names: Vec<&str> =
        names.as_array().context("a list")?.iter().filter_map(|volume| volume["name"].as_str()).collect();
    ensure!(names.contains(&"vm/db") && names.contains(&"disk0") && !names.contains(&"vm/web"), "{names:?}");
    let info = dev.spline(&["volume", "info", "disk0"])?;
    ensure!(info["session"]["gateway"] == "dev", "{info}");
    ensure!(dev.spline(&["volume", "rm", "disk0", "--yes"]).is_err(), "it is open");
    dev.spline(&["volume", "rm", "vm/db", "--yes"])?;
    ensure!(dev.spline(&["volume", "info", "vm/db"]).is_err());
    let status = dev.spline(&["cluster", "status"])?;
    ensure!(status["chunkservers"].as_array().map(Vec::len) == Some(3), "{status}");
    Ok(())
}

#[test]
fn a_died_disk_process_is_started_again() -> anyhow::Result<()> {
    let dir = TempDir::new()?;
    let dev = Dev::start(dir.path())?;
    let list = dev.spline(&["nbd", "ls", "--runtime-dir", &dev.fact("runtime_dir")?])?;
    let pid = i32::try_from(list[0]["pid"].as_i64().context("a process id")?)?;
    dev.qemu_io("write -P 0x73 0 64k")?;
    kill_process(Pid::from_raw(pid).context("a process id")?, Signal::KILL)?;
    wait_until("the disk to be back", DEV_LIMIT, || dev.qemu_io("read -P 0x73 0 64k").map(Some))
}
