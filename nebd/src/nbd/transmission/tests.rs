//! Requests driven byte by byte and with everything that a hostile client may send.

use super::*;
use proptest::prelude::*;
use spline_link::VolumeTraits;
use spline_types::{BlockSize, Geometry};

const SIZE: u64 = 1 << 30;
const ALL: Agreed = Agreed { structured: true, allocation: true, block_size: false };

/// Room for `requests` requests that hold `bytes`.
fn room(area: &Rc<Area>, requests: usize, bytes: u64) -> Room<'_> {
    Room { requests, bytes, area }
}

fn area() -> Rc<Area> {
    Area::create(64 << 20).expect("creates")
}

fn export() -> Export {
    Export {
        name: "disk0".into(),
        description: String::new(),
        geometry: Geometry { size: SIZE, block_size: BlockSize::B4096 },
        traits: VolumeTraits::default(),
        read_only: false,
    }
}

fn request(command: u16, flags: u16, offset: u64, length: u32) -> Vec<u8> {
    let mut bytes = REQUEST_MAGIC.to_be_bytes().to_vec();
    bytes.extend_from_slice(&flags.to_be_bytes());
    bytes.extend_from_slice(&command.to_be_bytes());
    bytes.extend_from_slice(&0xc00c_1e55u64.to_be_bytes());
    bytes.extend_from_slice(&offset.to_be_bytes());
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes
}

/// What a request that has wholly come leads to.
fn judge(agreed: Agreed, export: &Export, head: &[u8], payload: usize) -> Event {
    let mut machine = Transmission::new(agreed);
    let bytes = [head, &vec![7; payload]].concat();
    let (used, event) = machine.advance(&bytes, export, room(&area(), 16, 64 << 20));
    if !matches!(event, Event::Full | Event::Violation(_)) {
        assert_eq!(used, bytes.len(), "the stream stays in step");
    }
    event
}

fn error_of(event: &Event) -> Option<NbdError> {
    match event {
        Event::Refused(refused) => {
            assert_eq!(refused.cookie, 0xc00c_1e55);
            Some(refused.error)
        }
        _ => None,
    }
}

#[test]
fn requests_become_what_the_gateway_gets() {
    let zeroes = |no_hole, fast| BlockOp::WriteZeroes { no_hole, fast };
    let cases = [
        (CMD_READ, CMD_FLAG_DF, 4096, 8192, BlockOp::Read, false),
        (CMD_READ, CMD_FLAG_FUA, 1, 511, BlockOp::Read, false),
        (CMD_WRITE, CMD_FLAG_FUA, 0, 4096, BlockOp::Write, true),
        (CMD_WRITE, 0, SIZE - 1, 1, BlockOp::Write, false),
        (CMD_FLUSH, CMD_FLAG_FUA, 0, 0, BlockOp::Flush, false),
        (CMD_TRIM, CMD_FLAG_FUA, 0, 1 << 30, BlockOp::Discard, true),
        (CMD_CACHE, 0, 0, 4096, BlockOp::Cache, false),
        (CMD_WRITE_ZEROES, CMD_FLAG_NO_HOLE, 0, 1 << 30, zeroes(true, false), false),
        (CMD_WRITE_ZEROES, CMD_FLAG_FAST_ZERO | CMD_FLAG_FUA, 0, 1, zeroes(false, true), true),
        (CMD_BLOCK_STATUS, CMD_FLAG_REQ_ONE, 0, 1 << 30, BlockOp::Status, false),
    ];
    for (command, flags, offset, length, op, fua) in cases {
        let payload = if command == CMD_WRITE { length as usize } else { 0 };
        let event = judge(ALL, &export(), &request(command, flags, offset, length), payload);
        let Event::Request(incoming) = event else { panic!("command {command}: {event:?}") };
        let ticket = incoming.ticket;
        assert_eq!((ticket.op, incoming.fua, ticket.cookie), (op, fua, 0xc00c_1e55));
        assert_eq!((ticket.range.offset(), ticket.range.length()), (offset, length.into()));
        let data = incoming.data.as_ref();
        if command == CMD_WRITE {
            assert_eq!(data.map(Buffer::to_vec), Some(vec![7; payload]));
        } else {
            assert_eq!(data.map_or(0, Buffer::length) as u64, ticket.data_bytes());
        }
        assert_eq!(data.is_some(), matches!(op, BlockOp::Read | BlockOp::Write | BlockOp::Status));
        assert_eq!(ticket.one_chunk, command == CMD_READ && flags & CMD_FLAG_DF != 0);
        assert_eq!(ticket.one_extent, command == CMD_BLOCK_STATUS);
    }
}

#[test]
fn wrong_requests_get_the_error_of_the_specification() {
    let (max, inval, space) = (REQUEST_BYTES_MAX, NbdError::Inval, NbdError::NoSpace);
    let cases = [
        // Past the end: writes ENOSPC, everything else EINVAL.
        (CMD_READ, 0, SIZE - 511, 512, inval),
        (CMD_WRITE, 0, SIZE - 511, 512, space),
        (CMD_WRITE, 0, u64::MAX, 512, space),
        (CMD_WRITE_ZEROES, 0, SIZE, 1, space),
        (CMD_TRIM, 0, SIZE, 1, inval),
        (CMD_CACHE, 0, SIZE, 1, inval),
        (CMD_BLOCK_STATUS, 0, SIZE, 1, inval),
        (CMD_READ, 0, u64::MAX, u32::MAX, inval),
        (CMD_READ, 0, SIZE + 1, 0, inval),
        // Too large.
        (CMD_READ, 0, 0, max + 1, inval),
        (CMD_WRITE, 0, 0, max + 1, inval),
        (CMD_READ, 0, 0, u32::MAX, inval),
        // Flags that do not fit, unknown flags, unknown commands.
        (CMD_READ, CMD_FLAG_NO_HOLE, 0, 512, inval),
        (CMD_WRITE, CMD_FLAG_DF, 0, 512, inval),
        (CMD_TRIM, CMD_FLAG_FAST_ZERO, 0, 512, inval),
        (CMD_WRITE, 0x8000, 0, 512, inval),
        (CMD_FLUSH, 0, 0, 512, inval),
        (CMD_FLUSH, 0, 512, 0, inval),
        (CMD_BLOCK_STATUS, 0, 0, 0, inval),
        (8, 0, 0, 0, inval),
        (0xffff, 0xffff, u64::MAX, u32::MAX, inval),
    ];
    for (command, flags, offset, length, error) in cases {
        let payload = if command == CMD_WRITE { length as usize } else { 0 };
        let event = judge(ALL, &export(), &request(command, flags, offset, length), payload);
        assert_eq!(
            error_of(&event),
            Some(error),
            "command {command} flags {flags} {offset}+{length}: {event:?}"
        );
    }
}

#[test]
fn what_was_not_agreed_is_refused() {
    let plain = Agreed::default();
    let df = judge(plain, &export(), &request(CMD_READ, CMD_FLAG_DF, 0, 512), 0);
    assert_eq!(error_of(&df), Some(NbdError::Inval));
    let status = judge(plain, &export(), &request(CMD_BLOCK_STATUS, 0, 0, 512), 0);
    assert_eq!(error_of(&status), Some(NbdError::Inval));
    let strict = Agreed { block_size: true, ..ALL };
    for (command, offset, length) in [(CMD_READ, 256, 4096), (CMD_WRITE, 0, 511), (CMD_TRIM, 0, 4097)] {
        let payload = if command == CMD_WRITE { length as usize } else { 0 };
        let head = request(command, 0, offset, length);
        assert_eq!(error_of(&judge(strict, &export(), &head, payload)), Some(NbdError::Inval));
        assert_eq!(error_of(&judge(ALL, &export(), &head, payload)), None, "served at any alignment");
    }
    let sector = judge(strict, &export(), &request(CMD_READ, 0, 512, 512), 0);
    assert_eq!(error_of(&sector), None, "512-byte requests are served on every volume");
    let read_only = Export { read_only: true, ..export() };
    for command in [CMD_WRITE, CMD_TRIM, CMD_WRITE_ZEROES] {
        let payload = if command == CMD_WRITE { 4096 } else { 0 };
        let event = judge(ALL, &read_only, &request(command, 0, 0, 4096), payload);
        assert_eq!(error_of(&event), Some(NbdError::Perm));
    }
}

#[test]
fn broken_streams_are_cut() {
    let mut bad = request(CMD_READ, 0, 0, 512);
    bad[0] = 0;
    assert!(matches!(judge(ALL, &export(), &bad, 0), Event::Violation(Violation::Magic(_))));
    let endless = request(CMD_WRITE, 0, 0, u32::MAX);
    assert_eq!(judge(ALL, &export(), &endless, 0), Event::Violation(Violation::Payload(u32::MAX)));
}

#[test]
fn requests_without_bytes_are_done_and_disc_ends() {
    for command in [CMD_READ, CMD_WRITE, CMD_TRIM, CMD_WRITE_ZEROES, CMD_CACHE] {
        let event = judge(ALL, &export(), &request(command, 0, SIZE, 0), 0);
        assert!(matches!(event, Event::Nothing(_)), "command {command}: {event:?}");
    }
    assert_eq!(judge(ALL, &export(), &request(CMD_DISC, 0xffff, 1, 1), 0), Event::Disconnect);
}

#[test]
fn nothing_is_taken_without_room() {
    let mut machine = Transmission::new(ALL);
    let write = [request(CMD_WRITE, 0, 0, 4000), vec![7; 4000]].concat();
    let (area, small) = (area(), Area::create(8192).expect("creates"));
    let kept = small.take(4097).expect("fits");
    for room in [room(&area, 0, 1 << 20), room(&area, 1, 4095), room(&small, 1, 1 << 20)] {
        assert_eq!(machine.advance(&write, &export(), room), (0, Event::Full));
        assert!(machine.payload().is_none());
    }
    drop(kept);
    for room in [room(&area, 1, 4096), room(&small, 1, 4096)] {
        let (used, event) = machine.advance(&write, &export(), room);
        assert!(used == write.len() && matches!(event, Event::Request(_)));
    }
}

#[test]
fn a_payload_may_be_read_directly() {
    let (mut machine, area) = (Transmission::new(ALL), area());
    let room = room(&area, 1, 1 << 20);
    let bytes = [request(CMD_WRITE, 0, 0, 5000), vec![9; 10]].concat();
    let (used, event) = machine.advance(&bytes, &export(), room);
    assert_eq!((used, event), (bytes.len(), Event::NeedMore));
    let (payload, have) = machine.payload().expect("a payload is awaited");
    assert_eq!((payload.length(), have, machine.coming()), (5000, 10, 8192));
    payload.write(10, &[9; 4990]);
    machine.filled(4990);
    let (used, event) = machine.advance(&[], &export(), room);
    let Event::Request(incoming) = event else { panic!("{event:?}") };
    assert_eq!((used, incoming.data.map(|data| data.to_vec())), (0, Some(vec![9; 5000])));
}

fn stream() -> Vec<u8> {
    [
        request(CMD_READ, 0, 0, 4096),
        request(CMD_WRITE, 0, 0, 1000),
        vec![1; 1000],
        request(CMD_WRITE, 0, SIZE, 700),
        vec![2; 700],
        request(CMD_FLUSH, 0, 0, 0),
        request(99, 0, 0, 0),
        request(CMD_DISC, 0, 0, 0),
    ]
    .concat()
}

fn events(bytes: &[u8], cuts: &mut dyn Iterator<Item = usize>) -> Vec<Event> {
    let (mut machine, mut partial, mut got, mut at) = (Transmission::new(ALL), Vec::new(), Vec::new(), 0);
    let area = area();
    while at < bytes.len() {
        let end = bytes.len().min(at + cuts.next().expect("endless"));
        partial.extend_from_slice(&bytes[at..end]);
        at = end;
        loop {
            let (used, event) = machine.advance(&partial, &export(), room(&area, 16, 64 << 20));
            partial.drain(..used);
            match event {
                Event::NeedMore if used == 0 => break,
                Event::NeedMore => {}
                event => got.push(event),
            }
        }
    }
    got
}

/// Events without what lies by chance in buffers that nothing was put into.
fn told(events: &[Event]) -> Vec<String> {
    let tell = |event: &Event| match event {
        Event::Request(Incoming { ticket, fua, data }) => {
            let data = data.as_ref().filter(|_| ticket.op == BlockOp::Write).map(Buffer::to_vec);
            format!("{ticket:?} {fua} {data:?}")
        }
        other => format!("{other:?}"),
    };
    events.iter().map(tell).collect()
}

proptest! {
    #[test]
    fn how_bytes_are_cut_does_not_matter(cuts in proptest::collection::vec(1usize..900, 1..20)) {
        let bytes = stream();
        let whole = events(&bytes, &mut std::iter::repeat(bytes.len()));
        prop_assert_eq!(whole.len(), 6);
        prop_assert_eq!(told(&events(&bytes, &mut std::iter::repeat(1))), told(&whole));
        prop_assert_eq!(told(&events(&bytes, &mut cuts.iter().copied().cycle())), told(&whole));
    }

    #[test]
    fn whatever_is_let_through_lies_inside_the_volume(
        command in 0u16..10, flags in 0u16..64, offset in any::<u64>(), near in any::<bool>(),
        length in any::<u32>(), structured in any::<bool>(), block_size in any::<bool>(),
    ) {
        let agreed = Agreed { structured, allocation: structured, block_size };
        let offset = if near { offset % (SIZE + 10) } else { offset };
        let head = request(command, flags, offset, length);
        let (used, event) = Transmission::new(agreed).advance(&head, &export(), room(&area(), 16, 64 << 20));
        prop_assert!(used == REQUEST_BYTES || event == Event::Full);
        if let Event::Request(Incoming { ticket, .. }) = event {
            prop_assert!(ticket.range.end() <= SIZE);
            prop_assert!(!ticket.op.carries_data() || ticket.range.length() <= REQUEST_BYTES_MAX.into());
            prop_assert!(!block_size || ticket.range.offset() % 512 == 0);
        }
    }
}
