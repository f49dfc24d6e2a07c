//! Memory that changes while requests are in flight, as when memory is plugged: they end where they were asked for.

use anyhow::ensure;
use rustix::fs::MemfdFlags;
use spline_conformance::guest::memory::{BYTES, GUEST, USER};
use spline_conformance::guest::stage::play;
use spline_conformance::guest::{OK, PATIENCE, Piece, Setup, header, kind};
use spline_conformance::pattern;
use spline_harness::wait_until;
use std::fs::File;
use std::os::fd::AsRawFd;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};

#[test]
fn in_flight() -> anyhow::Result<()> {
    play(|stage| {
        let mut guest = stage.guest_as(Setup { inflight: true, ..Setup::default() })?;
        let data = pattern(3, 0, 8192);
        guest.write(100, &data)?;
        stage.gateway().stop()?;
        let mut chains = Vec::new();
        for sector in 100..116 {
            chains.push(guest.ask(0, &[Piece::Out(header(kind::IN, sector)), Piece::In(512), Piece::In(1)])?);
        }
        wait_until("the requests to be fetched", PATIENCE, || {
            Ok((guest.recorded(0)?.len() == 16).then_some(()))
        })?;
        let more: File = rustix::fs::memfd_create("more", MemfdFlags::CLOEXEC)?.into();
        more.set_len(1 << 20)?;
        let plugged = VhostUserMemoryRegionInfo {
            guest_phys_addr: GUEST + BYTES,
            memory_size: 1 << 20,
            userspace_addr: USER + 2 * BYTES,
            mmap_offset: 0,
            mmap_handle: more.as_raw_fd(),
        };
        // The device may want to end what is in flight first: it must not need the front-end for that.
        let frontend = guest.frontend.clone();
        let regions = [guest.memory.region(), plugged];
        let plugging = std::thread::spawn(move || frontend.set_mem_table(&regions).map(drop));
        stage.gateway().cont()?;
        let outcome = plugging.join().map_err(|_| anyhow::anyhow!("panicked"))?;
        outcome?;
        for _ in 0..16 {
            guest.used(0)?;
        }
        for (at, chain) in chains.iter().enumerate() {
            ensure!(guest.memory.read(chain.status(), 1)? == [OK]);
            ensure!(guest.memory.read(chain.pieces[1].0, 512)? == data[at * 512..][..512], "sector={at}");
        }
        guest.write(0, &[9; 512])?;
        ensure!(guest.read(0, 512)? == [9; 512]);
        Ok(())
    })
}

#[test]
fn the_rings_lie_nowhere_any_more() -> anyhow::Result<()> {
    play(|stage| {
        let mut guest = stage.guest()?;
        guest.write(0, &[1; 512])?;
        let elsewhere = VhostUserMemoryRegionInfo {
            guest_phys_addr: GUEST + (1 << 40),
            userspace_addr: USER + (1 << 40),
            ..guest.memory.region()
        };
        if guest.frontend.set_mem_table(&[elsewhere]).is_ok() {
            let _ = guest.ask(0, &[Piece::Out(header(kind::IN, 0)), Piece::In(512), Piece::In(1)])?;
        }
        drop(guest);
        stage.works(false)
    })
}
