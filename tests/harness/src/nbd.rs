//! A small NBD client for tests that keep many requests in flight: one half sends, the other receives.
//!
//! Written from NBD proto.md apart from the client of the command line, so that neither hides the other's mistakes.

use anyhow::{Context, bail, ensure};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// NBD's error numbers that tests ask for.
pub mod errno {
    /// Operation not permitted: the export is read-only.
    pub const EPERM: u32 = 1;
    /// Invalid argument.
    pub const EINVAL: u32 = 22;
    /// A write past the end.
    pub const ENOSPC: u32 = 28;
}

/// What a request does, as NBD proto.md numbers it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// NBD_CMD_READ
    Read = 0,
    /// NBD_CMD_WRITE
    Write = 1,
    /// NBD_CMD_DISC
    Disconnect = 2,
    /// NBD_CMD_FLUSH
    Flush = 3,
    /// NBD_CMD_TRIM
    Trim = 4,
    /// NBD_CMD_WRITE_ZEROES
    WriteZeroes = 6,
    /// NBD_CMD_WRITE_ZEROES with NBD_CMD_FLAG_NO_HOLE: the space is kept.
    WriteZeroesNoHole = 0x2_0006,
}

/// A connection in transmission mode.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    size: u64,
}

/// The sending half.
#[derive(Debug)]
pub struct Sender(UnixStream);

/// The receiving half.
#[derive(Debug)]
pub struct Receiver(UnixStream);

/// The head of a simple reply. If the request was a read and `errno` is 0, its data follows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Reply {
    /// 0, or why the request failed.
    pub errno: u32,
    /// Which request.
    pub cookie: u64,
}

impl Connection {
    /// Connects and enters transmission by `NBD_OPT_GO`; `timeout` holds for the handshake only.
    ///
    /// # Errors
    /// If the server refuses, or breaks the protocol.
    pub fn open(socket: &Path, export: &str, timeout: Duration) -> anyhow::Result<Self> {
        let mut stream = UnixStream::connect(socket).with_context(|| socket.display().to_string())?;
        stream.set_read_timeout(Some(timeout))?;
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting)?;
        ensure!(&greeting[..16] == b"NBDMAGICIHAVEOPT", "greeting={greeting:?}");
        let mut hello = vec![0, 0, 0, 3];
        hello.extend(b"IHAVEOPT\0\0\0\x07");
        hello.extend((export.len() as u32 + 6).to_be_bytes());
        hello.extend((export.len() as u32).to_be_bytes());
        hello.extend(export.as_bytes());
        hello.extend([0, 0]);
        stream.write_all(&hello)?;
        let mut size = 0;
        loop {
            let mut head = [0; 20];
            stream.read_exact(&mut head)?;
            let code = u32::from_be_bytes([head[12], head[13], head[14], head[15]]);
            let length = u32::from_be_bytes([head[16], head[17], head[18], head[19]]);
            ensure!(length < 65536, "option reply is too long: bytes={length}");
            let mut data = vec![0; length as usize];
            stream.read_exact(&mut data)?;
            match (code, data.as_slice()) {
                (1, _) => break,
                (3, [0, 0, bytes @ .., _, _]) => size = u64::from_be_bytes(bytes.try_into()?),
                (3, _) => {}
                (code, said) => bail!("refused: code={code:#x} said={}", String::from_utf8_lossy(said)),
            }
        }
        stream.set_read_timeout(None)?;
        Ok(Self { stream, size })
    }

    /// Bytes of the export.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The two halves.
    ///
    /// # Errors
    /// Those of the system.
    pub fn split(self) -> anyhow::Result<(Sender, Receiver)> {
        Ok((Sender(self.stream.try_clone()?), Receiver(self.stream)))
    }

    /// Says goodbye.
    ///
    /// # Errors
    /// Those of the connection.
    pub fn close(self) -> anyhow::Result<()> {
        Sender(self.stream).send(Kind::Disconnect, 0, 0, 0, &[])
    }

    /// One request, waited for; answers the error number, and a read's data.
    ///
    /// # Errors
    /// Those of the connection.
    pub fn call(
        &mut self,
        kind: Kind,
        offset: u64,
        length: u32,
        data: &[u8],
    ) -> anyhow::Result<(u32, Vec<u8>)> {
        Sender(self.stream.try_clone()?).send(kind, 77, offset, length, data)?;
        let mut receiver = Receiver(self.stream.try_clone()?);
        let reply = receiver.reply()?.context("connection ended")?;
        ensure!(reply.cookie == 77, "cookie={}", reply.cookie);
        let mut out = vec![0; if kind == Kind::Read && reply.errno == 0 { length as usize } else { 0 }];
        receiver.data(&mut out)?;
        Ok((reply.errno, out))
    }

    /// As [`Connection::call`], for requests that must succeed.
    ///
    /// # Errors
    /// Those of the connection, and if the server answers an error number.
    pub fn succeed(&mut self, kind: Kind, offset: u64, length: u32, data: &[u8]) -> anyhow::Result<Vec<u8>> {
        let (errno, data) = self.call(kind, offset, length, data)?;
        ensure!(errno == 0, "request failed: kind={kind:?} offset={offset} length={length} errno={errno}");
        Ok(data)
    }
}

impl Sender {
    /// Sends one request.
    ///
    /// # Errors
    /// Those of the connection.
    pub fn send(
        &mut self,
        kind: Kind,
        cookie: u64,
        offset: u64,
        length: u32,
        data: &[u8],
    ) -> anyhow::Result<()> {
        let mut request = vec![0x25, 0x60, 0x95, 0x13];
        // Flags above, the command below.
        request.extend((kind as u32).to_be_bytes());
        request.extend(cookie.to_be_bytes());
        request.extend(offset.to_be_bytes());
        request.extend(length.to_be_bytes());
        request.extend(data);
        Ok(self.0.write_all(&request)?)
    }
}

impl Receiver {
    /// The next reply's head; `None` when the connection ended, as it does when the server is killed.
    ///
    /// # Errors
    /// If the server breaks the protocol.
    pub fn reply(&mut self) -> anyhow::Result<Option<Reply>> {
        let mut head = [0; 16];
        match self.0.read_exact(&mut head) {
            Err(error) if matches!(error.kind(), ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset) => {
                return Ok(None);
            }
            result => result?,
        }
        ensure!(head[..4] == [0x67, 0x44, 0x66, 0x98], "reply magic: {head:?}");
        let errno = u32::from_be_bytes([head[4], head[5], head[6], head[7]]);
        let cookie = head[8..].iter().fold(0, |cookie, byte| cookie << 8 | u64::from(*byte));
        Ok(Some(Reply { errno, cookie }))
    }

    /// A read's data, after its reply.
    ///
    /// # Errors
    /// Those of the connection.
    pub fn data(&mut self, out: &mut [u8]) -> anyhow::Result<()> {
        Ok(self.0.read_exact(out)?)
    }
}
