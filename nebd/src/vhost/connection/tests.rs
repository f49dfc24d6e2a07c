use super::*;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

const ACK: usize = 20;

fn pair() -> (OwnedFd, Connection) {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (theirs, ours) = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).expect("sockets");
    (theirs, Connection::new(ours))
}

fn message(request: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes: Vec<u8> =
        [request, 1, payload.len() as u32].iter().flat_map(|word| word.to_ne_bytes()).collect();
    bytes.extend(payload);
    bytes
}

/// Sends bytes with descriptors, each the same pipe's writing end.
fn send_with(socket: &OwnedFd, bytes: &[u8], fd: &OwnedFd, count: usize) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let fds = vec![fd.as_fd(); count];
    assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
    let sent = sendmsg(socket, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL).expect("sends");
    assert_eq!(sent, bytes.len());
}

fn write(socket: &OwnedFd, bytes: &[u8]) {
    assert_eq!(rustix::io::write(socket, bytes).expect("writes"), bytes.len());
}

/// Whether every writing end of the pipe is closed.
fn is_closed(reader: &OwnedFd) -> bool {
    rustix::io::read(reader, &mut [0; 1]) == Ok(0)
}

#[test]
fn messages_come_byte_by_byte_or_many_at_once() {
    let (theirs, mut ours) = pair();
    let bytes = [message(1, &[]), message(2, &[7; 8])].concat();
    let mut whole = Vec::new();
    for byte in &bytes {
        write(&theirs, &[*byte]);
        whole.extend(ours.receive().expect("still open"));
    }
    write(&theirs, &[&bytes[..], &bytes].concat());
    while let Some(received) = ours.receive().expect("still open") {
        whole.push(received);
    }
    let seen: Vec<(u32, Vec<u8>)> = whole.into_iter().map(|m| (m.header.request, m.payload)).collect();
    let once = [(1, Vec::new()), (2, vec![7; 8])];
    assert_eq!(seen, [once.clone(), once.clone(), once].concat());
}

#[test]
fn descriptors_come_with_their_message() {
    let (theirs, mut ours) = pair();
    let (_reader, writer) = rustix::pipe::pipe().expect("pipe");
    write(&theirs, &message(1, &[]));
    send_with(&theirs, &message(37, &[0; 40]), &writer, 2);
    write(&theirs, &message(1, &[]));
    let counts: Vec<usize> = std::iter::from_fn(|| ours.receive().expect("still open"))
        .map(|received| received.fds.len())
        .collect();
    assert_eq!(counts, [0, 2, 0]);
}

#[test]
fn more_descriptors_than_a_message_has_close_the_connection() {
    let (theirs, mut ours) = pair();
    let (reader, writer) = rustix::pipe::pipe().expect("pipe");
    send_with(&theirs, &message(5, &[0; 8]), &writer, DESCRIPTORS_MAX);
    assert_eq!(ours.receive().expect("as many as allowed").expect("whole").fds.len(), DESCRIPTORS_MAX);
    send_with(&theirs, &message(5, &[0; 8]), &writer, DESCRIPTORS_MAX + 1);
    assert!(matches!(ours.receive(), Err(Closed::Descriptors)));
    drop((ours, writer));
    assert!(is_closed(&reader), "none is left open");
}

#[test]
fn descriptors_that_dribble_in_are_counted_together() {
    let (theirs, mut ours) = pair();
    let (_reader, writer) = rustix::pipe::pipe().expect("pipe");
    let bytes = message(5, &[0; 8]);
    send_with(&theirs, &bytes[..1], &writer, 20);
    assert!(ours.receive().expect("still open").is_none());
    send_with(&theirs, &bytes[1..2], &writer, 20);
    assert!(matches!(ours.receive(), Err(Closed::Descriptors)));
}

#[test]
fn the_end_is_told_from_a_torn_message() {
    let (theirs, mut ours) = pair();
    drop(theirs);
    assert!(matches!(ours.receive(), Err(Closed::Gone)));
    let (theirs, mut ours) = pair();
    write(&theirs, &message(2, &[7; 8])[..15]);
    drop(theirs);
    assert!(matches!(ours.receive(), Err(Closed::Torn)));
}

#[test]
fn a_header_that_nothing_can_follow_closes_the_connection() {
    let (theirs, mut ours) = pair();
    write(&theirs, &[0xff; 12]);
    assert!(matches!(ours.receive(), Err(Closed::Message(_))));
}

#[test]
fn replies_bring_their_descriptor_and_wait_for_room() {
    let (theirs, mut ours) = pair();
    let (reader, writer) = rustix::pipe::pipe().expect("pipe");
    let place = super::super::message::InflightPlace { bytes: 64, offset: 0, queues: 1, queue_size: 1 };
    ours.reply(Reply::inflight(place, writer));
    ours.reply(Reply::acknowledge(3, true));
    ours.flush().expect("sends");
    assert!(!ours.is_behind());
    let mut peer = Connection::new(theirs);
    assert!(peer.read(36).expect("reads"));
    assert_eq!((peer.partial.len(), peer.fds.len()), (36, 1));
    peer.fds.clear();
    assert!(is_closed(&reader), "we keep no copy");
}

#[test]
fn a_front_end_that_reads_nothing_is_closed() {
    let (theirs, mut ours) = pair();
    let mut replies = 0;
    let closed = loop {
        ours.reply(Reply::acknowledge(1, true));
        replies += 1;
        assert!(replies < 10_000_000, "never full");
        if let Err(closed) = ours.flush() {
            break closed;
        }
    };
    assert!(
        matches!(closed, Closed::Deaf(bytes) if bytes > UNSENT_MAX && bytes <= UNSENT_MAX + ACK),
        "{closed}"
    );
    drop(theirs);
    assert!(matches!(ours.flush(), Err(Closed::Gone)));
}
