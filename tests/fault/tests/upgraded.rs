//! The planned upgrade of the gateway under a verifying load: no client notices, and a new build that fails changes nothing.

use anyhow::{Context, ensure};
use spline_fault::block;
use spline_fault::broken::{build, go_on, reached};
use spline_fault::guest::GuestLoad;
use spline_fault::history::History;
use spline_fault::workload::{BLOCKS, EXPORT_BYTES, RECOVERY_LIMIT, Workload};
use spline_harness::nbd::{Connection, Kind};
use spline_harness::vhost::Shown;
use spline_harness::{Cluster, Process, Rig, Shape, Stalls, binaries, rounds, wait_until};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Answers to see before and after each step.
const PROGRESS: u64 = 100;

/// New builds that fail before the commit, and what the command must say. Kinds of messages: 1 hello, 4 proven, 9 prepared.
const FAILING: [(&str, &[&str]); 10] = [
    ("exits", &["phase=proof", "exit status: 1"]),
    ("panics", &["phase=proof", "a build that panics"]),
    ("future", &["state version is unknown", "theirs_min=9", "ours_max="]),
    ("torn", &["does not speak as agreed", "too short or too long"]),
    ("nonsense", &["does not speak as agreed", "does not begin as one of a gateway"]),
    ("passes-descriptors", &["descriptors do not fit the message"]),
    ("dies-at-4", &["phase=proof", "exit status: 3"]),
    // The first of preparation that the new one is told: it has proved that it can serve.
    ("dies-at-5", &["phase=preparation", "exit status: 3"]),
    ("panics-at-5", &["phase=preparation", "exit status: 101", "a build that panics"]),
    // Every session was opened by the new one.
    ("dies-at-9", &["phase=preparation", "exit status: 3"]),
];

/// Those that take as long as is allowed.
const HANGING: [(&str, &[&str]); 2] =
    [("hangs", &["phase=proof", "in time"]), ("hangs-at-9", &["phase=preparation", "in time"])];

fn epoch(rig: &Rig) -> anyhow::Result<u64> {
    let status = rig.gateway_status()?;
    let sessions = status["sessions"].as_array().context("sessions")?;
    ensure!(sessions.len() == 1, "sessions={sessions:?}");
    ensure!(sessions[0]["state"] == "serving", "sessions={sessions:?}");
    sessions[0]["epoch"].as_u64().context("epoch")
}

/// A broken build under the name that says how it breaks.
fn broken(rig: &Rig, name: &str) -> anyhow::Result<PathBuf> {
    build(rig.dir(), Path::new(env!("CARGO_BIN_EXE_broken_gateway")), name)
}

/// Upgrades again and again under load; the file that is started is another one each second time.
fn upgrade_under_load(mut rig: Rig, has_epochs: bool) -> anyhow::Result<()> {
    let export = rig.serve("disk", EXPORT_BYTES)?;
    let other = rig.dir().join("spline-gateway.other");
    std::fs::copy(binaries::find("spline-gateway")?, &other)?;
    let (mut history, mut stalls) = (History::new(BLOCKS), Stalls::default());
    let (mut before, mut pid) = (epoch(&rig)?, rig.gateway().id());
    for round in 0..rounds(4) {
        let workload = Workload::start(&export.socket, &export.volume, history, round as u64);
        workload.wait_for_progress(PROGRESS).context("before the upgrade")?;
        let told = rig.upgrade((round % 2 == 1).then_some(other.as_path()))?;
        ensure!(told["sessions"] == 1, "{told}");
        workload.wait_for_progress(PROGRESS).context("after the upgrade")?;
        ensure!(workload.reconnected() == 0, "clients were disconnected");
        stalls.add("upgrade", workload.longest_wait());
        history = workload.finish()?;
        let (now, new_pid) = (epoch(&rig)?, rig.gateway().id());
        ensure!(new_pid != pid && rig.gateway_status()?["pid"].as_u64() == new_pid.map(u64::from));
        ensure!(!has_epochs || now > before, "a session of its own: epoch={now} before={before}");
        (before, pid) = (now, new_pid);
    }
    // Not by a macro: the test harness would keep the table of a test that passes.
    let _ = write!(std::io::stderr(), "\n{stalls}");
    // The last one is a gateway like every other: it ends in order, and another one takes its place.
    let status = rig.gateway_mut().terminate(RECOVERY_LIMIT)?;
    ensure!(status.success(), "{status}");
    rig.gateway_mut().start()?;
    Workload::start(&export.socket, &export.volume, history, 99).finish().map(drop)
}

#[test]
fn a_volume_of_the_cluster_goes_over() {
    upgrade_under_load(Rig::cluster().expect("cluster"), true).expect("nothing is lost, no error");
}

#[test]
fn a_file_goes_over() {
    upgrade_under_load(Rig::file().expect("gateway"), false).expect("nothing is lost, no error");
}

/// A guest's ring is gone on with: its nebd is not connected anew, nor does it lose an answer.
fn upgrade_under_a_guest(rig: &mut Rig) -> anyhow::Result<()> {
    let volume = rig.create("disk", EXPORT_BYTES)?;
    let export = rig.export_to_guest(&volume, Shown::default())?;
    let load = GuestLoad::start(&export.socket, History::new(BLOCKS), 1);
    let mut stalls = Stalls::default();
    for _ in 0..rounds(6) {
        load.wait_for_progress(PROGRESS)?;
        let told = rig.upgrade(None)?;
        ensure!(told["links"].as_u64().is_some_and(|links| links > 0), "links go on as they were: {told}");
        stalls.add("a ring's pause", Duration::from_micros(told["pause_us"].as_u64().context("pause")?));
    }
    load.wait_for_progress(PROGRESS)?;
    stalls.add("a guest's gap", load.longest_gap());
    load.finish()?;
    let said = export.nebd.log()?;
    ensure!(!said.contains("link to the gateway lost"), "nebd was connected anew:\n{said}");
    let _ = write!(std::io::stderr(), "\n{stalls}");
    Ok(())
}

#[test]
fn a_guests_ring_goes_over() {
    upgrade_under_a_guest(&mut Rig::file().expect("gateway")).expect("file: no guest notices");
    upgrade_under_a_guest(&mut Rig::cluster().expect("cluster")).expect("cluster: no guest notices");
}

/// Writes that chunkservers refused because of their epoch.
const REFUSED: &str = "spline_chunkserver_requests_total{op=\"write\",outcome=\"fenced\"}";

fn write(client: &mut Connection, version: u64) -> anyhow::Result<()> {
    client.succeed(Kind::Write, 0, block::BYTES as u32, &block::fill(0, version)).map(drop)
}

fn read(client: &mut Connection) -> anyhow::Result<u64> {
    let data = client.succeed(Kind::Read, 0, block::BYTES as u32, &[])?;
    block::read(0, &data).map_err(anyhow::Error::msg)
}

/// A write of the old process hangs in the network, is withdrawn and done again by the new one, and a newer one after it is
/// answered; then it comes, though its process has ended.
fn a_write_comes_late(mut rig: Rig) -> anyhow::Result<()> {
    let export = rig.serve("disk", EXPORT_BYTES)?;
    let mut client = Connection::open(&export.socket, &export.volume, RECOVERY_LIMIT)?;
    write(&mut client, 1)?;
    let (mut sender, mut receiver) = client.split()?;
    let Rig::Cluster(cluster) = &rig else { unreachable!("a cluster") };
    cluster.hold().arm(&block::fill(0, 2)[..256]);
    sender.send(Kind::Write, 7, 0, block::BYTES as u32, &block::fill(0, 2))?;
    cluster.hold().wait_until_held(RECOVERY_LIMIT)?;
    rig.upgrade(None)?;
    let answer = receiver.reply()?.context("connection ended")?;
    ensure!((answer.errno, answer.cookie) == (0, 7), "{answer:?}");
    let mut client = Connection::open(&export.socket, &export.volume, RECOVERY_LIMIT)?;
    write(&mut client, 3)?;
    let Rig::Cluster(cluster) = &mut rig else { unreachable!("a cluster") };
    let refused = cluster.metric_of_all(REFUSED);
    cluster.hold().release();
    wait_until("the late write to be refused", RECOVERY_LIMIT, || {
        Ok((cluster.metric_of_all(REFUSED) > refused).then_some(()))
    })?;
    ensure!(read(&mut client)? == 3);
    cluster.chunkservers.iter_mut().try_for_each(Process::restart)?;
    ensure!(read(&mut client)? == 3);
    Ok(())
}

#[test]
fn a_write_of_the_old_process_that_comes_late_does_not_land() {
    let cluster = Cluster::start_as(&Shape { proxied: true, ..Shape::default() }).expect("cluster");
    a_write_comes_late(Rig::Cluster(Box::new(cluster))).expect("what was answered last stays");
}

/// Each build that fails leaves the old gateway serving, and the command says why.
fn refuse(mut rig: Rig) -> anyhow::Result<()> {
    let export = rig.serve("disk", EXPORT_BYTES)?;
    let pid = rig.gateway().id();
    let workload = Workload::start(&export.socket, &export.volume, History::new(BLOCKS), 1);
    for (name, said) in FAILING.into_iter().chain(HANGING) {
        workload.wait_for_progress(PROGRESS)?;
        let binary = broken(&rig, name)?;
        let refused = match rig.upgrade(Some(&binary)) {
            Ok(told) => anyhow::bail!("must fail: build={name} {told}"),
            Err(refused) => format!("{refused:#}"),
        };
        for word in said {
            ensure!(refused.contains(word), "build={name} expected={word:?} said={refused}");
        }
        ensure!(refused.contains(&format!("binary={}", binary.display())), "build={name} said={refused}");
        workload.wait_for_progress(PROGRESS).with_context(|| format!("after build={name}"))?;
        ensure!(rig.gateway().id() == pid && rig.gateway_status()?["pid"].as_u64() == pid.map(u64::from));
    }
    // After all that it can still be upgraded.
    rig.upgrade(None)?;
    workload.wait_for_progress(PROGRESS)?;
    workload.finish().map(drop)
}

#[test]
fn a_new_build_that_fails_leaves_the_cluster_served() {
    let rig = Rig::cluster_with("upgrade_limit = \"6s\"\n").expect("cluster");
    refuse(rig).expect("the old one goes on");
}

#[test]
fn a_new_build_that_fails_leaves_files_served() {
    let rig = Rig::file_with("upgrade_limit = \"6s\"\n").expect("gateway");
    refuse(rig).expect("the old one goes on");
}

/// After the commit there is no way back: both end, and whoever starts gateways starts one again.
fn die_after_the_commit(mut rig: Rig) -> anyhow::Result<()> {
    let export = rig.serve("disk", EXPORT_BYTES)?;
    let workload = Workload::start(&export.socket, &export.volume, History::new(BLOCKS), 1);
    workload.wait_for_progress(PROGRESS)?;
    // 10 commit, 11 yours.
    for name in ["dies-at-10", "dies-at-11"] {
        let binary = broken(&rig, name)?;
        let refused = rig.upgrade(Some(&binary)).err().context("must fail")?;
        ensure!(format!("{refused:#}").contains("after the commit"), "{refused:#}");
        wait_until("the old one to end", RECOVERY_LIMIT, || {
            Ok((!rig.gateway_mut().is_running()?).then_some(()))
        })?;
        rig.gateway_mut().start()?;
        workload.wait_for_progress(PROGRESS)?;
    }
    workload.finish().map(drop)
}

#[test]
fn a_new_build_that_dies_after_the_commit_is_a_crash() {
    die_after_the_commit(Rig::cluster().expect("cluster")).expect("cluster: nothing is lost");
    die_after_the_commit(Rig::file().expect("gateway")).expect("file: nothing is lost");
}

/// What the kernel is told of a process, should memory run out: the highest is killed first.
fn killed_early(pid: u32) -> anyhow::Result<i32> {
    Ok(std::fs::read_to_string(format!("/proc/{pid}/oom_score_adj"))?.trim().parse()?)
}

#[test]
fn the_kernel_is_to_kill_the_new_process_until_it_serves() -> anyhow::Result<()> {
    let mut rig = Rig::file()?;
    rig.serve("disk", EXPORT_BYTES)?;
    let old = rig.gateway().id().context("runs")?;
    let usual = killed_early(old)?;
    // It has prepared everything, and has its memory.
    let binary = broken(&rig, "waits-at-9")?;
    let upgrading = rig.begin_upgrade(Some(&binary))?;
    let new = reached(&binary)?;
    ensure!((killed_early(old)?, killed_early(new)?) == (usual, (usual + 1000).min(1000)));
    go_on(&binary)?;
    rig.end_upgrade(upgrading)?;
    ensure!(killed_early(new)? == usual, "it is as precious as the old one was");
    Ok(())
}
