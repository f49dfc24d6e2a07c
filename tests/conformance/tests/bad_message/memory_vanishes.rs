//! A front-end that truncates the memory it has shared: the process lives, other exports go on, and the next guest is served.

use spline_conformance::guest::message::request;
use spline_conformance::guest::stage::play;
use spline_conformance::guest::{Piece, Setup, header, kind};

#[test]
fn all_of_it() -> anyhow::Result<()> {
    play(|stage| {
        for _ in 0..3 {
            let guest = stage.guest()?;
            guest.memory.file.set_len(0)?;
            guest.rings[0].kick.ring()?;
            // Whatever comes of the queue, messages are answered or the connection is closed.
            let _ = guest.raw.verdict(request::GET_FEATURES, &[], &[])?;
            drop(guest);
            stage.works(false)?;
        }
        Ok(())
    })
}

#[test]
fn the_buffers() -> anyhow::Result<()> {
    play(|stage| {
        for kind in [kind::IN, kind::OUT] {
            let mut guest = stage.guest()?;
            let data = if kind == kind::IN { Piece::In(65_536) } else { Piece::Out(vec![1; 65_536]) };
            let chain = guest.describe(0, &[Piece::Out(header(kind, 0)), data, Piece::In(1)])?;
            // The rings stay.
            guest.memory.file.set_len(4 << 20)?;
            guest.offer(0, chain.head)?;
            let _ = guest.raw.verdict(request::GET_FEATURES, &[], &[])?;
            drop(guest);
            stage.works(false)?;
        }
        Ok(())
    })
}

#[test]
fn while_requests_are_in_flight() -> anyhow::Result<()> {
    play(|stage| {
        let mut guest = stage.guest_as(Setup { inflight: true, ..Setup::default() })?;
        guest.write(0, &[1; 4096])?;
        stage.gateway().stop()?;
        for _ in 0..16 {
            guest.ask(0, &[Piece::Out(header(kind::IN, 0)), Piece::In(4096), Piece::In(1)])?;
        }
        spline_harness::wait_until(
            "the requests to be fetched",
            spline_conformance::guest::PATIENCE,
            || Ok((guest.recorded(0)?.len() == 16).then_some(())),
        )?;
        guest.memory.file.set_len(0)?;
        stage.gateway().cont()?;
        drop(guest);
        stage.works(false)
    })
}

#[test]
fn the_record_of_what_is_in_flight() -> anyhow::Result<()> {
    play(|stage| {
        let mut guest = stage.guest_as(Setup { inflight: true, ..Setup::default() })?;
        guest.write(0, &[1; 512])?;
        if let Some((_, file)) = &guest.inflight {
            // Sealed by the device, or not: both are well.
            let _ = file.set_len(0);
        }
        let _ = guest.ask(0, &[Piece::Out(header(kind::IN, 0)), Piece::In(512), Piece::In(1)])?;
        let _ = guest.raw.verdict(request::GET_FEATURES, &[], &[])?;
        drop(guest);
        stage.works(false)
    })
}
