//! `make bench`: measures Spline beside its peers and writes the tables to docs/performance.md.

use anyhow::Context;
use clap::Parser;
use spline_bench::fio::{self, Figures, WORKLOADS, Workload};
use spline_bench::peers::{self, Peer};
use spline_bench::report::{self, Series};
use spline_bench::rest::{self, Resting};
use spline_bench::{cpu, floor, guest, idle, load, upgrade};
use spline_harness::storage_daemon::Serving;
use spline_harness::vhost::Shown;
use spline_harness::{Cluster, Dev, Export, Rig, StorageDaemon, VhostExport};
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// Measures Spline beside nbdkit and qemu-nbd in interleaved rounds.
#[derive(Parser, Debug)]
#[command(after_help = "Example: spline-bench --rounds 5 --seconds 10 --out docs/performance.md")]
struct Args {
    /// Rounds; medians are taken over them.
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// Seconds of one run.
    #[arg(long, default_value_t = 5)]
    seconds: u32,
    /// Bytes of each volume that are used; filled with data before the first round.
    #[arg(long, default_value_t = 1 << 30)]
    span: u64,
    /// Only this part: file, cluster, vhost (a file, as a guest's disk), vhost-cluster, hop (what the link costs), upgrade (what
    /// guests see of a gateway that is replaced) or idle.
    #[arg(long)]
    engine: Option<String>,
    /// Only workloads whose name contains this, such as "4K randwrite"; of upgrade and idle only the engine, file or cluster.
    #[arg(long, default_value = "")]
    workload: String,
    /// Upgrades, and as many crashes.
    #[arg(long, default_value_t = 30)]
    upgrades: u32,
    /// Volumes of the gateway that is upgraded.
    #[arg(long, default_value_t = 50)]
    volumes: usize,
    /// Exports of the gateway that rests.
    #[arg(long, default_value_t = 200)]
    exports: usize,
    /// Where the tables go; standard output too.
    #[arg(long, default_value = "docs/performance.md")]
    out: PathBuf,
}

/// A server under test: where to send requests, whose CPU counts.
struct Target {
    name: &'static str,
    uri: String,
    socket: PathBuf,
    export: String,
    pids: Vec<u32>,
    is_vhost: bool,
}

impl Target {
    fn ours(name: &'static str, export: &Export, pids: Vec<u32>) -> Self {
        let (socket, volume) = (export.socket.clone(), export.volume.clone());
        Self { name, uri: export.uri(), socket, export: volume, pids, is_vhost: false }
    }

    fn peer(name: &'static str, peer: &Peer) -> Self {
        let (uri, socket) = (peer.uri().to_owned(), peer.socket().to_owned());
        Self { name, uri, socket, export: String::new(), pids: vec![peer.pid()], is_vhost: false }
    }

    /// A device that a guest drives.
    fn vhost(name: &'static str, socket: &Path, pids: Vec<u32>) -> Self {
        Self {
            name,
            uri: String::new(),
            socket: socket.to_owned(),
            export: String::new(),
            pids,
            is_vhost: true,
        }
    }
}

/// Who sends the requests.
#[derive(Clone, Copy)]
enum Client {
    Fio,
    Own,
}

impl Client {
    const ALL: [Self; 2] = [Self::Fio, Self::Own];

    fn name(self) -> &'static str {
        match self {
            Self::Fio => "fio",
            Self::Own => "load generator",
        }
    }

    fn run(self, target: &Target, workload: &Workload, args: &Args) -> anyhow::Result<Figures> {
        match self {
            Self::Fio => fio::run(&target.uri, workload, args.span, args.seconds),
            Self::Own if target.is_vhost => guest::run(&target.socket, workload, args.span, args.seconds),
            Self::Own => load::run(&target.socket, &target.export, workload, args.span, args.seconds),
        }
        .with_context(|| format!("{} by {} on {}", workload.name, self.name(), target.name))
    }
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let mut text = format!(
        "# Performance\n\nWritten by `make bench BENCH='--rounds {} --seconds {}'` (span={} MiB). Medians over interleaved rounds of one run;\n\
         ratios are taken round by round against the first row. CPU is user and system time of all server processes.\n\
         Absolute figures swing with the machine: read the ratios.\n",
        args.rounds,
        args.seconds,
        args.span >> 20
    );
    let wanted = |engine: &str| args.engine.as_deref().is_none_or(|only| only == engine);
    if wanted("file") {
        text += &file_engine(&args)?;
    }
    if wanted("cluster") {
        text += &cluster(&args)?;
    }
    if wanted("vhost") {
        text += &vhost_on_a_file(&args)?;
    }
    if wanted("hop") {
        text += &hop(&args)?;
    }
    if wanted("vhost-cluster") {
        text += &vhost_on_a_cluster(&args)?;
    }
    if wanted("upgrade") {
        text += &upgrade::table(args.volumes, args.upgrades, &args.workload)?;
    }
    if wanted("idle") {
        text += &idle::table(args.exports, &args.workload)?;
    }
    print!("{text}");
    std::fs::write(&args.out, text).with_context(|| format!("cannot write {}", args.out.display()))
}

/// Every server on a file of its own, same size, same disk.
fn file_engine(args: &Args) -> anyhow::Result<String> {
    let rig = Rig::file()?;
    let cached = Rig::file_with("file_io = \"buffered\"\n")?;
    let (ours, ours_cached) = (rig.serve("ours", args.span)?, cached.serve("ours", args.span)?);
    let nbdkit = Peer::nbdkit_file(&sized(rig.dir(), "nbdkit", args.span)?, &rig.dir().join("nbdkit.sock"))?;
    let qemu = Peer::qemu_nbd(&sized(rig.dir(), "qemu", args.span)?, &rig.dir().join("qemu.sock"))?;
    let targets = [
        Target::peer("nbdkit file", &nbdkit),
        Target::peer("qemu-nbd none, io_uring", &qemu),
        Target::ours("nebd + gateway, direct IO", &ours, pids_of(&rig, &ours)?),
        Target::ours("nebd + gateway, page cache", &ours_cached, pids_of(&cached, &ours_cached)?),
    ];
    fill(args, &targets)?;
    let Measured { text, .. } = measure(args, &Client::ALL, &targets, rig.dir())?;
    Ok(format!(
        "\n## File engine\n\nnbdkit serves from the page cache, as our gateway does with `file_io = \"buffered\"`; the others use direct IO.\n{text}"
    ))
}

fn pids_of(rig: &Rig, export: &Export) -> anyhow::Result<Vec<u32>> {
    let mut pids = pid_of(export)?;
    if let Rig::File { gateway, .. } = rig {
        pids.extend(gateway.id());
    }
    Ok(pids)
}

/// Three replicas, each with its own log, on the same disk: processes of their own, and all in one.
fn cluster(args: &Args) -> anyhow::Result<String> {
    let cluster = Cluster::start()?;
    cluster.create_volume("bench", &args.span.to_string())?;
    let export = cluster.export("bench", false)?;
    let mut pids = pid_of(&export)?;
    pids.extend(
        cluster
            .chunkservers
            .iter()
            .chain([&cluster.mds, &cluster.gateway])
            .filter_map(|process| process.id()),
    );
    let dir = spline_harness::tempdir()?;
    let dev = Dev::start(dir.path())?;
    let targets = [
        Target::ours("six processes", &export, pids),
        Target {
            name: "`spline dev`: one process, and nebd",
            uri: dev.uri()?,
            socket: dev.socket()?,
            export: dev.fact("volume")?,
            pids: dev.pids()?,
            is_vhost: false,
        },
    ];
    fill(args, &targets)?;
    let Measured { text, .. } = measure(args, &Client::ALL, &targets, cluster.dir())?;
    Ok(format!(
        "\n## Cluster\n\nThree chunkservers on one disk, three replicas; a write is answered after a majority synced its log.\n{text}"
    ))
}

/// A guest's disk: the same driver on the same file, served by qemu-storage-daemon and by us.
fn vhost_on_a_file(args: &Args) -> anyhow::Result<String> {
    let rig = Rig::file()?;
    let volume = rig.create("disk", args.span)?;
    let file = rig.dir().join("disk.img");
    let nbd = rig.export(&volume, false)?;
    fill(args, &[Target::ours("the file", &nbd, Vec::new())])?;
    drop(nbd);
    let shown = Shown { read_only: false, queues: 1 };
    let ours = rig.export_to_guest(&volume, shown)?;
    let daemon = StorageDaemon::start(rig.dir(), "daemon", &file, Serving { read_only: false, queues: 1 })?;
    let nebd = ours.nebd.id().context("nebd does not run")?;
    let targets = [
        Target::vhost("qemu-storage-daemon", &daemon.socket, daemon.process.id().into_iter().collect()),
        Target::vhost(
            "nebd + gateway",
            &ours.socket,
            [Some(nebd), rig.gateway().id()].into_iter().flatten().collect(),
        ),
    ];
    let Measured { text, .. } = measure(args, &[Client::Own], &targets, rig.dir())?;
    let resting: Vec<Resting<'_>> = targets
        .iter()
        .map(|target| Resting { name: target.name, socket: &target.socket, pids: &target.pids })
        .collect();
    Ok(format!(
        "\n## A guest's disk (vhost-user-blk), file engine\n\nThe `blkio` crate's driver, one virtqueue, on one file that both serve in turn: \
         qemu-storage-daemon with cache.direct=on, aio=io_uring and an iothread.\n{text}{}",
        rest::table(&resting)?
    ))
}

/// What the split costs: the same device and the same engine in one process, without a link, beside nebd and a gateway.
fn hop(args: &Args) -> anyhow::Result<String> {
    let rig = Rig::file()?;
    let volume = rig.create("disk", args.span)?;
    let file = rig.dir().join("disk.img");
    // An engine locks its file: the one without a link has a file of its own, written in the same way.
    let alone = sized(rig.dir(), "alone", args.span)?;
    [&file, &alone].into_iter().try_for_each(|file| write_whole(file, args.span))?;
    let ours = rig.export_to_guest(&volume, Shown { read_only: false, queues: 1 })?;
    let daemon = StorageDaemon::start(rig.dir(), "daemon", &file, Serving { read_only: false, queues: 1 })?;
    let direct = peers::direct(rig.dir(), &alone, false)?;
    let nebd = ours.nebd.id().context("nebd does not run")?;
    let targets = [
        Target::vhost("qemu-storage-daemon", &daemon.socket, daemon.process.id().into_iter().collect()),
        Target::vhost("one process, no link", direct.socket(), vec![direct.pid()]),
        Target::vhost(
            "nebd + gateway",
            &ours.socket,
            [Some(nebd), rig.gateway().id()].into_iter().flatten().collect(),
        ),
    ];
    let Measured { text, compared } = measure(args, &[Client::Own], &targets, rig.dir())?;
    drop((ours, direct, daemon));
    Ok(format!(
        "\n## What the link costs\n\nA guest's disk by the `blkio` crate's driver, one virtqueue: nebd and a gateway, nebd's device and the gateway's \
         engine in one process\nwithout a link, and qemu-storage-daemon with cache.direct=on, aio=io_uring and an iothread.\n{text}{compared}{}",
        hop_of_nbd(args, &rig, &volume, &alone)?
    ))
}

/// The same for NBD clients.
fn hop_of_nbd(args: &Args, rig: &Rig, volume: &str, alone: &Path) -> anyhow::Result<String> {
    let ours = rig.export(volume, false)?;
    let direct = peers::direct(rig.dir(), alone, true)?;
    let targets = [
        Target::peer("one process, no link", &direct),
        Target::ours("nebd + gateway", &ours, pids_of(rig, &ours)?),
    ];
    let Measured { text, compared } = measure(args, &Client::ALL, &targets, rig.dir())?;
    Ok(format!(
        "\n## What the link costs over NBD\n\nnebd and a gateway, and nebd's NBD server and the gateway's engine in one process without a link.\n{text}{compared}"
    ))
}

/// Fills a file with bytes that are no zeros.
fn write_whole(file: &Path, bytes: u64) -> anyhow::Result<()> {
    let mut file = std::fs::File::options().write(true).open(file)?;
    let block: Vec<u8> = (0..1u32 << 20).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8 | 1).collect();
    for at in 0..bytes.div_ceil(block.len() as u64) {
        let rest = (bytes - at * block.len() as u64).min(block.len() as u64);
        std::io::Write::write_all(&mut file, &block[..rest as usize])?;
    }
    file.sync_all().context("filling a file")
}

/// A volume of one cluster, over NBD and as a guest's disk.
fn vhost_on_a_cluster(args: &Args) -> anyhow::Result<String> {
    let cluster = Cluster::start()?;
    cluster.create_volume("bench", &args.span.to_string())?;
    let nbd = cluster.export("bench", false)?;
    let shown = Shown { read_only: false, queues: 1 };
    let vhost = VhostExport::start(cluster.dir(), &cluster.gateway_socket(), "bench", shown)?;
    let processes = cluster.chunkservers.iter().chain([&cluster.mds, &cluster.gateway]);
    let servers: Vec<u32> = processes.filter_map(|process| process.id()).collect();
    let with = |nebd: Option<u32>| nebd.into_iter().chain(servers.iter().copied()).collect();
    let targets = [
        Target::ours("NBD", &nbd, with(nbd.nebd.id())),
        Target::vhost("vhost-user-blk", &vhost.socket, with(vhost.nebd.id())),
    ];
    fill(args, &targets)?;
    let Measured { text, .. } = measure(args, &[Client::Own], &targets, cluster.dir())?;
    Ok(format!(
        "\n## A guest's disk (vhost-user-blk), cluster\n\nOne volume of one cluster, over NBD and to a guest's driver.\n{text}"
    ))
}

/// Writes every target once, so that reads find data.
fn fill(args: &Args, targets: &[Target]) -> anyhow::Result<()> {
    let fill = Workload { name: "fill", rw: "write", block_bytes: 1 << 20, depth: 8 };
    let mut targets = targets.iter().filter(|target| !target.is_vhost);
    targets.try_for_each(|target| {
        fio::fill(&target.uri, &fill, args.span).with_context(|| format!("filling {}", target.name))
    })
}

/// What came of a part.
struct Measured {
    /// A table of all servers.
    text: String,
    /// Another one, of the last of them against each of the others.
    compared: String,
}

fn measure(args: &Args, clients: &[Client], targets: &[Target], dir: &Path) -> anyhow::Result<Measured> {
    let (mut text, mut compared) = (report::HEAD.to_owned(), report::AGAINST_HEAD.to_owned());
    let mut floors = Vec::new();
    for workload in WORKLOADS.iter().filter(|workload| workload.name.contains(&args.workload)) {
        for client in clients.iter().copied() {
            let servers = rounds(args, client, workload, targets, dir, &mut floors)?;
            text += &report::rows(workload.name, client.name(), workload.block_bytes, &servers);
            compared += &report::against(workload.name, client.name(), &servers);
        }
    }
    let floor = report::median(&floors);
    // Writing to a String can not fail.
    let _ = writeln!(
        text,
        "\nA 4 KiB direct write and fdatasync on the same disk, median between the runs: {floor:.0} µs."
    );
    Ok(Measured { text, compared })
}

/// All rounds of one workload.
fn rounds(
    args: &Args,
    client: Client,
    workload: &Workload,
    targets: &[Target],
    dir: &Path,
    floors: &mut Vec<f64>,
) -> anyhow::Result<Vec<(String, Series)>> {
    let mut rows: Vec<_> = targets.iter().map(|target| (target.name.to_owned(), Series::default())).collect();
    for round in 0..args.rounds as usize {
        floors.push(floor::write_and_sync_us(dir)?);
        for step in 0..targets.len() {
            // A different one begins each round, so that none always runs on a warmed-up or worn-out machine.
            let at = (round + step) % targets.len();
            let before = cpu::seconds(&targets[at].pids)?;
            let figures = client.run(&targets[at], workload, args)?;
            rows[at].1.push(figures, cpu::seconds(&targets[at].pids)? - before);
        }
    }
    Ok(rows)
}

fn pid_of(export: &Export) -> anyhow::Result<Vec<u32>> {
    Ok(vec![export.nebd.id().context("nebd does not run")?])
}

fn sized(dir: &Path, name: &str, bytes: u64) -> anyhow::Result<PathBuf> {
    let path = dir.join(format!("{name}.img"));
    std::fs::File::create(&path)?.set_len(bytes)?;
    Ok(path)
}
