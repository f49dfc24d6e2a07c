//! What guests see of an upgrade of the gateway, and of its sudden death: the longest that a client went without an answer.
//!
//! Called by `main`. Knows: `spline gateway upgrade`, kill -9, what nebds count. Must not know: what happens in between.

use crate::asking::{Asking, Manner};
use crate::exports::{self, Disk, Engine};
use crate::report::{median, percentile};
use anyhow::{Context, ensure};
use spline_harness::vhost::Shown;
use spline_harness::{Process, Rig, binaries, wait_until};
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Requests in flight of the guest that writes.
const DEPTH: usize = 32;
/// Bytes that the two guests use of their disks.
const SPAN: u64 = 32 << 20;
/// Answers that show that a guest is served.
const PROGRESS: u64 = 100;
/// What comes after an event and still belongs to it: chunkservers hear of the session, the old process ends.
const SETTLE: Duration = Duration::from_millis(300);
/// How long guests are watched while nothing happens, for each round: about as long as an upgrade takes.
const QUIET: Duration = Duration::from_millis(500);
/// What systemd waits before it starts a gateway that has died (`RestartSec` of the unit).
const RESTART: Duration = Duration::from_millis(20);
/// Time for all nebds to be back; far above what it takes.
const BACK_LIMIT: Duration = Duration::from_secs(60);

/// Gaps of many rounds, milliseconds.
#[derive(Default)]
struct Gaps {
    prober: Vec<f64>,
    writer: Vec<f64>,
    /// The longest pause of a link, as the gateways count it.
    counted: Vec<f64>,
    /// From the command to its answer.
    took: Vec<f64>,
    errors: u64,
    reconnects: f64,
    replays: f64,
}

/// A gateway, its guests, and the two of them that ask.
struct Host {
    rig: Rig,
    disks: Vec<Disk>,
    prober: Asking,
    writer: Asking,
}

/// Tables for `volumes` volumes over `rounds` of each kind, on the engines whose name contains `only`.
///
/// # Errors
/// What does not start, or does not come back.
pub fn table(volumes: usize, rounds: u32, only: &str) -> anyhow::Result<String> {
    let mut text = format!(
        "\n## Upgrade and crash of the gateway\n\n{volumes} guests' disks (vhost-user-blk), a nebd each; one guest keeps {DEPTH} writes of 4 KiB in flight, \
         one reads 4 KiB each millisecond,\nthe others are connected and idle. A gap is the longest time between two answers of a guest in one \
         round; {rounds} rounds\nof each kind: nothing happens, `spline gateway upgrade` to a second copy of the binary and back, kill -9 with a \
         new start after {} ms.\np99 of fewer than 100 rounds is the longest of all.\n\n\
         | engine | event | prober's gap p50, ms | p99 | writer's gap p50 | p99 | errors | reconnects | replays | pause that the gateway counts p50 | p99 | command p50 |\n\
         |---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n",
        RESTART.as_millis()
    );
    for engine in Engine::ALL.into_iter().filter(|engine| engine.name().contains(only)) {
        let mut host = Host::start(engine, volumes)?;
        let quiet = host.rounds(rounds, |host, _, _| {
            std::thread::sleep(QUIET);
            host.settled()
        })?;
        text += &quiet.row(engine, "none");
        text += &host.upgrades(rounds)?.row(engine, "upgrade");
        text += &host.kills(rounds)?.row(engine, "kill -9");
        host.finish()?;
    }
    Ok(text)
}

impl Host {
    fn start(engine: Engine, volumes: usize) -> anyhow::Result<Self> {
        ensure!(volumes >= 2, "two of the volumes are asked: volumes={volumes}");
        let rig = engine.start()?;
        let mut disks = exports::disks(&rig, volumes, Shown { read_only: false, queues: 1 })?;
        let mut ask = |number: usize, manner| {
            let disk = &mut disks[number];
            // A device has one front-end at a time.
            drop(disk.guest.take());
            Asking::start(&disk.export.socket, SPAN, manner)
        };
        let (writer, prober) = (ask(0, Manner::Write { depth: DEPTH })?, ask(1, Manner::Probe)?);
        Ok(Self { rig, disks, prober, writer })
    }

    /// Both are served, and what an event leaves behind is over.
    fn settled(&self) -> anyhow::Result<()> {
        self.prober.wait_for(PROGRESS)?;
        self.writer.wait_for(PROGRESS)?;
        std::thread::sleep(SETTLE);
        Ok(())
    }

    /// Lets an event happen so often, and sees what guests and nebds say to it.
    fn rounds(
        &mut self,
        rounds: u32,
        mut event: impl FnMut(&mut Self, u32, &mut Gaps) -> anyhow::Result<()>,
    ) -> anyhow::Result<Gaps> {
        let mut gaps = Gaps::default();
        let errors = self.prober.errors() + self.writer.errors();
        let connects = exports::sum(&self.disks, "spline_nebd_link_connects_total")?;
        let replays = exports::sum(&self.disks, "spline_nebd_replays_total")?;
        self.settled()?;
        for round in 0..rounds {
            for guest in [&self.prober, &self.writer] {
                guest.take_longest();
            }
            event(self, round, &mut gaps).with_context(|| format!("round={round}"))?;
            self.settled()?;
            gaps.prober.push(milliseconds(self.prober.take_longest()));
            gaps.writer.push(milliseconds(self.writer.take_longest()));
            self.wait_for_all()?;
        }
        gaps.errors = self.prober.errors() + self.writer.errors() - errors;
        gaps.errors += exports::sum(&self.disks, "spline_nebd_faults_total")? as u64;
        gaps.reconnects = exports::sum(&self.disks, "spline_nebd_link_connects_total")? - connects;
        gaps.replays = exports::sum(&self.disks, "spline_nebd_replays_total")? - replays;
        Ok(gaps)
    }

    /// Every volume has its session.
    fn wait_for_all(&self) -> anyhow::Result<()> {
        wait_until("all sessions", BACK_LIMIT, || {
            let status = self.rig.gateway_status()?;
            let open = status["sessions"].as_array().context("sessions")?.iter();
            let served =
                open.filter(|session| session["state"] == "serving" && session["links"] != 0).count();
            Ok((served == self.disks.len()).then_some(()))
        })
    }

    fn upgrades(&mut self, rounds: u32) -> anyhow::Result<Gaps> {
        let binaries = [copied(self.rig.dir())?, binaries::find("spline-gateway")?];
        self.rounds(rounds, |host, round, gaps| {
            let told = host.rig.upgrade(Some(&binaries[round as usize % binaries.len()]))?;
            let number = |name: &str| told[name].as_f64().with_context(|| format!("no {name} in {told}"));
            gaps.counted.push(number("pause_us")? / 1e3);
            gaps.took.push(number("took_ms")?);
            Ok(())
        })
    }

    fn kills(&mut self, rounds: u32) -> anyhow::Result<Gaps> {
        self.rounds(rounds, |host, _, _| {
            let gateway: &mut Process = host.rig.gateway_mut();
            gateway.kill9()?;
            std::thread::sleep(RESTART);
            gateway.start()
        })
    }

    fn finish(self) -> anyhow::Result<()> {
        self.prober.finish()?;
        self.writer.finish()
    }
}

impl Gaps {
    fn row(&self, engine: Engine, event: &str) -> String {
        let both = |values: &[f64]| match values {
            [] => "| | ".to_owned(),
            _ => format!("| {:.1} | {:.1} ", median(values), percentile(values, 0.99)),
        };
        let took = if self.took.is_empty() { String::new() } else { format!("{:.0}", median(&self.took)) };
        let mut text = String::new();
        // Writing to a String can not fail.
        let _ = writeln!(
            text,
            "| {} | {event} {}{}| {} | {} | {} {}| {took} |",
            engine.name(),
            both(&self.prober),
            both(&self.writer),
            self.errors,
            self.reconnects,
            self.replays,
            both(&self.counted),
        );
        text
    }
}

/// A second copy of the binary, where nobody else writes.
fn copied(dir: &Path) -> anyhow::Result<PathBuf> {
    let copy = dir.join("spline-gateway.other");
    std::fs::copy(binaries::find("spline-gateway")?, &copy)?;
    Ok(copy)
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
