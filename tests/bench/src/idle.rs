//! What a host full of guests that ask for nothing costs: processor time, wake-ups and memory, of the gateway and of the nebds.
//!
//! Called by `main`. Must not know: what a server does while it rests.

use crate::cpu;
use crate::exports::{self, Engine};
use crate::rest::{Memory, switches};
use anyhow::Context;
use spline_harness::Rig;
use spline_harness::vhost::Shown;
use std::fmt::Write;
use std::time::Duration;

/// How long they are watched.
const WATCHED: Duration = Duration::from_secs(20);
/// What their start has set going is over: nebds give memory back, io_uring's threads end.
const SETTLE: Duration = Duration::from_secs(6);

/// A table for `count` exports of one gateway, on the engines whose name contains `only`.
///
/// # Errors
/// What does not start, or those of /proc.
pub fn table(count: usize, only: &str) -> anyhow::Result<String> {
    let mut text = format!(
        "\n## {count} exports at rest\n\nEach has a nebd and a client of its own, which is connected and asks for nothing, for {} s; a guest's disk has \
         four queues, of which\nits guest runs one. CPU is of one processor. Memory is the gateway's, proportional, with {count} exports less that \
         without, for each export:\nits own, and of what it shares with nebds (rings; guests' memory that it has touched). The kernel's own memory \
         is not in it.\n\n\
         | engine | exports | links | gateway CPU, % | wake-ups a second | own KiB an export | shared KiB an export | all nebds CPU, % | KiB a nebd |\n\
         |---|---|---:|---:|---:|---:|---:|---:|---:|\n",
        WATCHED.as_secs()
    );
    for engine in Engine::ALL.into_iter().filter(|engine| engine.name().contains(only)) {
        let rig = engine.start()?;
        let before = memory_of_gateway(&rig)?;
        let disks = exports::disks(&rig, count, Shown::default())?;
        let nebds: Vec<u32> = disks.iter().filter_map(|disk| disk.export.nebd.id()).collect();
        text += &row((engine, "vhost-user-blk"), &rig, &before, &nebds)?;
        drop(disks);
        let rig = engine.start()?;
        let before = memory_of_gateway(&rig)?;
        let served = exports::served(&rig, count)?;
        let nebds: Vec<u32> = served.iter().filter_map(|served| served.export.nebd.id()).collect();
        text += &row((engine, "NBD"), &rig, &before, &nebds)?;
        drop(served);
    }
    Ok(text)
}

fn gateway_of(rig: &Rig) -> anyhow::Result<u32> {
    rig.gateway().id().context("the gateway does not run")
}

fn memory_of_gateway(rig: &Rig) -> anyhow::Result<Memory> {
    Memory::of(gateway_of(rig)?)
}

fn row(
    (engine, exports): (Engine, &str),
    rig: &Rig,
    before: &Memory,
    nebds: &[u32],
) -> anyhow::Result<String> {
    std::thread::sleep(SETTLE);
    let gateway = [gateway_of(rig)?];
    let sessions = rig.gateway_status()?["sessions"].as_array().cloned().context("sessions")?;
    let links: u64 = sessions.iter().filter_map(|session| session["links"].as_u64()).sum();
    let (woken, busy, nebds_busy) =
        (switches(&gateway)?, cpu::exact_seconds(&gateway)?, cpu::exact_seconds(nebds)?);
    std::thread::sleep(WATCHED);
    let seconds = WATCHED.as_secs_f64();
    let woken = switches(&gateway)?.saturating_sub(woken) as f64 / seconds;
    let busy = (cpu::exact_seconds(&gateway)? - busy) / seconds * 100.0;
    let nebds_busy = (cpu::exact_seconds(nebds)? - nebds_busy) / seconds * 100.0;
    let after = memory_of_gateway(rig)?;
    let each = |after: u64, before: u64| (after as f64 - before as f64) / nebds.len() as f64;
    let own = each(after.own_kib, before.own_kib);
    let shared = each(after.shared_kib, before.shared_kib);
    let all: Vec<Memory> = nebds.iter().map(|nebd| Memory::of(*nebd)).collect::<anyhow::Result<_>>()?;
    let nebd = all.iter().map(|memory| memory.own_kib).sum::<u64>() / nebds.len() as u64;
    let mut text = String::new();
    // Writing to a String can not fail.
    let _ = writeln!(
        text,
        "| {} | {exports} | {links} | {busy:.2} | {woken:.0} | {own:.0} | {shared:.0} | {nebds_busy:.2} | {nebd} |",
        engine.name()
    );
    Ok(text)
}
