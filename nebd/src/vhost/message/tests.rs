use super::*;
use proptest::prelude::*;
use rustix::event::EventfdFlags;

fn fd() -> OwnedFd {
    rustix::event::eventfd(0, EventfdFlags::CLOEXEC).expect("eventfd")
}

fn fds(count: usize) -> Vec<OwnedFd> {
    (0..count).map(|_| fd()).collect()
}

/// A message of 32-bit words, as it lies on the socket.
fn message(request: u32, flags: u32, words: &[u32]) -> Vec<u8> {
    let head = [request, flags, 4 * words.len() as u32];
    head.iter().chain(words).flat_map(|word| word.to_ne_bytes()).collect()
}

fn take(request: u32, words: &[u32], descriptors: usize) -> Result<Request, MessageError> {
    decode(&message(request, 1, words), fds(descriptors)).map(|(_, request)| request)
}

#[test]
#[cfg(target_endian = "little")]
fn golden_bytes_of_requests() {
    let bytes = [9, 0, 0, 0, 9, 0, 0, 0, 40, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0];
    let mut bytes = bytes.to_vec();
    for address in [0x1000_u64, 0x2000, 0x3000, 0x7_0000_0000] {
        bytes.extend(address.to_le_bytes());
    }
    let (header, request) = decode(&bytes, Vec::new()).expect("SET_VRING_ADDR");
    assert_eq!(header, Header { request: 9, need_reply: true, payload: 40 });
    let Request::SetVringAddr { queue: 2, addresses } = request else { panic!("{request:?}") };
    let expected = QueueAddresses {
        descriptors: 0x1000,
        used: 0x2000,
        available: 0x3000,
        used_log: Some(0x7_0000_0000),
    };
    assert_eq!(addresses, expected);

    let mut bytes = vec![5, 0, 0, 0, 1, 0, 0, 0, 40, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];
    for word in [0x10_0000_u64, 0x8000, 0x7f00_0000_0000, 0x2000] {
        bytes.extend(word.to_le_bytes());
    }
    let (_, request) = decode(&bytes, fds(1)).expect("SET_MEM_TABLE");
    let Request::SetMemTable(table) = request else { panic!("{request:?}") };
    let place = RegionPlace {
        guest_address: 0x10_0000,
        length: 0x8000,
        user_address: 0x7f00_0000_0000,
        offset: 0x2000,
    };
    assert_eq!(table.len(), 1);
    assert_eq!(table[0].0, place);
}

#[test]
#[cfg(target_endian = "little")]
fn golden_bytes_of_replies() {
    let bytes = |reply: Reply| reply.encode().0;
    assert_eq!(
        bytes(Reply::acknowledge(5, false)),
        [5, 0, 0, 0, 5, 0, 0, 0, 8, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]
    );
    assert_eq!(
        bytes(Reply { request: 1, body: Body::Number(1 << 32) }),
        [1, 0, 0, 0, 5, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]
    );
    assert_eq!(
        bytes(Reply::base(3, 0x1234)),
        [11, 0, 0, 0, 5, 0, 0, 0, 8, 0, 0, 0, 3, 0, 0, 0, 0x34, 0x12, 0, 0]
    );
    assert_eq!(
        bytes(Reply::config(4, 1, vec![7, 8])),
        [24, 0, 0, 0, 5, 0, 0, 0, 14, 0, 0, 0, 4, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 7, 8]
    );
    assert_eq!(bytes(Reply::config(4, 1, Vec::new())), [24, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(
        bytes(Reply::log(0x1000, 0)),
        [6, 0, 0, 0, 5, 0, 0, 0, 16, 0, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    );
    let place = InflightPlace { bytes: 0x880, offset: 0, queues: 1, queue_size: 128 };
    let (inflight, sent) = Reply::inflight(place, fd()).encode();
    assert!(sent.is_some());
    #[rustfmt::skip]
    assert_eq!(inflight, [
        31, 0, 0, 0, 5, 0, 0, 0, 24, 0, 0, 0,
        0x80, 8, 0, 0, 0, 0, 0, 0,  0, 0, 0, 0, 0, 0, 0, 0,  1, 0, 128, 0,  0, 0, 0, 0,
    ]);
    assert_eq!(config_changed(), [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn headers_that_nothing_can_follow() {
    let parse = |request, flags, payload: u32| {
        let bytes: Vec<u8> =
            [request, flags, payload].iter().flat_map(|word: &u32| word.to_ne_bytes()).collect();
        Header::parse(bytes.first_chunk().expect("12 bytes"))
    };
    assert_eq!(parse(1, 0, 0), Err(MessageError::Version(0)));
    assert_eq!(parse(1, 2, 0), Err(MessageError::Version(2)));
    assert_eq!(parse(1, 3, 0), Err(MessageError::Version(3)));
    assert!(matches!(parse(1, 5, 0), Err(MessageError::Flags { .. })), "a reply");
    assert!(matches!(parse(1, 0x11, 0), Err(MessageError::Flags { .. })));
    assert!(matches!(parse(5, 1, 4097), Err(MessageError::TooLong { .. })));
    assert!(matches!(parse(5, 1, u32::MAX), Err(MessageError::TooLong { .. })));
    assert_eq!(parse(99, 9, 4096), Ok(Header { request: 99, need_reply: true, payload: 4096 }));
}

/// Every request: words of its payload, and how many descriptors it brings.
const TABLE: [(u32, usize, usize); 27] = [
    (GET_FEATURES, 0, 0),
    (SET_FEATURES, 2, 0),
    (SET_OWNER, 0, 0),
    (RESET_OWNER, 0, 0),
    (SET_MEM_TABLE, 10, 1),
    (SET_LOG_BASE, 4, 1),
    (SET_LOG_FD, 0, 1),
    (SET_VRING_NUM, 2, 0),
    (SET_VRING_ADDR, 10, 0),
    (SET_VRING_BASE, 2, 0),
    (GET_VRING_BASE, 2, 0),
    (SET_VRING_KICK, 2, 1),
    (SET_VRING_CALL, 2, 1),
    (SET_VRING_ERR, 2, 1),
    (GET_PROTOCOL_FEATURES, 0, 0),
    (SET_PROTOCOL_FEATURES, 2, 0),
    (GET_QUEUE_NUM, 0, 0),
    (SET_VRING_ENABLE, 2, 0),
    (SET_BACKEND_REQ_FD, 0, 1),
    (GET_CONFIG, 18, 0),
    (SET_CONFIG, 18, 0),
    (GET_INFLIGHT_FD, 6, 0),
    (SET_INFLIGHT_FD, 6, 1),
    (RESET_DEVICE, 0, 0),
    (GET_MAX_MEM_SLOTS, 0, 0),
    (ADD_MEM_REG, 10, 1),
    (REM_MEM_REG, 10, 0),
];

fn payload(request: u32, words: usize) -> Vec<u32> {
    let mut payload = vec![0; words];
    match request {
        SET_MEM_TABLE => payload[0] = 1,
        GET_CONFIG | SET_CONFIG => payload[1] = 60,
        _ => {}
    }
    payload
}

#[test]
fn each_request_has_its_size_and_its_descriptors() {
    for (request, words, descriptors) in TABLE {
        let right = payload(request, words);
        take(request, &right, descriptors).expect("as the specification says");
        let longer = payload(request, words + 1);
        assert!(
            matches!(take(request, &longer, descriptors), Err(MessageError::Size { .. })),
            "{request} + 4"
        );
        let padded = matches!(request, GET_INFLIGHT_FD | SET_INFLIGHT_FD);
        if words > 0 && !padded {
            let shorter = &right[..words - 1];
            assert!(
                matches!(take(request, shorter, descriptors), Err(MessageError::Size { .. })),
                "{request} - 4"
            );
        }
        let tolerated = if request == REM_MEM_REG { 1 } else { descriptors };
        for count in [tolerated + 1, DESCRIPTORS_MAX, DESCRIPTORS_MAX + 1] {
            let refused = take(request, &right, count);
            assert!(matches!(refused, Err(MessageError::Descriptors { .. })), "{request} with {count}");
        }
        if descriptors > 0 {
            assert!(
                matches!(take(request, &right, 0), Err(MessageError::Descriptors { .. })),
                "{request} without"
            );
        }
    }
    assert!(take(REM_MEM_REG, &[0; 10], 1).is_ok(), "as older front-ends send it");
}

#[test]
fn requests_that_were_never_offered_are_unknown() {
    let known: Vec<u32> = TABLE.iter().map(|(request, ..)| *request).collect();
    for request in (0..64).chain([u32::MAX]).filter(|request| !known.contains(request)) {
        assert_eq!(take(request, &[], 0).expect_err("unknown"), MessageError::Unknown(request));
    }
}

#[test]
fn impossible_values_are_refused() {
    let refused = |request, words: &[u32], descriptors| {
        let refused = take(request, words, descriptors);
        assert!(matches!(refused, Err(MessageError::Field { .. })), "{request} {words:?}: {refused:?}");
    };
    refused(SET_VRING_ENABLE, &[0, 2], 0);
    refused(SET_VRING_KICK, &[1 << 9, 0], 1);
    refused(SET_VRING_CALL, &[0, 1], 1);
    refused(SET_VRING_ADDR, &[0, 2, 0, 0, 0, 0, 0, 0, 0, 0], 0);
    refused(SET_MEM_TABLE, &[0, 0], 0);
    refused(SET_MEM_TABLE, &[33, 0], 33);
    refused(SET_MEM_TABLE, &[u32::MAX, 0], 1);
    let wrong = take(GET_CONFIG, &[0, 8, 0, 0], 0);
    assert!(matches!(wrong, Err(MessageError::Size { .. })), "{wrong:?}");
    let vast = take(GET_CONFIG, &[u32::MAX, u32::MAX, 0], 0);
    assert!(matches!(vast, Err(MessageError::Size { .. })), "{vast:?}");
    let none = take(SET_VRING_CALL, &[0x103, 0], 0).expect("no descriptor, and it says so");
    assert!(matches!(none, Request::SetVringCall { queue: 3, fd: None }));
    assert!(matches!(take(SET_VRING_CALL, &[0x103, 0], 1), Err(MessageError::Descriptors { .. })));
}

#[test]
fn descriptors_of_a_refused_message_are_closed() {
    let (reader, writer) = rustix::pipe::pipe().expect("pipe");
    assert!(decode(&message(SET_FEATURES, 1, &[0, 0]), vec![writer]).is_err());
    assert_eq!(rustix::io::read(&reader, &mut [0; 1]).expect("end of file"), 0);
}

proptest! {
    #[test]
    fn any_bytes_are_survived(
        request in 0..45u32,
        flags in prop_oneof![Just(1u32), Just(9u32), any::<u32>()],
        payload in prop::collection::vec(any::<u8>(), 0..200),
        descriptors in 0..4usize,
        honest_size in any::<bool>(),
        size in any::<u32>(),
    ) {
        let size = if honest_size { payload.len() as u32 } else { size };
        let mut bytes: Vec<u8> = [request, flags, size].iter().flat_map(|word| word.to_ne_bytes()).collect();
        bytes.extend(payload);
        let _ = decode(&bytes, fds(descriptors));
    }
}
