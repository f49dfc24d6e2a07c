//! Tests of the messages: each as it has always been written, and whatever else comes refused.

use super::*;
use proptest::prelude::*;

fn session(number: u32) -> SessionState {
    SessionState {
        number,
        name: "disk".parse().expect("a name"),
        epoch: Epoch::new(7),
        identity: Identity::new(0, 11).expect("an identity"),
        read_only: false,
        file: true,
    }
}

fn link() -> LinkState {
    LinkState {
        session: 1,
        link: 2,
        version: 4,
        instance: spline_link::InstanceId(5),
        read_only: true,
        position: spline_link::ring::Position { taken: 6, answered: 7 },
        stopped_ns: 8,
        partial: vec![9],
    }
}

fn offer() -> Offer {
    Offer {
        version: 1,
        product: "0.1.0".into(),
        id: "g".into(),
        link_socket: "/g.sock".into(),
        admin_listen: "127.0.0.1:1".into(),
        metrics_listen: String::new(),
    }
}

/// Every kind, and its packet behind the magic.
fn golden() -> Vec<(Message, &'static [u8])> {
    let leaders = vec![(CopysetId::new(3), ChunkserverId::new(9))];
    let sockets = Sockets { is_systemds: true, admin: false, metrics: true };
    vec![
        (
            Message::Hello { versions: VersionRange { min: 1, max: 2 }, product: "0.1.0".into() },
            b"\x01\0\0\0\x0b\0\0\0\x01\0\x02\0\x05\x000.1.0",
        ),
        (Message::Refused { reason: "why".into() }, b"\x02\0\0\0\x05\0\0\0\x03\0why"),
        (
            Message::Offer(offer()),
            b"\x03\0\x01\0\x24\0\0\0\x01\0\x05\x000.1.0\x01\0g\x07\0/g.sock\x0b\x00127.0.0.1:1\0\0",
        ),
        (Message::Proven, b"\x04\0\x01\0\0\0\0\0"),
        (Message::Sockets(sockets), b"\x05\0\x01\0\x04\0\0\0\x05\0\0\0"),
        (Message::Leaders(leaders), b"\x06\0\x01\0\x0c\0\0\0\x01\0\0\0\x03\0\0\0\x09\0\0\0"),
        (
            Message::Session(session(2)),
            b"\x07\0\x01\0\x26\0\0\0\x02\0\0\0\x02\0\0\0\x07\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x0b\0\0\0\0\0\0\0\x04\0disk",
        ),
        (Message::Prepare { sessions: 3 }, b"\x08\0\x01\0\x04\0\0\0\x03\0\0\0"),
        (Message::Prepared { sessions: 2 }, b"\x09\0\x01\0\x04\0\0\0\x02\0\0\0"),
        (Message::Commit, b"\x0a\0\x01\0\0\0\0\0"),
        (
            Message::Yours { session: 1, stopped_ns: 5 },
            b"\x0b\0\x01\0\x0c\0\0\0\x01\0\0\0\x05\0\0\0\0\0\0\0",
        ),
        (Message::Kept { session: 1 }, b"\x0c\0\x01\0\x04\0\0\0\x01\0\0\0"),
        (Message::Finish, b"\x0d\0\x01\0\0\0\0\0"),
        (
            Message::Taken { sessions: 2, links: 3, pause_ns: 4 },
            b"\x0e\0\x01\0\x10\0\0\0\x02\0\0\0\x03\0\0\0\x04\0\0\0\0\0\0\0",
        ),
        (Message::Main, b"\x0f\0\x01\0\0\0\0\0"),
        (
            Message::Link(link()),
            b"\x10\0\x01\0\x31\0\0\0\x01\0\0\0\x02\0\0\0\x04\0\x01\0\0\0\x05\0\0\0\0\0\0\0\x06\0\0\0\0\0\0\0\
              \x07\0\0\0\0\0\0\0\x08\0\0\0\0\0\0\0\x01\0\x09",
        ),
        (
            Message::Regions { link: 2, regions: vec![RegionState { number: 3, offset: 4, length: 5 }] },
            b"\x11\0\x01\0\x1c\0\0\0\x02\0\0\0\x01\0\0\0\x03\0\0\0\x04\0\0\0\0\0\0\0\x05\0\0\0\0\0\0\0",
        ),
    ]
}

#[test]
fn messages_are_written_as_they_always_were() {
    for (message, bytes) in golden() {
        let mut packet = b"SPLU".to_vec();
        packet.extend(bytes);
        assert_eq!(message.encode(), packet, "{message:?}");
        assert_eq!(Message::decode(&packet), Ok(message));
    }
}

#[test]
fn an_unknown_version_is_refused_by_its_number() {
    let mut packet = Message::Proven.encode();
    packet[6] = 9;
    let refused = Message::decode(&packet).expect_err("unknown").to_string();
    assert!(refused.contains("state version is unknown") && refused.contains("theirs_max=9"), "{refused}");
    // Whatever else is in it: a kind that this build does not know either.
    packet[4] = 99;
    assert!(matches!(Message::decode(&packet), Err(MessageError::Version(_))));
    packet[6] = 1;
    assert_eq!(Message::decode(&packet), Err(MessageError::Kind { kind: 99 }));
}

#[test]
fn what_is_not_exactly_a_message_is_refused() {
    for (message, _) in golden() {
        let packet = message.encode();
        for length in 0..packet.len() {
            assert!(Message::decode(&packet[..length]).is_err(), "{message:?} length={length}");
        }
        let mut longer = packet.clone();
        longer.push(0);
        assert!(Message::decode(&longer).is_err(), "{message:?}");
    }
    let mut many = Message::Leaders(Vec::new()).encode();
    many[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
    assert_eq!(Message::decode(&many), Err(MessageError::Field { kind: 6, field: "leaders" }));
    let mut flagged = Message::Sockets(Sockets::default()).encode();
    flagged[12] = 8;
    assert_eq!(Message::decode(&flagged), Err(MessageError::Field { kind: 5, field: "flags" }));
}

#[test]
fn the_largest_messages_fit() {
    let leaders = vec![(CopysetId::new(1), ChunkserverId::new(1)); LEADERS_MAX];
    assert!(Message::Leaders(leaders).encode().len() <= PACKET_BYTES_MAX);
    let reason = "ä".repeat(REASON_BYTES_MAX);
    let packet = Message::Refused { reason }.encode();
    assert_eq!(packet.len(), HEADER_BYTES + 2 + REASON_BYTES_MAX, "cut, and between two characters");
    Message::decode(&packet).expect("is read");
}

proptest! {
    #[test]
    fn no_packet_panics(kind in 0u16..20, fields in prop::collection::vec(any::<u8>(), 0..80)) {
        let mut packet = b"SPLU".to_vec();
        packet.extend(kind.to_le_bytes());
        packet.extend(1u16.to_le_bytes());
        packet.extend((fields.len() as u32).to_le_bytes());
        packet.extend(&fields);
        if let Ok(message) = Message::decode(&packet) {
            prop_assert_eq!(Message::decode(&message.encode()), Ok(message));
        }
        let _ = Message::decode(&fields);
    }
}
