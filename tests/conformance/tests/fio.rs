//! fio: random sizes, four connections, trims; every block is verified by its checksum.

use anyhow::ensure;
use spline_conformance::MIB;
use spline_harness::{Export, Rig, Tool};

/// Bytes that each job works on.
fn job_bytes() -> u64 {
    if std::env::var_os("SPLINE_ROUNDS").is_some() { 128 * MIB } else { 8 * MIB }
}

/// Runs fio in the rig's directory, since it leaves the state of a verification behind; no job may report an error.
fn fio(rig: &Rig, export: &Export, arguments: &[&str]) -> anyhow::Result<serde_json::Value> {
    let report = Tool::new("fio")
        .within(rig.dir())
        .args(["--output-format=json", "--ioengine=nbd", "--thread", "--name=job", "--group_reporting"])
        .args([&format!("--uri={}", export.uri())])
        .args(arguments)
        .json()?;
    let jobs = report["jobs"].as_array().map(Vec::as_slice).unwrap_or_default();
    ensure!(!jobs.is_empty() && jobs.iter().all(|job| job["error"] == 0), "{report}");
    Ok(report)
}

/// Bytes of one kind of request in the report of a group of jobs.
fn bytes(report: &serde_json::Value, kind: &str) -> u64 {
    report["jobs"][0][kind]["io_bytes"].as_u64().unwrap_or(0)
}

/// The arguments of a verified run over `each` bytes per connection.
fn verified(each: u64) -> Vec<String> {
    let mut arguments: Vec<String> = [
        "--bsrange=512-1M",
        "--blockalign=512",
        "--iodepth=32",
        "--numjobs=4",
        "--verify=crc32c",
        "--do_verify=1",
        "--verify_fatal=1",
        "--end_fsync=1",
    ]
    .map(str::to_owned)
    .to_vec();
    arguments.extend([format!("--size={each}"), format!("--offset_increment={each}")]);
    arguments
}

#[test]
fn random_sizes_verify() -> anyhow::Result<()> {
    Rig::both(|rig| {
        let each = job_bytes();
        let export = rig.serve("disk", 4 * each)?;
        let arguments = verified(each);
        let mut arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        arguments.push("--rw=randwrite");
        let report = fio(rig, &export, &arguments)?;
        ensure!(bytes(&report, "write") >= 4 * each && bytes(&report, "read") >= 4 * each, "{report}");

        // Again over the same ranges, trimming each block before it is written: one after the other, since nothing
        // orders requests that are in flight together. (`trim_percentage` breaks fio 3.33.)
        arguments.pop();
        arguments.extend(["--rw=randtrimwrite", "--serialize_overlap=1"]);
        let report = fio(rig, &export, &arguments)?;
        ensure!(bytes(&report, "trim") >= each && bytes(&report, "read") >= each / 2, "{report}");

        // And what is trimmed, in random pieces, is zeros from then on.
        let pieces = ["--rw=randtrim", "--bsrange=512-1M", "--blockalign=512", "--iodepth=32"];
        let report = fio(rig, &export, &pieces)?;
        ensure!(bytes(&report, "trim") >= 4 * each, "{report}");
        let zeros = format!("read -P 0 0 {}", 4 * each);
        let said = Tool::new("qemu-io").args(["-f", "raw", "-c", &zeros, &export.uri()]).run()?;
        ensure!(!said.contains("failed"), "{said}");
        Ok(())
    })
}

#[test]
fn reads_writes_and_trims_together() -> anyhow::Result<()> {
    Rig::both(|rig| {
        let export = rig.serve("disk", 64 * MIB)?;
        let mixed = [
            "--rw=randrw",
            "--bs=4k",
            "--iodepth=32",
            "--numjobs=4",
            "--size=64M",
            "--io_size=8M",
            "--fsync=64",
        ];
        fio(rig, &export, &mixed)?;
        let trims = ["--rw=randtrimwrite", "--bs=64k", "--iodepth=16", "--size=64M", "--io_size=32M"];
        fio(rig, &export, &trims)?;
        Ok(())
    })
}
