//! nebd is killed while a guest's requests are in flight, and started again: with the record that the front-end hands back,
//! exactly what was unanswered is done again, in order, each answered once.

use anyhow::{Context, ensure};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use spline_conformance::guest::ring::{Desc, NEXT, WRITE};
use spline_conformance::guest::{Chain, Guest, OK, PATIENCE, Piece, Setup, UNANSWERED, header, kind};
use spline_conformance::{MIB, pattern};
use spline_harness::vhost::Shown;
use spline_harness::{Rig, wait_until};
use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;

const DISK: u64 = 64 * MIB;

fn setup() -> Setup {
    Setup { inflight: true, ..Setup::default() }
}

fn write(guest: &mut Guest, sector: u64, byte: u8) -> anyhow::Result<Chain> {
    guest.ask(0, &[Piece::Out(header(kind::OUT, sector)), Piece::Out(vec![byte; 512]), Piece::In(1)])
}

/// Takes the answers of these requests, in whatever order; no other may come.
fn answered_once(guest: &mut Guest, chains: &[Chain]) -> anyhow::Result<()> {
    let mut waiting: BTreeSet<u32> = chains.iter().map(|chain| u32::from(chain.head)).collect();
    while !waiting.is_empty() {
        let (head, _) = guest.used(0).with_context(|| format!("unanswered={waiting:?}"))?;
        ensure!(waiting.remove(&head), "answered twice, or never asked: head={head} waiting={waiting:?}");
    }
    for chain in chains {
        let status = guest.memory.read(chain.status(), 1)?[0];
        ensure!(status == OK, "head={} status={status}", chain.head);
    }
    ensure!(guest.recorded(0)?.is_empty(), "recorded as unanswered: {:?}", guest.recorded(0)?);
    // The next answer in the ring is that of the next request.
    guest.read(0, 512)?;
    ensure!(guest.rings[0].unseen(&guest.memory)? == 0, "answers that nobody waits for");
    Ok(())
}

#[test]
fn exactly_what_was_unanswered_is_done_again() -> anyhow::Result<()> {
    let rig = Rig::file()?;
    let mut export = rig.export_to_guest(&rig.create("disk", DISK)?, Shown::default())?;
    let file = File::options().write(true).open(rig.dir().join("disk.img"))?;
    let mut guest = Guest::started(&export.socket, setup())?;
    for sector in 0..8 {
        guest.write(sector, &[1; 512])?;
    }
    // Whoever does an answered write again writes over this.
    file.write_all_at(&[0xee; 8 * 512], 0)?;
    rig.gateway().stop()?;
    let mut chains = Vec::new();
    for sector in 100..110 {
        chains.push(write(&mut guest, sector, sector as u8)?);
    }
    // One over the other: the last counts.
    for byte in 1..=5 {
        chains.push(write(&mut guest, 200, byte)?);
    }
    let read = guest.ask(0, &[Piece::Out(header(kind::IN, 0)), Piece::In(4096), Piece::In(1)])?;
    chains.push(read.clone());
    wait_until("the requests to be fetched", PATIENCE, || {
        Ok((guest.recorded(0)?.len() == chains.len()).then_some(()))
    })?;
    export.nebd.kill9()?;
    rig.gateway().cont()?;
    export.restart()?;
    // One that was offered while nobody was there.
    chains.push(write(&mut guest, 300, 7)?);
    guest.reconnect(&export.socket).with_context(|| export.nebd.log_tail())?;
    answered_once(&mut guest, &chains).with_context(|| export.nebd.log_tail())?;
    ensure!(guest.memory.read(read.pieces[1].0, 4096)? == [0xee; 4096], "an answered write was done again");
    for sector in 100..110 {
        ensure!(guest.read(sector, 512)? == vec![sector as u8; 512], "sector={sector}");
    }
    ensure!(guest.read(200, 512)? == [5; 512], "writes over one another were not done in order");
    ensure!(guest.read(300, 512)? == [7; 512]);
    Ok(())
}

#[test]
fn a_front_end_that_comes_back_finds_its_requests() -> anyhow::Result<()> {
    let rig = Rig::file()?;
    let export = rig.export_to_guest(&rig.create("disk", DISK)?, Shown::default())?;
    let mut guest = Guest::started(&export.socket, setup())?;
    for round in 0..5u8 {
        rig.gateway().stop()?;
        let chains = (0..16)
            .map(|sector| write(&mut guest, sector, 10 + round))
            .collect::<anyhow::Result<Vec<_>>>()?;
        wait_until("the requests to be fetched", PATIENCE, || {
            Ok((guest.recorded(0)?.len() == 16).then_some(()))
        })?;
        guest.raw.stream()?.shutdown(std::net::Shutdown::Both)?;
        rig.gateway().cont()?;
        guest.reconnect(&export.socket).with_context(|| export.nebd.log_tail())?;
        answered_once(&mut guest, &chains).with_context(|| export.nebd.log_tail())?;
        ensure!(guest.read(0, 8192)? == [10 + round; 8192]);
    }
    Ok(())
}

/// Requests in flight; three descriptors each, so they fit in the queue.
const SLOTS: u16 = 32;
/// Sectors of each write.
const SECTORS: usize = 4;

/// A guest that writes its slots again and again, each with a version of its own.
struct Writer {
    guest: Guest,
    /// Where header, data and status of each slot lie.
    places: Vec<[u64; 3]>,
    versions: Vec<u64>,
    waiting: BTreeSet<u16>,
}

impl Writer {
    fn new(mut guest: Guest) -> anyhow::Result<Self> {
        let mut places = Vec::new();
        for slot in 0..SLOTS {
            let pieces = [
                Piece::Out(header(kind::OUT, u64::from(slot) * 64)),
                Piece::Out(vec![0; SECTORS * 512]),
                Piece::In(1),
            ];
            let found: Vec<u64> = guest.place(&pieces)?.into_iter().map(|(address, _)| address).collect();
            let [head, data, status] = found[..] else { anyhow::bail!("three pieces") };
            let parts = [(head, 16, NEXT), (data, SECTORS as u32 * 512, NEXT), (status, 1, WRITE)];
            for (at, (address, length, flags)) in (slot * 3..).zip(parts) {
                guest.rings[0].set(&guest.memory, at, Desc { address, length, flags, next: at + 1 })?;
            }
            places.push([head, data, status]);
        }
        Ok(Self { guest, places, versions: vec![0; usize::from(SLOTS)], waiting: BTreeSet::new() })
    }

    fn data(slot: u16, version: u64) -> Vec<u8> {
        pattern(version << 16 | u64::from(slot), 0, SECTORS * 512)
    }

    /// Offers every slot that is free, and kicks once.
    fn offer(&mut self) -> anyhow::Result<()> {
        for slot in (0..SLOTS).filter(|slot| !self.waiting.contains(slot)).collect::<Vec<_>>() {
            let at = usize::from(slot);
            self.versions[at] += 1;
            let memory = &self.guest.memory;
            memory.write(self.places[at][1], &Self::data(slot, self.versions[at]))?;
            memory.write(self.places[at][2], &[UNANSWERED])?;
            self.guest.rings[0].offer(&self.guest.memory, slot * 3)?;
            self.waiting.insert(slot);
        }
        self.guest.rings[0].kick.ring()
    }

    /// Takes the answers that are there, at least so many.
    fn take(&mut self, least: usize) -> anyhow::Result<()> {
        let mut taken = 0;
        while taken < least || self.guest.rings[0].unseen(&self.guest.memory)? > 0 {
            let (head, _) = self.guest.used(0).with_context(|| format!("waiting={:?}", self.waiting))?;
            let slot = u16::try_from(head)? / 3;
            ensure!(
                head % 3 == 0 && self.waiting.remove(&slot),
                "answered twice, or never asked: head={head}"
            );
            let status = self.guest.memory.read(self.places[usize::from(slot)][2], 1)?[0];
            ensure!(status == OK, "slot={slot} status={status}");
            taken += 1;
        }
        Ok(())
    }
}

#[test]
fn at_any_moment() -> anyhow::Result<()> {
    let rounds = if std::env::var_os("SPLINE_ROUNDS").is_some() { 100 } else { 8 };
    let rig = Rig::file()?;
    let mut export = rig.export_to_guest(&rig.create("disk", DISK)?, Shown::default())?;
    let mut random = StdRng::seed_from_u64(0x5eed);
    let mut writer = Writer::new(Guest::started(&export.socket, setup())?)?;
    for round in 0..rounds {
        for _ in 0..random.random_range(1..20) {
            writer.offer()?;
            let least = random.random_range(0..=writer.waiting.len());
            writer.take(least).with_context(|| format!("round={round}\n{}", export.nebd.log_tail()))?;
        }
        writer.offer()?;
        export.nebd.kill9()?;
        export.restart()?;
        writer.guest.reconnect(&export.socket).with_context(|| export.nebd.log_tail())?;
        let left = writer.waiting.len() - usize::from(writer.guest.rings[0].unseen(&writer.guest.memory)?);
        writer
            .take(writer.waiting.len())
            .with_context(|| format!("round={round} left={left}\n{}", export.nebd.log_tail()))?;
        ensure!(
            writer.guest.recorded(0)?.is_empty(),
            "recorded as unanswered: {:?}",
            writer.guest.recorded(0)?
        );
    }
    drop(writer.guest.raw.stream()?.shutdown(std::net::Shutdown::Both));
    let mut reader = Guest::usual(&export.socket)?;
    for slot in 0..SLOTS {
        let found = reader.read(u64::from(slot) * 64, (SECTORS * 512) as u32)?;
        ensure!(
            found == Writer::data(slot, writer.versions[usize::from(slot)]),
            "slot={slot}: not the last version"
        );
    }
    Ok(())
}
