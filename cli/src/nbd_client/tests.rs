//! Tests of the client against bytes written by hand from NBD proto.md.

use super::*;
use std::thread::JoinHandle;

/// A server that plays a fixed script: sends `say`, and answers what it was sent.
fn scripted(say: Vec<u8>) -> (UnixStream, JoinHandle<Vec<u8>>) {
    let (ours, mut theirs) = UnixStream::pair().expect("pair");
    let server = std::thread::spawn(move || {
        theirs.write_all(&say).expect("server sends");
        theirs.shutdown(std::net::Shutdown::Write).expect("server ends");
        let mut heard = Vec::new();
        theirs.read_to_end(&mut heard).expect("server hears");
        heard
    });
    (ours, server)
}

fn greeting(reply_code: u32, replies: &[&[u8]]) -> Vec<u8> {
    let mut bytes = b"NBDMAGICIHAVEOPT\x00\x03".to_vec();
    for (at, data) in replies.iter().enumerate() {
        bytes.extend(OPTION_REPLY_MAGIC.to_be_bytes());
        bytes.extend(OPT_GO.to_be_bytes());
        bytes.extend((if at + 1 == replies.len() { reply_code } else { REP_INFO }).to_be_bytes());
        bytes.extend((data.len() as u32).to_be_bytes());
        bytes.extend(*data);
    }
    bytes
}

const MIB_EXPORT: &[u8] = &[0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 1];

#[test]
fn a_write_travels_as_the_specification_says() {
    let mut say = greeting(REP_ACK, &[MIB_EXPORT, b""]);
    say.extend([0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    let (ours, server) = scripted(say);
    let mut client = NbdClient::handshake(Box::new(ours), "d").expect("handshake");
    assert_eq!(client.size(), 1 << 20);
    client.write(0x0102, b"xy").expect("writes");
    drop(client);
    let heard = server.join().expect("server");
    let mut wanted = vec![0, 0, 0, 3];
    wanted.extend(b"IHAVEOPT\0\0\0\x07\0\0\0\x07\0\0\0\x01d\0\0");
    wanted.extend(b"\x25\x60\x95\x13\0\0\0\x01\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\x01\x02\0\0\0\x02xy");
    assert_eq!(heard, wanted);
}

#[test]
fn a_refused_export_is_an_error_with_the_servers_words() {
    let (ours, _server) = scripted(greeting(0x8000_0006, &[b"no such export"]));
    match NbdClient::handshake(Box::new(ours), "none").err() {
        Some(NbdError::Refused { code: 0x8000_0006, message, .. }) => assert_eq!(message, "no such export"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_error_number_and_a_wrong_cookie_are_told_apart() {
    let mut say = greeting(REP_ACK, &[MIB_EXPORT, b""]);
    say.extend([0x67, 0x44, 0x66, 0x98, 0, 0, 0, 28, 0, 0, 0, 0, 0, 0, 0, 1]);
    say.extend([0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9]);
    let (ours, _server) = scripted(say);
    let mut client = NbdClient::handshake(Box::new(ours), "").expect("handshake");
    assert!(matches!(client.write(0, b"x"), Err(NbdError::Server { errno: 28, .. })));
    assert!(matches!(client.flush(), Err(NbdError::Protocol { what: "cookie", value: 9 })));
}

#[test]
fn a_server_that_lies_is_refused() {
    for say in [
        b"NOTMAGICIHAVEOPT\x00\x03".to_vec(),
        b"NBDMAGICIHAVEOPT\x00\x00".to_vec(),
        greeting(REP_ACK, &[b""]),
        greeting(REP_ACK, &[b"\0", b""]),
        greeting(REP_ACK, &[b"\0\0\0", b""]),
    ] {
        let (ours, _server) = scripted(say);
        assert!(matches!(NbdClient::handshake(Box::new(ours), "").err(), Some(NbdError::Protocol { .. })));
    }
}

#[test]
fn uris_are_encoded() {
    assert_eq!(
        NbdAddress::Unix("/tmp/a b.sock".into()).uri("disk0"),
        "nbd+unix:///disk0?socket=/tmp/a%20b.sock"
    );
    assert_eq!(NbdAddress::Tcp(([127, 0, 0, 1], 10809).into()).uri("vm/a"), "nbd://127.0.0.1:10809/vm/a");
}
