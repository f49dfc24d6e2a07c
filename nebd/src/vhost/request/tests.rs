use super::*;
use crate::vhost::driver::{BUFFERS, Driver};
use proptest::prelude::*;
use spline_link::VolumeTraits;
use spline_types::{BlockSize, Geometry, Invalid};

fn export(read_only: bool) -> Export {
    Export {
        name: "disk".into(),
        description: String::new(),
        geometry: Geometry { size: 1 << 30, block_size: BlockSize::B4096 },
        traits: VolumeTraits::default(),
        read_only,
    }
}

/// Cuts `bytes` bytes at `address` at the given places.
fn pieces(address: u64, bytes: u32, cuts: &[u32], writable: bool) -> Vec<(u64, u32, bool)> {
    let mut ends: Vec<u32> = cuts.iter().map(|cut| cut % bytes).filter(|cut| *cut > 0).collect();
    ends.push(bytes);
    ends.sort_unstable();
    ends.dedup();
    let starts = std::iter::once(0).chain(ends.clone());
    starts.zip(ends).map(|(start, end)| (address + u64::from(start), end - start, writable)).collect()
}

struct Asked {
    driver: Driver,
    result: Result<(Wish, Segment), QueueError>,
    chain: Chain,
}

/// Offers a request of `readable` bytes and a writable part of `writable` bytes.
fn ask(readable: &[u8], writable: u32, cuts: (&[u32], &[u32]), writethrough: bool, export: &Export) -> Asked {
    let mut driver = Driver::new(64);
    driver.put(BUFFERS, readable);
    let mut parts = Vec::new();
    if !readable.is_empty() {
        parts.extend(pieces(BUFFERS, readable.len() as u32, cuts.0, false));
    }
    if writable > 0 {
        parts.extend(pieces(BUFFERS + (1 << 20), writable, cuts.1, true));
    }
    driver.chain(0, &parts);
    driver.offer(0);
    let mut queue = driver.queue();
    let mut chain = Chain::default();
    queue.fetch(&mut chain).expect("a sound chain");
    let result = understand(&mut chain, &driver.memory, export, writethrough);
    Asked { driver, result, chain }
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

fn wish_of(readable: &[u8], writable: u32) -> Wish {
    ask(readable, writable, (&[], &[]), false, &export(false)).result.expect("framed").0
}

fn range(offset: u64, length: u64) -> ByteRange {
    ByteRange::new(offset, length).expect("fits")
}

fn ranged(kind: u32, sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let range = [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat();
    [header(kind, 0), range].concat()
}

#[test]
fn every_type_is_understood() {
    let read = Wish::Block { op: BlockOp::Read, range: range(512 * 7, 4096), fua: false };
    assert_eq!(wish_of(&header(TYPE_IN, 7), 4097), read);
    let data = [header(TYPE_OUT, 8), vec![1; 512]].concat();
    assert_eq!(wish_of(&data, 1), Wish::Block { op: BlockOp::Write, range: range(4096, 512), fua: false });
    let flush = Wish::Block { op: BlockOp::Flush, range: ByteRange::EMPTY, fua: false };
    assert_eq!(wish_of(&header(TYPE_FLUSH, 0), 1), flush);
    assert_eq!(wish_of(&header(TYPE_GET_ID, 0), 21), Wish::Serial);
    let discard = Wish::Block { op: BlockOp::Discard, range: range(512, 1024), fua: false };
    assert_eq!(wish_of(&ranged(TYPE_DISCARD, 1, 2, 0), 1), discard);
    for (flags, no_hole) in [(0, true), (1, false)] {
        let op = BlockOp::WriteZeroes { no_hole, fast: false };
        let zeroes = Wish::Block { op, range: range(512, 1024), fua: false };
        assert_eq!(wish_of(&ranged(TYPE_WRITE_ZEROES, 1, 2, flags), 1), zeroes);
    }
    assert_eq!(wish_of(&header(TYPE_IN, 7), 1), Wish::Nothing);
}

#[test]
fn what_can_not_be_done_is_refused() {
    let invalid = |what| Wish::Refused(Fault::Invalid(what));
    let unsupported = Wish::Refused(Fault::Unsupported);
    assert_eq!(wish_of(&header(99, 0), 1), unsupported);
    assert_eq!(wish_of(&header(TYPE_IN, 0), 512), invalid(Invalid::Alignment));
    assert_eq!(wish_of(&[header(TYPE_OUT, 0), vec![0; 100]].concat(), 1), invalid(Invalid::Alignment));
    assert_eq!(wish_of(&header(TYPE_IN, 2 << 20), 513), invalid(Invalid::PastEnd));
    assert_eq!(wish_of(&header(TYPE_IN, (2 << 20) - 1), 1025), invalid(Invalid::PastEnd));
    assert_eq!(wish_of(&header(TYPE_IN, u64::MAX / 256), 513), invalid(Invalid::PastEnd));
    assert_eq!(wish_of(&header(TYPE_IN, u64::MAX / 512), 513), invalid(Invalid::PastEnd));
    assert_eq!(wish_of(&ranged(TYPE_DISCARD, 0, 8, 1), 1), unsupported);
    assert_eq!(wish_of(&ranged(TYPE_WRITE_ZEROES, 0, 8, 2), 1), unsupported);
    assert_eq!(wish_of(&ranged(TYPE_DISCARD, 0, u32::MAX, 0), 1), invalid(Invalid::TooLarge));
    assert_eq!(wish_of(&header(TYPE_DISCARD, 0), 1), invalid(Invalid::Flags), "no range");
    let two = [ranged(TYPE_DISCARD, 0, 8, 0), vec![0; 16]].concat();
    assert_eq!(wish_of(&two, 1), invalid(Invalid::Flags), "two ranges");
    let write = [header(TYPE_OUT, 0), vec![1; 512]].concat();
    for request in [&write, &ranged(TYPE_DISCARD, 0, 8, 0), &ranged(TYPE_WRITE_ZEROES, 0, 8, 0)] {
        let asked = ask(request, 1, (&[], &[]), false, &export(true));
        assert_eq!(asked.result.expect("framed").0, Wish::Refused(Fault::ReadOnly));
    }
}

#[test]
fn without_a_header_or_a_status_nothing_can_be_answered() {
    for (readable, writable) in [(15, 1), (16, 0), (0, 513)] {
        let asked = ask(&vec![0; readable], writable, (&[], &[]), false, &export(false));
        assert!(matches!(asked.result, Err(QueueError::Framing { .. })), "{readable} {writable}");
    }
}

#[test]
fn without_flushes_writes_are_durable_at_once() {
    let write = [header(TYPE_OUT, 0), vec![1; 512]].concat();
    for (request, fua) in
        [(&write, true), (&ranged(TYPE_WRITE_ZEROES, 0, 8, 0), true), (&header(TYPE_FLUSH, 0), false)]
    {
        match ask(request, 1, (&[], &[]), true, &export(false)).result.expect("framed").0 {
            Wish::Block { fua: got, .. } => assert_eq!(got, fua),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn the_serial_is_cut_or_filled_up() {
    for room in [0, 5, 20, 30] {
        let asked = ask(&header(TYPE_GET_ID, 0), room + 1, (&[], &[7]), false, &export(false));
        asked.driver.put(BUFFERS + (1 << 20), &[0xee; 32]);
        let written = write_serial(&asked.driver.memory, &asked.chain.writable, "disk0");
        let mut expected = b"disk0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0".to_vec();
        expected.truncate(room as usize);
        assert_eq!(written as usize, expected.len());
        assert_eq!(asked.driver.get(BUFFERS + (1 << 20), expected.len()), expected);
        assert_eq!(asked.driver.get(BUFFERS + (1 << 20) + u64::from(written), 1), [0xee]);
    }
}

proptest! {
    /// virtio 1.2, 2.7.4: the framing of a message in descriptors says nothing.
    #[test]
    fn how_a_request_is_cut_into_buffers_does_not_matter(
        is_write in any::<bool>(),
        sectors in 1u32..40,
        readable_cuts in proptest::collection::vec(any::<u32>(), 0..20),
        writable_cuts in proptest::collection::vec(any::<u32>(), 0..20),
    ) {
        let bytes = sectors * 512;
        let payload: Vec<u8> = (0..bytes).map(|at| (at * 7 + at / 251) as u8).collect();
        let (request, writable) = match is_write {
            true => ([header(TYPE_OUT, 3), payload.clone()].concat(), 1),
            false => (header(TYPE_IN, 3), bytes + 1),
        };
        let asked = ask(&request, writable, (&readable_cuts, &writable_cuts), false, &export(false));
        let (wish, status) = asked.result.expect("framed");
        let op = if is_write { BlockOp::Write } else { BlockOp::Read };
        prop_assert_eq!(wish, Wish::Block { op, range: range(3 * 512, u64::from(bytes)), fua: false });
        let data = if is_write { &asked.chain.readable } else { &asked.chain.writable };
        prop_assert_eq!(data.iter().map(|segment| segment.length).sum::<u32>(), bytes);
        if is_write {
            let mut got = Vec::new();
            for segment in data {
                let mut part = vec![0; segment.length as usize];
                asked.driver.memory.read(*segment, 0, &mut part);
                got.extend(part);
            }
            prop_assert_eq!(got, payload);
        }
        answer(&asked.driver.memory, status, BlkStatus::IoError);
        let last = if is_write { 0 } else { u64::from(bytes) };
        prop_assert_eq!(asked.driver.get(BUFFERS + (1 << 20) + last, 1), [1]);
    }
}
