//! An NBD client that says what it is told to, well-formed or not, and shows every answer as it came.
//!
//! Called by the tests of bad inputs. Numbers and layouts are those of NBD proto.md, written down a second time here so
//! that the server's mistakes are not repeated. Must never know: the server's code.

use anyhow::{Context, bail, ensure};
use spline_harness::Export;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// Options of the handshake (NBD proto.md, "Option types").
pub mod opt {
    /// Choose an export; enters transmission, has no error reply.
    pub const EXPORT_NAME: u32 = 1;
    /// End the session.
    pub const ABORT: u32 = 2;
    /// List the exports.
    pub const LIST: u32 = 3;
    /// Upgrade to TLS.
    pub const STARTTLS: u32 = 5;
    /// Tell about an export.
    pub const INFO: u32 = 6;
    /// Choose an export; enters transmission.
    pub const GO: u32 = 7;
    /// Use structured replies.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// List metadata contexts.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Select metadata contexts.
    pub const SET_META_CONTEXT: u32 = 10;
}

/// Replies to options (NBD proto.md, "Option reply types").
pub mod rep {
    /// Done.
    pub const ACK: u32 = 1;
    /// An export of the list.
    pub const SERVER: u32 = 2;
    /// Something about an export.
    pub const INFO: u32 = 3;
    /// A metadata context.
    pub const META_CONTEXT: u32 = 4;
    /// The option is not known here.
    pub const ERR_UNSUP: u32 = (1 << 31) + 1;
    /// The option's data is malformed, or it came too early.
    pub const ERR_INVALID: u32 = (1 << 31) + 3;
    /// No such export.
    pub const ERR_UNKNOWN: u32 = (1 << 31) + 6;
    /// The option is too long.
    pub const ERR_TOO_BIG: u32 = (1 << 31) + 9;
}

/// Commands of the transmission phase (NBD proto.md, "Request types").
pub mod cmd {
    /// Read.
    pub const READ: u16 = 0;
    /// Write; its data follows.
    pub const WRITE: u16 = 1;
    /// End the session when everything is answered.
    pub const DISC: u16 = 2;
    /// Make everything answered durable.
    pub const FLUSH: u16 = 3;
    /// Give a range back.
    pub const TRIM: u16 = 4;
    /// Read ahead.
    pub const CACHE: u16 = 5;
    /// Make a range zeros.
    pub const WRITE_ZEROES: u16 = 6;
    /// Tell what is allocated.
    pub const BLOCK_STATUS: u16 = 7;
}

/// Command flags (NBD proto.md, "Command flags").
pub mod flag {
    /// Durable before it is answered.
    pub const FUA: u16 = 1 << 0;
    /// Keep the space of zeros.
    pub const NO_HOLE: u16 = 1 << 1;
    /// Do not fragment a read's answer.
    pub const DF: u16 = 1 << 2;
    /// One extent only.
    pub const REQ_ONE: u16 = 1 << 3;
    /// Fail rather than zero slowly.
    pub const FAST_ZERO: u16 = 1 << 4;
}

/// Chunks of structured replies (NBD proto.md, "Structured reply types").
pub mod chunk {
    /// Nothing; the last one.
    pub const NONE: u16 = 0;
    /// Data at an offset.
    pub const OFFSET_DATA: u16 = 1;
    /// Zeros at an offset.
    pub const OFFSET_HOLE: u16 = 2;
    /// Extents.
    pub const BLOCK_STATUS: u16 = 5;
    /// The request failed.
    pub const ERROR: u16 = (1 << 15) + 1;
}

/// Error numbers (NBD proto.md, "Error values").
pub mod errno {
    /// Read-only.
    pub const EPERM: u32 = 1;
    /// The request is wrong.
    pub const EINVAL: u32 = 22;
    /// A write past the end.
    pub const ENOSPC: u32 = 28;
}

/// First bytes of an option.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// First bytes of a request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Client flags: fixed newstyle, no zeroes.
pub const CLIENT_FLAGS: u32 = 3;
/// NBD_INFO_BLOCK_SIZE: the client will keep to the server's block sizes.
pub const INFO_BLOCK_SIZE: u16 = 3;
/// The name of the one metadata context.
pub const BASE_ALLOCATION: &str = "base:allocation";

/// No answer takes this long, however busy the machine is.
const PATIENCE: Duration = Duration::from_secs(30);

/// One reply to an option.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct OptionReply {
    /// The option it answers.
    pub option: u32,
    /// Of [`rep`].
    pub kind: u32,
    /// What it says.
    pub data: Vec<u8>,
}

/// One chunk of a structured reply.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Chunk {
    /// Whether it is the reply's last.
    pub done: bool,
    /// Of [`chunk`].
    pub kind: u16,
    /// Which request.
    pub cookie: u64,
    /// Its payload.
    pub data: Vec<u8>,
}

impl Chunk {
    /// The error number of an error chunk; 0 if it is none.
    pub fn errno(&self) -> u32 {
        match (self.kind >> 15, self.data.first_chunk()) {
            (1, Some(bytes)) => u32::from_be_bytes(*bytes),
            _ => 0,
        }
    }
}

/// An option with a length that need not be its data's.
pub fn option_of(option: u32, length: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = OPTION_MAGIC.to_be_bytes().to_vec();
    bytes.extend(option.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes.extend(data);
    bytes
}

/// An option.
pub fn option(option: u32, data: &[u8]) -> Vec<u8> {
    option_of(option, data.len() as u32, data)
}

/// Data of INFO and GO.
pub fn info_data(name: &[u8], wanted: &[u16]) -> Vec<u8> {
    let mut data = string(name);
    data.extend((wanted.len() as u16).to_be_bytes());
    wanted.iter().for_each(|kind| data.extend(kind.to_be_bytes()));
    data
}

/// Data of LIST_META_CONTEXT and SET_META_CONTEXT.
pub fn context_data(name: &[u8], queries: &[&str]) -> Vec<u8> {
    let mut data = string(name);
    data.extend((queries.len() as u32).to_be_bytes());
    queries.iter().for_each(|query| data.extend(string(query.as_bytes())));
    data
}

fn string(text: &[u8]) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes()[..], text].concat()
}

/// A request without its data.
pub fn request(command: u16, flags: u16, cookie: u64, (offset, length): (u64, u32)) -> Vec<u8> {
    let mut bytes = REQUEST_MAGIC.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(command.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes
}

/// The client. Dropping it closes its socket without a word.
#[derive(Debug)]
pub struct Raw {
    stream: UnixStream,
    cookie: u64,
}

impl Raw {
    /// Connects and reads the greeting; says nothing.
    ///
    /// # Errors
    /// If nobody greets, or not as fixed newstyle.
    pub fn greeted(socket: &Path) -> anyhow::Result<Self> {
        let stream = UnixStream::connect(socket).with_context(|| socket.display().to_string())?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut raw = Self { stream, cookie: 0x5e7 };
        let greeting = raw.bytes(18)?;
        ensure!(greeting == b"NBDMAGICIHAVEOPT\0\x03", "greeting={greeting:?}");
        Ok(raw)
    }

    /// Connects up to the point where options follow.
    ///
    /// # Errors
    /// As [`Raw::greeted`].
    pub fn haggling(socket: &Path) -> anyhow::Result<Self> {
        let mut raw = Self::greeted(socket)?;
        raw.send(&CLIENT_FLAGS.to_be_bytes())?;
        Ok(raw)
    }

    /// Connects and enters transmission with simple replies.
    ///
    /// # Errors
    /// If the export is refused.
    pub fn entered(export: &Export) -> anyhow::Result<Self> {
        let mut raw = Self::haggling(&export.socket)?;
        raw.go(export.volume.as_bytes(), &[])?;
        Ok(raw)
    }

    /// Connects and enters transmission with structured replies and block status.
    ///
    /// # Errors
    /// If any of it is refused.
    pub fn structured(export: &Export) -> anyhow::Result<Self> {
        let mut raw = Self::haggling(&export.socket)?;
        let name = export.volume.as_bytes();
        raw.expect(opt::STRUCTURED_REPLY, &[], &[rep::ACK])?;
        let contexts = context_data(name, &[BASE_ALLOCATION]);
        raw.expect(opt::SET_META_CONTEXT, &contexts, &[rep::META_CONTEXT, rep::ACK])?;
        raw.go(name, &[])?;
        Ok(raw)
    }

    /// Sends bytes.
    ///
    /// # Errors
    /// Those of the socket.
    pub fn send(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        self.stream.write_all(bytes).context("sending")
    }

    /// The next `count` bytes.
    ///
    /// # Errors
    /// If the server closes before, or says nothing for a long time.
    pub fn bytes(&mut self, count: usize) -> anyhow::Result<Vec<u8>> {
        let mut bytes = vec![0; count];
        self.stream.read_exact(&mut bytes).context("receiving")?;
        Ok(bytes)
    }

    fn number<const N: usize>(&mut self) -> anyhow::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes).context("receiving")?;
        Ok(bytes)
    }

    /// Closes the sending side.
    ///
    /// # Errors
    /// Those of the socket.
    pub fn half_close(&mut self) -> anyhow::Result<()> {
        Ok(self.stream.shutdown(Shutdown::Write)?)
    }

    /// The server closes without another word.
    ///
    /// # Errors
    /// If it says something, or stays.
    pub fn closed(&mut self) -> anyhow::Result<()> {
        let mut byte = [0];
        match self.stream.read(&mut byte) {
            Ok(0) => Ok(()),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(()),
            Ok(_) => bail!("should have closed, but said something: byte={:#x}", byte[0]),
            Err(error) => bail!("should have closed: {error}"),
        }
    }

    /// Sends bytes that the server may be cutting off meanwhile, and waits until it has closed without a word.
    ///
    /// # Errors
    /// As [`Raw::closed`].
    pub fn cut_by(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        match self.stream.write_all(bytes) {
            Err(error) if !matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) => {
                Err(error).context("sending")
            }
            _ => self.closed(),
        }
    }

    /// The next reply to an option.
    ///
    /// # Errors
    /// If it is none.
    pub fn option_reply(&mut self) -> anyhow::Result<OptionReply> {
        let magic = u64::from_be_bytes(self.number()?);
        ensure!(magic == 0x0003_e889_0455_65a9, "not a reply to an option: magic={magic:#x}");
        let option = u32::from_be_bytes(self.number()?);
        let kind = u32::from_be_bytes(self.number()?);
        let length = u32::from_be_bytes(self.number()?);
        ensure!(length <= 1 << 16, "reply to an option is too long: bytes={length}");
        Ok(OptionReply { option, kind, data: self.bytes(length as usize)? })
    }

    /// All replies to the option that was sent last: the final one is ACK or an error.
    ///
    /// # Errors
    /// If one of them answers another option.
    pub fn replies(&mut self, option: u32) -> anyhow::Result<Vec<OptionReply>> {
        let mut replies = Vec::new();
        loop {
            let reply = self.option_reply()?;
            ensure!(reply.option == option, "answers another option: {reply:?} wanted={option}");
            let last = reply.kind == rep::ACK || reply.kind >> 31 == 1;
            replies.push(reply);
            if last {
                return Ok(replies);
            }
        }
    }

    /// Sends an option; its replies must be of these kinds.
    ///
    /// # Errors
    /// If they are not.
    pub fn expect(&mut self, name: u32, data: &[u8], kinds: &[u32]) -> anyhow::Result<Vec<OptionReply>> {
        self.send(&option(name, data))?;
        self.expect_replies(name, kinds)
    }

    /// The replies to an option that was sent before must be of these kinds.
    ///
    /// # Errors
    /// If they are not.
    pub fn expect_replies(&mut self, name: u32, kinds: &[u32]) -> anyhow::Result<Vec<OptionReply>> {
        let replies = self.replies(name)?;
        let found: Vec<u32> = replies.iter().map(|reply| reply.kind).collect();
        ensure!(found == kinds, "option={name} replies={found:x?} wanted={kinds:x?}");
        Ok(replies)
    }

    /// Enters transmission by GO; answers the size and the flags of the export.
    ///
    /// # Errors
    /// If the export is refused.
    pub fn go(&mut self, name: &[u8], wanted: &[u16]) -> anyhow::Result<(u64, u16)> {
        self.send(&option(opt::GO, &info_data(name, wanted)))?;
        let replies = self.replies(opt::GO)?;
        ensure!(replies.last().is_some_and(|reply| reply.kind == rep::ACK), "{replies:?}");
        let export = replies.iter().find_map(|reply| reply.data.strip_prefix(&[0, 0]));
        let (size, flags) = export.and_then(|data| data.split_first_chunk()).context("no NBD_INFO_EXPORT")?;
        Ok((u64::from_be_bytes(*size), u16::from_be_bytes(flags.try_into()?)))
    }

    /// As [`Raw::go`], and answers the preferred block size too.
    ///
    /// # Errors
    /// If the export is refused, or does not say its block sizes.
    pub fn go_with_block_size(&mut self, name: &[u8], wanted: &[u16]) -> anyhow::Result<(u64, u16, u32)> {
        self.send(&option(opt::GO, &info_data(name, wanted)))?;
        let replies = self.replies(opt::GO)?;
        let said = |kind: u8| replies.iter().find_map(|reply| reply.data.strip_prefix(&[0, kind]));
        let (size, flags) =
            said(0).and_then(|data| data.split_first_chunk()).context("no NBD_INFO_EXPORT")?;
        let preferred = said(3).and_then(|data| data.get(4..8)).context("no NBD_INFO_BLOCK_SIZE")?;
        Ok((
            u64::from_be_bytes(*size),
            u16::from_be_bytes(flags.try_into()?),
            u32::from_be_bytes(preferred.try_into()?),
        ))
    }

    /// Sends a request and its data under a cookie of its own, which it answers.
    ///
    /// # Errors
    /// Those of the socket.
    pub fn ask(
        &mut self,
        (command, flags): (u16, u16),
        (offset, length): (u64, u32),
        data: &[u8],
    ) -> anyhow::Result<u64> {
        self.cookie += 1;
        self.send(&[&request(command, flags, self.cookie, (offset, length)), data].concat())?;
        Ok(self.cookie)
    }

    /// The head of a simple reply: cookie and error number.
    ///
    /// # Errors
    /// If it is none.
    pub fn simple(&mut self) -> anyhow::Result<(u64, u32)> {
        let magic = u32::from_be_bytes(self.number()?);
        ensure!(magic == 0x6744_6698, "not a simple reply: magic={magic:#x}");
        let errno = u32::from_be_bytes(self.number()?);
        Ok((u64::from_be_bytes(self.number()?), errno))
    }

    /// The next chunk of a structured reply.
    ///
    /// # Errors
    /// If it is none.
    pub fn chunk(&mut self) -> anyhow::Result<Chunk> {
        let magic = u32::from_be_bytes(self.number()?);
        ensure!(magic == 0x668e_33ef, "not a structured reply: magic={magic:#x}");
        let flags = u16::from_be_bytes(self.number()?);
        ensure!(flags & !1 == 0, "unknown reply flags: flags={flags:#x}");
        let kind = u16::from_be_bytes(self.number()?);
        let cookie = u64::from_be_bytes(self.number()?);
        let length = u32::from_be_bytes(self.number()?);
        ensure!(length <= (32 << 20) + 8, "chunk is too long: bytes={length}");
        Ok(Chunk { done: flags == 1, kind, cookie, data: self.bytes(length as usize)? })
    }

    /// Sends a request and waits for its simple reply, which must have this error number; a successful read's data
    /// is left to the caller.
    ///
    /// # Errors
    /// If it is another.
    pub fn expect_errno(
        &mut self,
        (command, flags): (u16, u16),
        (offset, length): (u64, u32),
        data: &[u8],
        wanted: u32,
    ) -> anyhow::Result<()> {
        let cookie = self.ask((command, flags), (offset, length), data)?;
        let found = self.simple()?;
        ensure!(
            found == (cookie, wanted),
            "command={command} flags={flags:#x} offset={offset} length={length} cookie={:#x} errno={} wanted={wanted}",
            found.0,
            found.1
        );
        Ok(())
    }

    /// Reads by a simple reply; it must succeed.
    ///
    /// # Errors
    /// If it does not.
    pub fn read(&mut self, offset: u64, length: u32) -> anyhow::Result<Vec<u8>> {
        self.expect_errno((cmd::READ, 0), (offset, length), &[], 0)?;
        self.bytes(length as usize)
    }

    /// Writes by a simple reply; it must succeed.
    ///
    /// # Errors
    /// If it does not.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> anyhow::Result<()> {
        self.expect_errno((cmd::WRITE, 0), (offset, data.len() as u32), data, 0)
    }
}
