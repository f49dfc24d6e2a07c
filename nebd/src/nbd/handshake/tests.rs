//! The handshake driven byte by byte and with everything that a hostile client may send.

use super::*;
use proptest::prelude::*;
use spline_link::VolumeTraits;
use spline_types::{BlockSize, Geometry};

fn export() -> Export {
    Export {
        name: "disk0".into(),
        description: "a disk".into(),
        geometry: Geometry { size: 1 << 30, block_size: BlockSize::B4096 },
        traits: VolumeTraits::default(),
        read_only: false,
    }
}

fn option(option: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = OPTION_MAGIC.to_be_bytes().to_vec();
    bytes.extend_from_slice(&option.to_be_bytes());
    bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
    bytes.extend_from_slice(data);
    bytes
}

fn info(name: &[u8], wanted: &[u16]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend_from_slice(name);
    data.extend_from_slice(&(wanted.len() as u16).to_be_bytes());
    wanted.iter().for_each(|kind| data.extend_from_slice(&kind.to_be_bytes()));
    data
}

fn contexts(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = prefixed(name);
    data.extend_from_slice(&(queries.len() as u32).to_be_bytes());
    queries.iter().for_each(|query| data.extend_from_slice(&prefixed(query)));
    data
}

/// A machine past the client's flags, and its queue without the greeting.
fn started(flags: u32) -> (Handshake, SendQueue) {
    let mut out = SendQueue::default();
    let mut machine = Handshake::start(&mut out);
    assert_eq!(out.take(), *b"NBDMAGICIHAVEOPT\x00\x03");
    assert_eq!(machine.advance(&flags.to_be_bytes(), &export(), &mut out), (4, Step::NeedMore));
    (machine, out)
}

/// Feeds `bytes` and answers the step and the replies as (option, type, data).
fn feed(machine: &mut Handshake, out: &mut SendQueue, bytes: &[u8]) -> (Step, Vec<(u32, u32, Vec<u8>)>) {
    let (_, step) = machine.advance(bytes, &export(), out);
    let sent = out.take();
    (step, replies(&sent))
}

fn replies(mut sent: &[u8]) -> Vec<(u32, u32, Vec<u8>)> {
    let mut replies = Vec::new();
    while !sent.is_empty() {
        let mut fields = Fields(sent);
        assert_eq!(fields.u64(), Some(OPTION_REPLY_MAGIC));
        let (option, kind) = (fields.u32().expect("option"), fields.u32().expect("type"));
        let length = fields.u32().expect("length") as usize;
        replies.push((option, kind, fields.bytes(length).expect("data").to_vec()));
        sent = fields.0;
    }
    replies
}

fn kinds(replies: &[(u32, u32, Vec<u8>)]) -> Vec<u32> {
    replies.iter().map(|(_, kind, _)| *kind).collect()
}

#[test]
fn go_tells_what_was_asked_for() {
    let (mut machine, mut out) = started(3);
    let wanted = [INFO_NAME, INFO_DESCRIPTION, INFO_BLOCK_SIZE, 999];
    let (step, replies) = feed(&mut machine, &mut out, &option(OPT_GO, &info(b"", &wanted)));
    assert_eq!(step, Step::Enter(Agreed { structured: false, allocation: false, block_size: true }));
    assert_eq!(kinds(&replies), [REP_INFO, REP_INFO, REP_INFO, REP_INFO, REP_ACK]);
    assert_eq!(replies[0].2, b"\0\0\0\0\0\0\x40\0\0\0\x0d\x6d", "export: size and flags");
    assert_eq!(replies[1].2, b"\0\x01disk0");
    assert_eq!(replies[2].2, b"\0\x02a disk");
    assert_eq!(replies[3].2, b"\0\x03\0\0\x02\0\0\0\x10\0\x02\0\0\0", "block sizes");
}

#[test]
fn info_stays_in_the_handshake_and_unknown_names_are_told() {
    let (mut machine, mut out) = started(1);
    let (step, replies) = feed(&mut machine, &mut out, &option(OPT_INFO, &info(b"disk0", &[])));
    assert_eq!((step, kinds(&replies)), (Step::NeedMore, vec![REP_INFO, REP_ACK]));
    let (step, replies) = feed(&mut machine, &mut out, &option(OPT_GO, &info(b"other", &[])));
    assert_eq!((step, kinds(&replies)), (Step::NeedMore, vec![REP_ERR_UNKNOWN]));
    let (step, replies) = feed(&mut machine, &mut out, &option(OPT_LIST, b""));
    assert_eq!((step, kinds(&replies)), (Step::NeedMore, vec![REP_SERVER, REP_ACK]));
    assert_eq!(replies[0].2, b"\0\0\0\x05disk0a disk");
    let (step, replies) = feed(&mut machine, &mut out, &option(OPT_ABORT, b"bye"));
    assert_eq!((step, kinds(&replies)), (Step::Abort, vec![REP_ACK]));
}

#[test]
fn export_name_is_answered_in_the_old_way() {
    for (flags, length) in [(1u32, 134), (3, 10), (0, 134)] {
        let (mut machine, mut out) = started(flags);
        let (_, step) = machine.advance(&option(OPT_EXPORT_NAME, b"disk0"), &export(), &mut out);
        assert_eq!(step, Step::Enter(Agreed::default()));
        assert_eq!(out.take().len(), length);
    }
    for name in [&b"other"[..], b"dis\0k", b"\xff", &[b'a'; 4096], &[b'a'; 4097], &[b'a'; 9000]] {
        let (mut machine, mut out) = started(3);
        let (_, step) = machine.advance(&option(OPT_EXPORT_NAME, name), &export(), &mut out);
        assert_eq!(step, Step::Violation(Violation::UnknownExport));
    }
}

#[test]
fn read_only_offers_no_changes() {
    let (mut machine, mut out) = started(3);
    let read_only = Export { read_only: true, ..export() };
    let (_, step) = machine.advance(&option(OPT_EXPORT_NAME, b""), &read_only, &mut out);
    assert!(matches!(step, Step::Enter(_)));
    let flags = u16::from_be_bytes(out.take()[8..10].try_into().expect("two bytes"));
    assert_eq!(flags & (FLAG_SEND_TRIM | FLAG_SEND_WRITE_ZEROES | FLAG_SEND_FAST_ZERO), 0);
    assert_ne!(flags & FLAG_READ_ONLY, 0);
}

#[test]
fn contexts_need_structured_replies_and_the_same_export() {
    let (mut machine, mut out) = started(3);
    let set = option(OPT_SET_META_CONTEXT, &contexts("disk0", &["x:y", "base:allocation"]));
    assert_eq!(kinds(&feed(&mut machine, &mut out, &set).1), [REP_ERR_INVALID]);
    assert_eq!(kinds(&feed(&mut machine, &mut out, &option(OPT_STRUCTURED_REPLY, b"")).1), [REP_ACK]);
    let (_, replies) = feed(&mut machine, &mut out, &set);
    assert_eq!(kinds(&replies), [REP_META_CONTEXT, REP_ACK]);
    assert_eq!(replies[0].2, b"\0\0\0\x01base:allocation");
    for (queries, found) in [(&[][..], true), (&["base:"], true), (&["qemu:"], false)] {
        let list = option(OPT_LIST_META_CONTEXT, &contexts("", queries));
        let expected = if found { vec![REP_META_CONTEXT, REP_ACK] } else { vec![REP_ACK] };
        assert_eq!(kinds(&feed(&mut machine, &mut out, &list).1), expected);
    }
    let (step, _) = feed(&mut machine, &mut out, &option(OPT_GO, &info(b"disk0", &[])));
    assert_eq!(step, Step::Enter(Agreed { structured: true, allocation: true, block_size: false }));
}

#[test]
fn the_last_selection_of_contexts_counts() {
    // Another export's, an empty one, and those that fail: they replace the one before, too.
    let (elsewhere, empty) = (contexts("", &["base:allocation"]), contexts("disk0", &[]));
    for last in [elsewhere, empty, b"malformed".to_vec(), vec![0; OPTION_DATA_MAX + 1]] {
        let (mut machine, mut out) = started(3);
        feed(&mut machine, &mut out, &option(OPT_STRUCTURED_REPLY, b""));
        let first = contexts("disk0", &["base:allocation"]);
        feed(&mut machine, &mut out, &option(OPT_SET_META_CONTEXT, &first));
        feed(&mut machine, &mut out, &option(OPT_SET_META_CONTEXT, &last));
        let (step, _) = feed(&mut machine, &mut out, &option(OPT_GO, &info(b"disk0", &[])));
        assert_eq!(step, Step::Enter(Agreed { structured: true, allocation: false, block_size: false }));
    }
}

#[test]
fn malformed_options_are_refused_and_the_client_may_go_on() {
    let (mut machine, mut out) = started(3);
    let cases: [(u32, Vec<u8>, u32); 13] = [
        (OPT_LIST, b"x".to_vec(), REP_ERR_INVALID),
        (OPT_STRUCTURED_REPLY, b"x".to_vec(), REP_ERR_INVALID),
        (5, Vec::new(), REP_ERR_UNSUP),
        (11, Vec::new(), REP_ERR_UNSUP),
        (0, Vec::new(), REP_ERR_UNSUP),
        (u32::MAX, vec![0; 4096], REP_ERR_UNSUP),
        (OPT_GO, Vec::new(), REP_ERR_INVALID),
        (OPT_GO, info(b"disk0", &[])[..9].to_vec(), REP_ERR_INVALID),
        (OPT_GO, info(b"di\0k0", &[]), REP_ERR_INVALID),
        (OPT_GO, info(b"\xc3\x28", &[]), REP_ERR_INVALID),
        (OPT_INFO, info(b"../disk0", &[]), REP_ERR_UNKNOWN),
        (OPT_INFO, u32::MAX.to_be_bytes().to_vec(), REP_ERR_INVALID),
        (OPT_GO, vec![0; OPTION_DATA_MAX + 1], REP_ERR_TOO_BIG),
    ];
    for (number, data, error) in cases {
        let (step, replies) = feed(&mut machine, &mut out, &option(number, &data));
        assert_eq!((step, replies.len()), (Step::NeedMore, 1), "option {number}");
        assert_eq!((replies[0].0, replies[0].1), (number, error));
    }
    for length in [0, 255, 256, 4096, 4097] {
        let (step, replies) =
            feed(&mut machine, &mut out, &option(OPT_INFO, &info(&vec![b'a'; length], &[])));
        let expected = match length {
            0 => vec![REP_INFO, REP_ACK],
            4097 => vec![REP_ERR_INVALID],
            _ => vec![REP_ERR_UNKNOWN],
        };
        assert_eq!((step, kinds(&replies)), (Step::NeedMore, expected), "name of {length} bytes");
    }
    let extra = [info(b"disk0", &[]), vec![0]].concat();
    assert_eq!(kinds(&feed(&mut machine, &mut out, &option(OPT_GO, &extra)).1), [REP_ERR_INVALID]);
}

#[test]
fn what_can_not_be_answered_is_cut() {
    let mut out = SendQueue::default();
    let mut machine = Handshake::start(&mut out);
    let (_, step) = machine.advance(&0x10u32.to_be_bytes(), &export(), &mut out);
    assert_eq!(step, Step::Violation(Violation::ClientFlags(0x10)));

    let mut wrong_magic = option(OPT_LIST, b"");
    wrong_magic[0] = 0;
    let huge = [&OPTION_MAGIC.to_be_bytes()[..], &[0, 0, 0, 7], &u32::MAX.to_be_bytes()].concat();
    for bytes in [wrong_magic, huge] {
        let (mut machine, mut out) = started(1);
        assert!(matches!(feed(&mut machine, &mut out, &bytes).0, Step::Violation(_)));
    }
    let (mut machine, mut out) = started(2);
    let (step, _) = feed(&mut machine, &mut out, &option(OPT_LIST, b""));
    assert_eq!(step, Step::Violation(Violation::NotFixed(OPT_LIST)));

    let (mut machine, mut out) = started(1);
    let endless = option(OPT_LIST, b"").repeat(OPTIONS_MAX as usize + 1);
    assert_eq!(machine.advance(&endless, &export(), &mut out).1, Step::Violation(Violation::TooMany));
}

fn conversation() -> Vec<u8> {
    let mut bytes = 3u32.to_be_bytes().to_vec();
    for (number, data) in [
        (OPT_STRUCTURED_REPLY, Vec::new()),
        (77, vec![9; 10]),
        (OPT_LIST, Vec::new()),
        (OPT_INFO, vec![0; OPTION_DATA_MAX + 100]),
        (OPT_SET_META_CONTEXT, contexts("disk0", &["base:allocation"])),
        (OPT_GO, info(b"disk0", &[INFO_BLOCK_SIZE])),
    ] {
        bytes.extend_from_slice(&option(number, &data));
    }
    bytes
}

fn converse(bytes: &[u8], cuts: &mut dyn Iterator<Item = usize>) -> (Vec<u8>, Step, usize) {
    let (mut out, mut partial, mut at) = (SendQueue::default(), Vec::new(), 0);
    let mut machine = Handshake::start(&mut out);
    loop {
        let end = bytes.len().min(at + cuts.next().expect("endless"));
        partial.extend_from_slice(&bytes[at..end]);
        at = end;
        let (used, step) = machine.advance(&partial, &export(), &mut out);
        partial.drain(..used);
        if step != Step::NeedMore || at == bytes.len() {
            return (out.take(), step, partial.len());
        }
    }
}

proptest! {
    #[test]
    fn how_bytes_are_cut_does_not_matter(cuts in proptest::collection::vec(1usize..2000, 1..20)) {
        let bytes = conversation();
        let whole = converse(&bytes, &mut std::iter::repeat(usize::MAX >> 1));
        prop_assert_eq!(&whole.1, &Step::Enter(Agreed { structured: true, allocation: true, block_size: true }));
        prop_assert_eq!(&converse(&bytes, &mut std::iter::repeat(1)), &whole);
        prop_assert_eq!(&converse(&bytes, &mut cuts.iter().copied().cycle()), &whole);
    }

    #[test]
    fn no_bytes_crash_it(
        noise in proptest::collection::vec(any::<u8>(), 0..600),
        number in 0u32..13,
        data in proptest::collection::vec(any::<u8>(), 0..80),
    ) {
        let (mut machine, mut out) = started(1);
        machine.advance(&noise, &export(), &mut out);
        let (mut machine, mut out) = started(1);
        machine.advance(&[option(OPT_STRUCTURED_REPLY, b""), option(number, &data), noise].concat(), &export(), &mut out);
    }
}
