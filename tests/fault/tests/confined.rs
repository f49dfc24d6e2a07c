//! What a nebd that serves has given up, as the kernel tells of its threads; and that a gateway which comes back is found all
//! the same. That the confinement holds is tested in nebd itself, from inside.

use anyhow::{Context, ensure};
use spline_fault::workload::RECOVERY_LIMIT;
use spline_harness::nbd::{Connection, Kind};
use spline_harness::{Process, Rig, binaries, metrics, ports, vhost, wait_until};
use std::fs::Permissions;
use std::net::SocketAddr;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::Duration;

const SIZE: u64 = 64 << 20;
const BLOCK: u32 = 4096;
/// The user and group `nobody` and `nogroup`, which have nothing.
const NOBODY: u32 = 65_534;

/// Starts a nebd with some more arguments, and waits until it serves.
fn start(
    dir: &Path,
    volume: &str,
    more: &[&str],
) -> anyhow::Result<(Process, Connection, PathBuf, SocketAddr)> {
    let (socket, metrics) = (dir.join("nbd.sock"), ports::free(1)?[0]);
    let arguments = [
        ("--volume", volume.into()),
        ("--gateway-socket", dir.join("gateway.sock").into_os_string()),
        ("--listen-unix", socket.clone().into_os_string()),
        ("--vhost-socket", dir.join("device.sock").into_os_string()),
        ("--runtime-dir", dir.join("run").into_os_string()),
        ("--metrics-listen", metrics.to_string().into()),
    ];
    let arguments = arguments.into_iter().flat_map(|(flag, value)| [flag.into(), value]).collect();
    let mut nebd = Process::new("nebd", binaries::find("spline-nebd")?, arguments, dir);
    nebd.add_arguments(more);
    nebd.start()?;
    let client = wait_until("the export to serve", RECOVERY_LIMIT, || {
        nebd.assert_running()?;
        Connection::open(&socket, "", Duration::from_secs(10)).map(Some)
    })?;
    // Its threads are there then, too.
    wait_until("the device to serve", RECOVERY_LIMIT, || vhost::answers(&dir.join("device.sock")).map(Some))?;
    Ok((nebd, client, socket, metrics))
}

/// What the kernel says of each thread under a heading.
fn of_threads(nebd: &Process, heading: &str) -> anyhow::Result<Vec<String>> {
    let id = nebd.id().context("runs")?;
    let mut values = Vec::new();
    for thread in std::fs::read_dir(format!("/proc/{id}/task"))? {
        let status = std::fs::read_to_string(thread?.path().join("status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix(heading)).context("such a line")?;
        values.push(line.split_whitespace().collect::<Vec<_>>().join(" "));
    }
    ensure!(values.len() > 1, "it has several threads: {values:?}");
    Ok(values)
}

/// All threads are the same under these headings.
fn expect(nebd: &Process, expected: &[(&str, &str)]) -> anyhow::Result<()> {
    for (heading, value) in expected {
        let found = of_threads(nebd, heading)?;
        ensure!(found.iter().all(|found| found == value), "{heading} {found:?}, not {value}");
    }
    Ok(())
}

fn layer(metrics: SocketAddr, by: &str) -> anyhow::Result<f64> {
    metrics::sum(metrics, &format!("spline_nebd_confined{{by=\"{by}\"}}"))
}

#[test]
fn a_nebd_that_serves_has_given_up_what_it_does_not_need() -> anyhow::Result<()> {
    let rig = Rig::file()?;
    let volume = rig.create("disk", SIZE)?;
    let (mut nebd, mut client, socket, metrics) = start(rig.dir(), &volume, &[])?;
    client.succeed(Kind::Write, 0, BLOCK, &[1; BLOCK as usize])?;
    // 2 is a filter.
    expect(&nebd, &[("Seccomp:", "2"), ("NoNewPrivs:", "1")])?;
    ensure!(layer(metrics, "landlock")? == 1.0 && layer(metrics, "seccomp")? == 1.0);
    ensure!(layer(metrics, "user")? == 0.0);
    nebd.terminate(RECOVERY_LIMIT)?;
    ensure!(
        !socket.exists() && !rig.dir().join("device.sock").exists(),
        "it may still remove what is its own"
    );
    ensure!(std::fs::read_dir(rig.dir().join("run/nebd"))?.count() == 0);

    let (nebd, _client, _socket, metrics) = start(rig.dir(), &volume, &["--no-confine"])?;
    expect(&nebd, &[("Seccomp:", "0"), ("NoNewPrivs:", "0")])?;
    ensure!(layer(metrics, "landlock")? == 0.0 && layer(metrics, "seccomp")? == 0.0);
    Ok(())
}

#[test]
fn a_nebd_that_became_another_user_serves_on_when_its_gateway_is_replaced() -> anyhow::Result<()> {
    ensure!(
        std::fs::metadata("/proc/self")?.uid() == 0,
        "only root can become another user: run this as root"
    );
    let mut rig = Rig::file()?;
    let (dir, volume) = (rig.dir().to_owned(), rig.create("disk", SIZE)?);
    // As a host would be set up: what is made here belongs to the group that nebd's user is in.
    chown(&dir, None, Some(NOBODY))?;
    std::fs::set_permissions(&dir, Permissions::from_mode(0o2775))?;
    let gateway = rig.gateway_mut();
    // The number alone may be given out again.
    let made = || {
        let file = std::fs::metadata(dir.join("gateway.sock"))?;
        anyhow::Ok((file.ino(), file.ctime(), file.ctime_nsec()))
    };
    gateway.restart()?;
    let (mut nebd, mut client, socket, metrics) = start(&dir, &volume, &["--user", "nobody"])?;
    let (user, group) = (format!("{NOBODY} {NOBODY} {NOBODY} {NOBODY}"), NOBODY.to_string());
    expect(&nebd, &[("Uid:", &user), ("Gid:", &user), ("Groups:", &group)])?;
    expect(&nebd, &[("CapEff:", "0000000000000000"), ("CapPrm:", "0000000000000000"), ("Seccomp:", "2")])?;
    ensure!(layer(metrics, "user")? == 1.0);
    ensure!(std::fs::metadata(&socket)?.uid() == NOBODY, "its group may connect");

    client.succeed(Kind::Write, 0, BLOCK, &[7; BLOCK as usize])?;
    let before = made()?;
    gateway.kill9()?;
    gateway.start()?;
    ensure!(client.succeed(Kind::Read, 0, BLOCK, &[])? == [7; BLOCK as usize]);
    ensure!(made()? != before, "it was reached by a new socket");
    nebd.terminate(RECOVERY_LIMIT)?;
    ensure!(!socket.exists());

    let arguments = [
        ("--user", "no-such-user".into()),
        ("--volume", volume.into()),
        ("--listen-unix", dir.join("unknown.sock").into_os_string()),
        ("--runtime-dir", dir.join("run").into_os_string()),
    ];
    let arguments = arguments.into_iter().flat_map(|(flag, value)| [flag.into(), value]).collect();
    let unknown = Process::new("unknown", binaries::find("spline-nebd")?, arguments, &dir);
    refused(unknown, "no such user")
}

fn refused(mut nebd: Process, why: &str) -> anyhow::Result<()> {
    nebd.start()?;
    wait_until("it to end", RECOVERY_LIMIT, || Ok((!nebd.is_running()?).then_some(())))?;
    let log = nebd.log()?;
    ensure!(log.contains(why), "{log}");
    Ok(())
}
