//! One nebd with several exports: they share a process, and nothing that happens to one reaches the others' guests.

use anyhow::{Context, ensure};
use spline_fault::workload::RECOVERY_LIMIT;
use spline_harness::nbd::{Connection, Kind};
use spline_harness::virtio::{Answered, VirtioDisk, Wish};
use spline_harness::{Process, Rig, Tool, binaries, metrics, ports, wait_until};
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

const SIZE: u64 = 64 << 20;
const BLOCK: u32 = 64 << 10;

/// A nebd over a config file of its own.
struct Shared {
    nebd: Process,
    config: PathBuf,
    metrics: SocketAddr,
    dir: PathBuf,
}

impl Shared {
    /// One that serves these volumes, each on a socket of its number.
    fn new(rig: &Rig, name: &str, volumes: &[&str]) -> anyhow::Result<Self> {
        let (dir, metrics) = (rig.dir().to_owned(), ports::free(1)?[0]);
        let mut text = format!(
            "gateway_socket = {:?}\nruntime_dir = {:?}\nmetrics_listen = \"{metrics}\"\n",
            dir.join("gateway.sock"),
            dir.join("run")
        );
        for (number, volume) in volumes.iter().enumerate() {
            let socket = dir.join(format!("{name}-{number}.sock"));
            text += &format!("[[export]]\nvolume = {volume:?}\nlisten_unix = {socket:?}\n");
        }
        let config = dir.join(format!("{name}.toml"));
        std::fs::write(&config, text)?;
        let arguments = vec!["--config".into(), config.clone().into()];
        let nebd = Process::new(name, binaries::find("spline-nebd")?, arguments, &dir);
        Ok(Self { nebd, config, metrics, dir })
    }

    fn socket(&self, number: usize) -> PathBuf {
        self.dir.join(format!("{}-{number}.sock", self.nebd.name()))
    }

    fn connect(&mut self, number: usize) -> anyhow::Result<Connection> {
        let socket = self.socket(number);
        wait_until("the export to serve", RECOVERY_LIMIT, || {
            self.nebd.assert_running()?;
            Connection::open(&socket, "", Duration::from_secs(10)).map(Some)
        })
    }

    /// A counter of one volume.
    fn count(&self, name: &str, volume: &str) -> anyhow::Result<f64> {
        metrics::sum(self.metrics, &format!("spline_nebd_{name}_total{{volume=\"{volume}\""))
    }
}

fn write_and_read(client: &mut Connection, fill: u8) -> anyhow::Result<()> {
    let data = vec![fill; BLOCK as usize];
    client.succeed(Kind::Write, 0, BLOCK, &data)?;
    ensure!(client.succeed(Kind::Read, 0, BLOCK, &[])? == data, "fill={fill}");
    Ok(())
}

#[test]
fn a_client_that_misbehaves_is_its_own_export_s_affair() -> anyhow::Result<()> {
    let rig = Rig::file()?;
    let (bad, good) = (rig.create("bad", SIZE)?, rig.create("good", SIZE)?);
    let mut shared = Shared::new(&rig, "shared", &[&bad, &good])?;
    shared.nebd.start()?;
    let mut client = shared.connect(1)?;
    write_and_read(&mut client, 1)?;

    // One that does not speak the protocol.
    shared.connect(0)?.close()?;
    let mut raw = UnixStream::connect(shared.socket(0))?;
    raw.set_read_timeout(Some(RECOVERY_LIMIT))?;
    raw.write_all(&[0xff; 64])?;
    let mut said = Vec::new();
    // Cut, whether with an end or with a reset.
    let _ = raw.read_to_end(&mut said);
    write_and_read(&mut client, 2)?;
    // One that asks for much and takes nothing: all that its export may hold.
    let (mut sender, _receiver) = shared.connect(0)?.split()?;
    for cookie in 0..200 {
        sender.send(Kind::Read, cookie, 0, 1 << 20, &[])?;
    }
    for fill in 3..20 {
        write_and_read(&mut client, fill)?;
    }
    write_and_read(&mut shared.connect(1)?, 20)?;

    ensure!(shared.count("protocol_errors", &bad)? == 1.0);
    ensure!(shared.count("protocol_errors", &good)? == 0.0);
    // Twenty rounds of two, and nothing of the other volume's reads.
    ensure!(shared.count("requests", &good)? == 40.0, "{}", metrics::page(shared.metrics)?);
    Ok(())
}

#[test]
fn one_volume_is_seen_both_ways_and_a_client_does_not_hold_up_the_device() -> anyhow::Result<()> {
    let rig = Rig::file()?;
    let disk = rig.create("disk", SIZE)?;
    let mut shared = Shared::new(&rig, "shared", &[&disk])?;
    let socket = rig.dir().join("device.sock");
    let more = format!("vhost_socket = {socket:?}\nvhost_queues = 2\n");
    std::fs::File::options().append(true).open(&shared.config)?.write_all(more.as_bytes())?;
    shared.nebd.start()?;
    let mut client = shared.connect(0)?;
    wait_until("the device to serve", RECOVERY_LIMIT, || spline_harness::vhost::answers(&socket).map(Some))?;
    let wish = Wish { queues: 2, queue_size: 16, read_only: false, memory: 1 << 20 };
    let mut device = VirtioDisk::open(&socket, wish)?;
    // All that the clients of an export may hold.
    let (mut sender, _receiver) = shared.connect(0)?.split()?;
    for cookie in 0..200 {
        sender.send(Kind::Read, cookie, 0, 1 << 20, &[])?;
    }
    for (fill, queue) in [(1, 0), (2, 1), (3, 0), (4, 1)] {
        device.fill(0, &[fill; BLOCK as usize])?;
        let slot = device.slot(0, &[BLOCK as usize])?;
        device.write(queue, 0, &slot, 7);
        let mut answers = Vec::new();
        device.reap(queue, 1, RECOVERY_LIMIT, &mut answers)?;
        ensure!(answers == [Answered { tag: 7, result: 0 }], "{answers:?}");
        ensure!(client.succeed(Kind::Read, 0, BLOCK, &[])? == vec![fill; BLOCK as usize]);
    }
    ensure!(written(rig.dir())?.len() == 2, "one file for each way: {:?}", written(rig.dir())?);
    let by_thread = |thread| shared.count("requests", &format!("{disk}\",thread=\"{thread}"));
    ensure!(by_thread("vhost-0")? + by_thread("vhost-1")? == 4.0, "{}", metrics::page(shared.metrics)?);
    drop(device);
    shared.nebd.terminate(RECOVERY_LIMIT)?;
    ensure!(!socket.exists() && written(rig.dir())?.is_empty());
    Ok(())
}

#[test]
fn an_export_that_can_not_be_served_does_not_end_the_others() -> anyhow::Result<()> {
    let rig = Rig::file()?;
    let good = rig.create("good", SIZE)?;
    let missing = good.replace("good", "missing");
    let mut shared = Shared::new(&rig, "shared", &[&missing, &good])?;
    let ready = rig.dir().join("ready.pid");
    shared.nebd.add_arguments(&["--pid-file", ready.to_str().context("a path of letters")?]);
    shared.nebd.start()?;
    write_and_read(&mut shared.connect(1)?, 1)?;
    // Ready once each is decided.
    wait_until("readiness", RECOVERY_LIMIT, || Ok(ready.exists().then_some(())))?;
    let log = shared.nebd.log()?;
    ensure!(log.contains("export ended, the others go on") && log.contains("missing.img"), "{log}");
    ensure!(!shared.socket(0).exists(), "nothing is left of it");
    ensure!(written(rig.dir())?.len() == 1, "{:?}", written(rig.dir())?);
    shared.nebd.terminate(RECOVERY_LIMIT)?;
    ensure!(!shared.socket(1).exists() && !ready.exists());
    ensure!(written(rig.dir())?.is_empty(), "{:?}", written(rig.dir())?);
    Ok(())
}

/// Status files that say something.
fn written(dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir.join("run/nebd"))? {
        let entry = entry?;
        if entry.metadata()?.len() > 0 {
            found.push(entry.path());
        }
    }
    Ok(found)
}

#[test]
fn a_second_nebd_of_a_volume_is_refused_and_the_first_goes_on() -> anyhow::Result<()> {
    let rig = Rig::file()?;
    let disk = rig.create("disk", SIZE)?;
    let mut first = Shared::new(&rig, "first", &[&disk])?;
    first.nebd.start()?;
    let mut client = first.connect(0)?;
    let mut second = Shared::new(&rig, "second", &[&disk])?;
    second.nebd.start()?;
    wait_until("the second to end", RECOVERY_LIMIT, || Ok((!second.nebd.is_running()?).then_some(())))?;
    let log = second.nebd.log()?;
    ensure!(log.contains("another nebd exports this volume"), "{log}");
    write_and_read(&mut client, 1)?;
    ensure!(written(rig.dir())?.len() == 1, "the first is still listed");
    // A volume that is not served any more is anybody's, however its nebd ended.
    first.nebd.kill9()?;
    second.nebd.start()?;
    write_and_read(&mut second.connect(0)?, 2)
}

#[test]
fn flags_of_an_export_do_not_go_with_a_file_of_several() -> anyhow::Result<()> {
    let rig = Rig::file()?;
    let shared = Shared::new(&rig, "shared", &["a", "b"])?;
    let nebd = binaries::find("spline-nebd")?;
    let run = |more: &[&str]| {
        let tool = Tool::new(nebd.to_str().unwrap_or_default());
        tool.args([Path::new("--config"), &shared.config]).args(more)
    };
    let said = run(&["--volume", "c"]).fails()?;
    ensure!(said.contains("flags that describe an export"), "{said}");
    let printed = run(&["--print-config", "--user", "nobody", "--no-confine"]).run()?;
    ensure!(printed.matches("[[export]]").count() == 2, "{printed}");
    ensure!(printed.contains("user = \"nobody\"") && printed.contains("confine = false"), "{printed}");
    let alone = Tool::new(nebd.to_str().unwrap_or_default());
    let alone = alone
        .args(["--print-config", "--volume", "c", "--vhost-socket", "/v", "--vhost-queues", "2"])
        .run()?;
    ensure!(alone.contains("volume = \"c\"") && alone.contains("vhost_queues = 2"), "{alone}");
    Ok(())
}
