//! A request is bytes; how they are cut into buffers is the driver's affair (virtio 1.2, 2.7.4): all of these work.

use anyhow::ensure;
use spline_conformance::guest::stage::play;
use spline_conformance::guest::{Guest, OK, Piece, Setup, header, kind};
use spline_conformance::pattern;

/// Bytes as buffers of these lengths, the rest as one.
fn cut(bytes: &[u8], lengths: &[usize]) -> Vec<Piece> {
    let mut rest = bytes;
    let mut pieces = Vec::new();
    for length in lengths {
        let (piece, left) = rest.split_at(*length);
        pieces.push(Piece::Out(piece.to_vec()));
        rest = left;
    }
    pieces.extend((!rest.is_empty()).then(|| Piece::Out(rest.to_vec())));
    pieces
}

/// Writes by one framing, reads by another.
fn round_trip(guest: &mut Guest, out: &[usize], status: &[Piece], reads: &[u32]) -> anyhow::Result<()> {
    let data = pattern(out.len() as u64, reads.len() as u64, 2048);
    let pieces = [cut(&[header(kind::OUT, 8), data.clone()].concat(), out), status.to_vec()].concat();
    guest.expect(&pieces, OK)?;
    let mut pieces = cut(&header(kind::IN, 8), &[16]);
    pieces.extend(reads.iter().map(|length| Piece::In(*length)));
    let chain = guest.ask(0, &pieces)?;
    ensure!(guest.used(0)?.1 == 2049, "bytes written");
    let mut found = Vec::new();
    for (address, length) in &chain.pieces[1..] {
        found.extend(guest.memory.read(*address, *length as usize)?);
    }
    ensure!(found.pop() == Some(OK) && found == data, "reads={reads:?}");
    Ok(())
}

#[test]
fn any_works() -> anyhow::Result<()> {
    play(|stage| {
        let mut guest = stage.guest()?;
        let status = [Piece::In(1)];
        // Header and data in one buffer; the header in two, in sixteen; its end together with data; data in odd pieces.
        for out in [&[][..], &[8], &[1, 15], &[1; 16], &[4, 4, 20], &[15, 2], &[16, 1, 1, 509], &[16, 512, 3]]
        {
            round_trip(&mut guest, out, &status, &[2048, 1])?;
        }
        // Data and status in one buffer; the data's end with the status; data byte by byte at its end.
        for reads in [&[2049][..], &[1, 2048], &[2047, 2], &[512, 1537], &[2046, 1, 1, 1], &[1024, 1024, 1]] {
            round_trip(&mut guest, &[16], &status, reads)?;
        }
        Ok(())
    })
}

#[test]
fn empty_buffers_count_for_nothing() -> anyhow::Result<()> {
    play(|stage| {
        let mut guest = stage.guest()?;
        let empty = || Piece::Out(Vec::new());
        let data = pattern(1, 2, 512);
        let write = [
            empty(),
            Piece::Out(header(kind::OUT, 3)),
            empty(),
            Piece::Out(data.clone()),
            empty(),
            Piece::In(0),
            Piece::In(1),
        ];
        // An empty buffer may be refused, as QEMU does; it must not be taken for anything else.
        let chain = guest.ask(0, &write)?;
        guest_ends(&mut guest, chain.status())?;
        let mut guest = {
            drop(guest);
            stage.guest()?
        };
        let found = guest.read(3, 512)?;
        ensure!(found == data || found == vec![0; 512], "something else was written");
        Ok(())
    })
}

fn guest_ends(guest: &mut Guest, status: u64) -> anyhow::Result<()> {
    spline_harness::wait_until("an end", spline_conformance::guest::PATIENCE, || {
        let answered = guest.memory.read(status, 1)?[0] == OK;
        Ok((answered || guest.rings[0].error.is_rung()?).then_some(()))
    })
}

#[test]
fn with_event_indexes() -> anyhow::Result<()> {
    play(|stage| {
        let features = spline_conformance::guest::feature::EVENT_INDEX;
        let mut guest = stage.guest_as(Setup { features, ..Setup::default() })?;
        for round in 0..300u16 {
            // Ask for an interrupt with the next used entry.
            let at = guest.rings[0].available + 4 + 2 * 128;
            guest.memory.write(at, &guest.rings[0].seen.to_le_bytes())?;
            let data = pattern(u64::from(round), 0, 512);
            guest.write(u64::from(round), &data)?;
        }
        Ok(())
    })
}
