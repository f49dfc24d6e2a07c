//! A gateway that is frozen with requests under way, and woken long after another process has taken its volume and answered newer
//! writes to the same blocks: nothing of the old one lands (`no_late_duplicate`), neither on a disk nor in a guest's memory.

use anyhow::{Context, ensure};
use spline_fault::block;
use spline_fault::broken::build;
use spline_fault::guest::GuestLoad;
use spline_fault::history::History;
use spline_fault::workload::{self, EXPORT_BYTES, RECOVERY_LIMIT};
use spline_harness::nbd::{Connection, Kind, Receiver, Sender};
use spline_harness::vhost::Shown;
use spline_harness::{Cluster, Export, Process, Rig, Shape, binaries, ports, rounds, wait_until};
use std::path::Path;
use std::time::Duration;

/// ESHUTDOWN: the session is over.
const ESHUTDOWN: u32 = 108;
/// Writes that chunkservers refused because of their epoch.
const REFUSED: &str = "spline_chunkserver_requests_total{op=\"write\",outcome=\"fenced\"}";
/// The block whose write hangs in the network when its gateway is frozen.
const HELD: u64 = 0;
/// Blocks whose writes the gateway has, or is about to have.
const TAKEN: [u64; 4] = [1, 2, 3, 4];
/// Blocks whose writes it finds when it is woken.
const WAITING: [u64; 4] = [5, 6, 7, 8];
const BLOCKS: u64 = 9;
/// A guest's answers to see before and after.
const PROGRESS: u64 = 100;

/// How long the old one sleeps after the newer writes were answered.
fn sleep() -> Duration {
    Duration::from_secs(if rounds(1) > 1 { 60 } else { 2 })
}

fn offset(number: u64) -> u64 {
    number * block::BYTES as u64
}

fn write_all(client: &mut Connection, version: u64) -> anyhow::Result<()> {
    for number in 0..BLOCKS {
        let data = block::fill(number, version);
        client.succeed(Kind::Write, offset(number), data.len() as u32, &data)?;
    }
    Ok(())
}

fn show(client: &mut Connection, version: u64) -> anyhow::Result<()> {
    for number in 0..BLOCKS {
        let data = client.succeed(Kind::Read, offset(number), block::BYTES as u32, &[])?;
        let found = block::read(number, &data).map_err(anyhow::Error::msg)?;
        ensure!(found == version, "block={number} version={found} expected={version}");
    }
    Ok(())
}

fn send(sender: &mut Sender, number: u64, version: u64) -> anyhow::Result<()> {
    let data = block::fill(number, version);
    sender.send(Kind::Write, number, offset(number), data.len() as u32, &data)
}

/// The error numbers of the next `count` answers.
fn answers(mut receiver: Receiver, count: usize) -> anyhow::Result<Vec<u32>> {
    let thread = std::thread::spawn(move || {
        let errors = (0..count).map(|_| Ok(receiver.reply()?.context("connection ended")?.errno));
        errors.collect::<anyhow::Result<Vec<u32>>>()
    });
    wait_until("answers", RECOVERY_LIMIT, || Ok(thread.is_finished().then_some(())))?;
    thread.join().map_err(|_| anyhow::anyhow!("panicked"))?
}

/// A volume whose blocks hold version 1, and whose gateway is frozen with writes of version 2 everywhere on their way.
struct Lab {
    cluster: Cluster,
    export: Export,
    receiver: Receiver,
    /// Requests that were sent.
    sent: usize,
}

impl Lab {
    /// With `taken`, some of the writes are in the gateway itself.
    fn new(taken: &[u64]) -> anyhow::Result<Self> {
        let cluster = Cluster::start_as(&Shape { proxied: true, ..Shape::default() })?;
        cluster.create_volume("disk", &EXPORT_BYTES.to_string())?;
        let export = cluster.export("disk", false)?;
        let mut client = Connection::open(&export.socket, "disk", RECOVERY_LIMIT)?;
        write_all(&mut client, 1)?;
        let (mut sender, receiver) = client.split()?;
        cluster.hold().arm(&block::fill(HELD, 2)[..256]);
        send(&mut sender, HELD, 2)?;
        cluster.hold().wait_until_held(RECOVERY_LIMIT)?;
        taken.iter().try_for_each(|number| send(&mut sender, *number, 2))?;
        cluster.gateway.stop()?;
        WAITING.iter().try_for_each(|number| send(&mut sender, *number, 2))?;
        Ok(Self { cluster, export, receiver, sent: 1 + taken.len() + WAITING.len() })
    }
}

/// Lets what was held back go, wakes the old gateway, and waits until something of it was refused.
fn wake(cluster: &Cluster) -> anyhow::Result<()> {
    std::thread::sleep(sleep());
    let refused = cluster.metric_of_all(REFUSED);
    cluster.hold().release();
    cluster.gateway.cont()?;
    wait_until("the late writes to be refused", RECOVERY_LIMIT, || {
        Ok((cluster.metric_of_all(REFUSED) > refused).then_some(()))
    })
}

/// What stands in the blocks stays, with every server having been away.
fn stays(cluster: &mut Cluster, client: &mut Connection, version: u64) -> anyhow::Result<()> {
    show(client, version)?;
    cluster.chunkservers.iter_mut().try_for_each(Process::restart)?;
    show(client, version)
}

/// Another process of the gateway, with an administration address of its own.
fn process_again(cluster: &Cluster) -> anyhow::Result<Process> {
    let text = std::fs::read_to_string(cluster.dir().join("gateway.toml"))?;
    let (old, new) = (cluster.gateway_admin().to_string(), ports::free(1)?[0].to_string());
    let config = cluster.dir().join("gateway-again.toml");
    std::fs::write(&config, text.replace(&old, &new))?;
    let arguments = vec!["--config".into(), config.into()];
    Ok(Process::new("gateway-again", binaries::find("spline-gateway")?, arguments, cluster.dir()))
}

/// Starts another process of the frozen gateway in its place, as an operator does who believes it dead, and is wrong; nebd goes
/// on with the new one.
fn replace_by_hand(cluster: &Cluster) -> anyhow::Result<Process> {
    let mut again = process_again(cluster)?;
    again.start()?;
    wait_until("the second process to end", RECOVERY_LIMIT, || Ok((!again.is_running()?).then_some(())))?;
    ensure!(again.log()?.contains("another gateway runs with link_socket"), "{}", again.log_tail());
    for left in ["gateway.sock", "gateway.sock.lock"] {
        std::fs::remove_file(cluster.dir().join(left))?;
    }
    again.start()?;
    wait_until("the second process to serve", RECOVERY_LIMIT, || {
        again.assert_running()?;
        Ok(again.log()?.contains("gateway serves").then_some(()))
    })?;
    ensure!(cluster.gateway.cut(&cluster.gateway_socket())? > 0, "links");
    Ok(again)
}

fn replaced_by_hand() -> anyhow::Result<()> {
    let Lab { mut cluster, export, receiver, sent } = Lab::new(&TAKEN)?;
    let _again = replace_by_hand(&cluster)?;
    ensure!(answers(receiver, sent)? == vec![0; sent], "every write is answered");
    let mut client = Connection::open(&export.socket, "disk", RECOVERY_LIMIT)?;
    write_all(&mut client, 3)?;
    wake(&cluster)?;
    stays(&mut cluster, &mut client, 3)
}

#[test]
fn a_frozen_gateway_whose_place_another_process_of_it_has_taken() {
    replaced_by_hand().expect("nothing of the old one lands");
}

/// The guest goes on in the memory in which the frozen gateway has its requests.
fn replaced_under_a_guest() -> anyhow::Result<()> {
    let rig = Rig::cluster()?;
    let volume = rig.create("disk", EXPORT_BYTES)?;
    let export = rig.export_to_guest(&volume, Shown::default())?;
    let load = GuestLoad::start(&export.socket, History::new(workload::BLOCKS), 1);
    load.wait_for_progress(PROGRESS)?;
    rig.gateway().stop()?;
    let closed = |log: &str| log.matches("link is closed").count();
    let before = closed(&rig.gateway().log()?);
    let Rig::Cluster(cluster) = &rig else { unreachable!("made above") };
    let _again = replace_by_hand(cluster)?;
    load.wait_for_progress(PROGRESS)?;
    std::thread::sleep(sleep());
    rig.gateway().cont()?;
    wait_until("the old one to have let go of its links", RECOVERY_LIMIT, || {
        Ok((closed(&rig.gateway().log()?) > before).then_some(()))
    })?;
    load.wait_for_progress(PROGRESS)?;
    load.finish().map(drop)
}

#[test]
fn a_frozen_gateway_that_has_requests_in_a_guests_memory() {
    replaced_under_a_guest().expect("nothing of the old one lands in it");
}

/// How long the session's lease lasts still.
fn lease_left(cluster: &Cluster) -> anyhow::Result<u64> {
    let info = cluster.spline(&["volume", "info", "disk"])?;
    info["session"]["lease_left_ms"].as_u64().with_context(|| format!("no session: {info}"))
}

fn lease_runs_out() -> anyhow::Result<()> {
    // None that may have been answered before it was frozen.
    let Lab { mut cluster, receiver, sent, export: _first } = Lab::new(&[])?;
    let (_other, socket) = cluster.second_gateway()?;
    let said = Export::refused(cluster.dir(), &socket, "disk")?;
    ensure!(said.contains("open on another gateway"), "{said}");
    wait_until("the lease to run out", RECOVERY_LIMIT, || Ok((lease_left(&cluster)? == 0).then_some(())))?;
    let dir = cluster.dir().join("other");
    std::fs::create_dir(&dir)?;
    let second = Export::start(&dir, &socket, "disk", false)?;
    let mut client = Connection::open(&second.socket, "disk", RECOVERY_LIMIT)?;
    show(&mut client, 1)?;
    write_all(&mut client, 3)?;
    wake(&cluster)?;
    ensure!(answers(receiver, sent)? == vec![ESHUTDOWN; sent], "the session is over");
    stays(&mut cluster, &mut client, 3)
}

#[test]
fn a_gateway_that_slept_beyond_its_lease() {
    lease_runs_out().expect("nothing of the old one lands");
}

/// The old process of an upgrade is frozen when it has just let go of its session, and woken when it has long been replaced.
fn in_the_middle_of_an_upgrade(mut rig: Rig) -> anyhow::Result<()> {
    let export = rig.serve("disk", EXPORT_BYTES)?;
    let mut client = Connection::open(&export.socket, &export.volume, RECOVERY_LIMIT)?;
    write_all(&mut client, 1)?;
    let (mut sender, receiver) = client.split()?;
    if let Rig::Cluster(cluster) = &rig {
        cluster.hold().arm(&block::fill(HELD, 2)[..256]);
    }
    (0..BLOCKS).try_for_each(|number| send(&mut sender, number, 2))?;
    if let Rig::Cluster(cluster) = &rig {
        cluster.hold().wait_until_held(RECOVERY_LIMIT)?;
    }
    // 11: yours.
    let binary = build(rig.dir(), Path::new(env!("CARGO_BIN_EXE_broken_gateway")), "freezes-at-11")?;
    let upgrading = rig.begin_upgrade(Some(&binary))?;
    ensure!(answers(receiver, BLOCKS as usize)? == vec![0; BLOCKS as usize], "the new one answers");
    let old = rig.gateway().id().context("an old process")?;
    wait_until("the old process to be frozen", RECOVERY_LIMIT, || {
        Ok(std::fs::read_to_string(format!("/proc/{old}/stat"))?.contains(") T ").then_some(()))
    })?;
    let mut client = Connection::open(&export.socket, &export.volume, RECOVERY_LIMIT)?;
    write_all(&mut client, 3)?;
    if let Rig::Cluster(cluster) = &rig {
        wake(cluster)?;
    } else {
        std::thread::sleep(sleep());
        rig.gateway().cont()?;
    }
    let told = rig.end_upgrade(upgrading)?;
    ensure!(told["sessions"] == 1, "{told}");
    show(&mut client, 3)?;
    if let Rig::Cluster(cluster) = &mut rig {
        stays(cluster, &mut client, 3)?;
    }
    Ok(())
}

#[test]
fn an_old_process_that_is_frozen_in_the_middle_of_its_upgrade() {
    let cluster = Cluster::start_as(&Shape { proxied: true, ..Shape::default() }).expect("cluster");
    in_the_middle_of_an_upgrade(Rig::Cluster(Box::new(cluster)))
        .expect("cluster: nothing of the old one lands");
    in_the_middle_of_an_upgrade(Rig::file().expect("gateway")).expect("file: nothing of the old one lands");
}

/// A file has no sessions: its lock is what keeps a second gateway from it for as long as the first one could wake.
fn of_a_file() -> anyhow::Result<()> {
    let mut rig = Rig::file()?;
    let export = rig.serve("disk", EXPORT_BYTES)?;
    let mut client = Connection::open(&export.socket, &export.volume, RECOVERY_LIMIT)?;
    write_all(&mut client, 1)?;
    let (mut sender, _receiver) = client.split()?;
    rig.gateway().stop()?;
    (0..BLOCKS).try_for_each(|number| send(&mut sender, number, 2))?;

    let dir = rig.dir().join("other");
    std::fs::create_dir(&dir)?;
    let text = std::fs::read_to_string(rig.dir().join("gateway.toml"))?;
    let (old, new) = (rig.gateway_admin().to_string(), ports::free(1)?[0].to_string());
    let socket = dir.join("gateway.sock");
    let text =
        text.replace(&old, &new).replace(&format!("{:?}", rig.gateway_socket()), &format!("{socket:?}"));
    std::fs::write(dir.join("gateway.toml"), text)?;
    let arguments = vec!["--config".into(), dir.join("gateway.toml").into()];
    let mut other = Process::new("gateway-other", binaries::find("spline-gateway")?, arguments, &dir);
    other.start()?;
    wait_until("the other gateway to serve", RECOVERY_LIMIT, || {
        other.assert_running()?;
        Ok(other.log()?.contains("gateway serves").then_some(()))
    })?;
    let said = Export::refused(&dir, &socket, &export.volume)?;
    ensure!(said.contains("file is in use by another process"), "{said}");
    rig.gateway_mut().kill9()?;
    // What the first one's nebd waits with is not the other's.
    let second = Export::start(&dir, &socket, &export.volume, false)?;
    let mut client = Connection::open(&second.socket, &export.volume, RECOVERY_LIMIT)?;
    show(&mut client, 1)?;
    write_all(&mut client, 3)?;
    show(&mut client, 3)
}

#[test]
fn a_file_is_nobodys_while_its_gateway_could_wake() {
    of_a_file().expect("the lock holds");
}
