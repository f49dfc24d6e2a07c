//! fio: random sizes, many jobs, every block verified by its checksum.

use anyhow::ensure;
use spline_harness::{Rig, Tool};

const MIB: u64 = 1 << 20;

/// Bytes that each job works on.
fn job_bytes() -> u64 {
    if std::env::var_os("SPLINE_ROUNDS").is_some() { 128 * MIB } else { 24 * MIB }
}

/// Runs fio; no job may report an error.
fn fio(uri: &str, name: &str, arguments: &[&str]) -> anyhow::Result<serde_json::Value> {
    let report = Tool::new("fio")
        .args([
            "--output-format=json",
            "--ioengine=nbd",
            "--thread",
            &format!("--name={name}"),
            &format!("--uri={uri}"),
        ])
        .args(arguments)
        .json()?;
    let jobs = report["jobs"].as_array().map(Vec::as_slice).unwrap_or_default();
    ensure!(!jobs.is_empty() && jobs.iter().all(|job| job["error"] == 0), "{report}");
    Ok(report)
}

#[test]
fn random_sizes_verify() -> anyhow::Result<()> {
    Rig::both(|rig| {
        let bytes = job_bytes();
        let export = rig.serve("disk", 4 * bytes)?;
        let size = format!("--size={bytes}");
        let step = format!("--offset_increment={bytes}");
        let report = fio(
            &export.uri(),
            "verify",
            &[
                "--rw=randwrite",
                "--bsrange=512-1M",
                "--blockalign=512",
                "--iodepth=32",
                "--numjobs=4",
                &size,
                &step,
                "--verify=crc32c",
                "--do_verify=1",
                "--verify_fatal=1",
                "--end_fsync=1",
                "--group_reporting",
            ],
        )?;
        let (written, read) =
            (&report["jobs"][0]["write"]["io_bytes"], &report["jobs"][0]["read"]["io_bytes"]);
        ensure!(written.as_u64() >= Some(4 * bytes), "{report}");
        ensure!(read.as_u64() >= Some(bytes), "the data was read back: {report}");
        Ok(())
    })
}

#[test]
fn reads_writes_and_trims_together() -> anyhow::Result<()> {
    Rig::both(|rig| {
        let export = rig.serve("disk", 64 * MIB)?;
        let uri = export.uri();
        fio(
            &uri,
            "mixed",
            &[
                "--rw=randrw",
                "--bs=4k",
                "--iodepth=32",
                "--numjobs=4",
                "--size=64M",
                "--io_size=8M",
                "--fsync=64",
            ],
        )?;
        fio(
            &uri,
            "trims",
            &["--rw=randtrimwrite", "--bs=64k", "--iodepth=16", "--size=64M", "--io_size=32M"],
        )?;
        Ok(())
    })
}
