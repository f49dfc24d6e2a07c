//! An NBD client for tests, as plain as it can be: simple replies only, every byte visible.

use spline_nebd::nbd::protocol::*;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

pub(crate) struct Client {
    pub(crate) stream: UnixStream,
}

impl Client {
    /// Connects and enters the transmission phase by EXPORT_NAME.
    pub(crate) fn connect(path: &Path) -> Self {
        let mut client = Self::knock(path);
        client.stream.write_all(&3u32.to_be_bytes()).expect("writes");
        client.stream.write_all(b"IHAVEOPT\0\0\0\x01\0\0\0\0").expect("writes");
        let mut answer = [0; 10];
        client.stream.read_exact(&mut answer).expect("the export is served");
        client
    }

    /// Connects and enters the transmission phase with structured replies.
    #[allow(dead_code, reason = "not every test that shares this file needs it")]
    pub(crate) fn connect_structured(path: &Path) -> Self {
        let mut client = Self::knock(path);
        client.stream.write_all(&3u32.to_be_bytes()).expect("writes");
        client.stream.write_all(b"IHAVEOPT\0\0\0\x08\0\0\0\0IHAVEOPT\0\0\0\x01\0\0\0\0").expect("writes");
        // The acknowledgement of the first option, then size and flags.
        client.data(20 + 10);
        client
    }

    /// Takes one structured reply to a read; answers how many bytes its chunks cover.
    #[allow(dead_code, reason = "not every test that shares this file needs it")]
    pub(crate) fn chunks(&mut self, cookie: u64) -> usize {
        let mut covered = 0;
        loop {
            let head = self.data(20);
            assert_eq!(head[..4], STRUCTURED_REPLY_MAGIC.to_be_bytes());
            assert_eq!(head[8..16], cookie.to_be_bytes());
            let length = u32::from_be_bytes(head[16..].try_into().expect("four bytes")) as usize;
            let payload = self.data(length);
            match u16::from_be_bytes([head[6], head[7]]) {
                REPLY_TYPE_OFFSET_DATA => covered += length - 8,
                REPLY_TYPE_OFFSET_HOLE => {
                    covered += u32::from_be_bytes(payload[8..].try_into().expect("four bytes")) as usize;
                }
                other => panic!("chunk of type {other}"),
            }
            if head[5] == REPLY_FLAG_DONE as u8 {
                return covered;
            }
        }
    }

    /// The next bytes.
    pub(crate) fn data(&mut self, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        self.stream.read_exact(&mut data).expect("data comes");
        data
    }

    /// Connects and reads the greeting.
    pub(crate) fn knock(path: &Path) -> Self {
        let mut stream = UnixStream::connect(path).expect("connects");
        stream.set_read_timeout(Some(Duration::from_secs(20))).expect("sets");
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting).expect("greets");
        assert_eq!(&greeting, b"NBDMAGICIHAVEOPT\0\x03");
        Self { stream }
    }

    pub(crate) fn send(&mut self, command: u16, cookie: u64, offset: u64, length: u32) {
        self.stream.write_all(&request(command, cookie, offset, length)).expect("writes");
    }

    pub(crate) fn write(&mut self, cookie: u64, offset: u64, data: &[u8]) {
        self.send(CMD_WRITE, cookie, offset, data.len() as u32);
        self.stream.write_all(data).expect("writes");
    }

    /// Cookie and error of the next simple reply.
    pub(crate) fn reply(&mut self) -> (u64, u32) {
        let mut head = [0; 16];
        self.stream.read_exact(&mut head).expect("a reply comes");
        assert_eq!(head[..4], SIMPLE_REPLY_MAGIC.to_be_bytes());
        let error = u32::from_be_bytes([head[4], head[5], head[6], head[7]]);
        let cookie = head[8..].iter().fold(0, |all, byte| all << 8 | u64::from(*byte));
        (cookie, error)
    }

    pub(crate) fn read(&mut self, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
        self.send(CMD_READ, cookie, offset, length);
        assert_eq!(self.reply(), (cookie, 0));
        self.data(length as usize)
    }

    /// Waits until the server closes, and answers how many bytes came before.
    pub(crate) fn closed(&mut self) -> usize {
        let mut rest = Vec::new();
        // A reset is as much an end as a close.
        let _ = self.stream.read_to_end(&mut rest);
        rest.len()
    }
}

pub(crate) fn request(command: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    let mut bytes = REQUEST_MAGIC.to_be_bytes().to_vec();
    bytes.extend_from_slice(&[0, 0]);
    bytes.extend_from_slice(&command.to_be_bytes());
    bytes.extend_from_slice(&cookie.to_be_bytes());
    bytes.extend_from_slice(&offset.to_be_bytes());
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes
}
