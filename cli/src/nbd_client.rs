//! A small blocking NBD client: fixed newstyle handshake with `NBD_OPT_GO`, simple replies, one request at a time.
//!
//! Called by `spline dev --check` and by whoever waits for an export to serve. Knows: NBD proto.md. Must not know:
//! nebd, volumes, the cluster. Limits: every read and write of the socket has the caller's timeout.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

const NBDMAGIC: u64 = u64::from_be_bytes(*b"NBDMAGIC");
const IHAVEOPT: u64 = u64::from_be_bytes(*b"IHAVEOPT");
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// `NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES`, the same bits in both directions.
const HANDSHAKE_FLAGS: u16 = 0b11;
const OPT_GO: u32 = 7;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const INFO_EXPORT: u16 = 0;
/// Longest option reply that is read; longer ones are a defect of the server.
const OPTION_REPLY_BYTES_MAX: u32 = 64 << 10;

/// Where an NBD server listens.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NbdAddress {
    /// A unix socket.
    Unix(PathBuf),
    /// A TCP address.
    Tcp(SocketAddr),
}

impl NbdAddress {
    /// The NBD URI of an export at this address (NBD uri.md).
    pub fn uri(&self, export: &str) -> String {
        match self {
            Self::Unix(path) => {
                format!("nbd+unix:///{export}?socket={}", percent_encode(&path.to_string_lossy()))
            }
            Self::Tcp(address) => format!("nbd://{address}/{export}"),
        }
    }
}

impl fmt::Display for NbdAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "{}", path.display()),
            Self::Tcp(address) => write!(f, "{address}"),
        }
    }
}

/// Why a request of this client did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum NbdError {
    /// The connection failed or timed out.
    #[error("nbd connection failed: {0}")]
    Io(#[from] io::Error),
    /// The server broke the protocol.
    #[error("nbd server broke the protocol: {what} value={value:#x}")]
    Protocol {
        /// What was wrong.
        what: &'static str,
        /// The value that was sent.
        value: u64,
    },
    /// The server refused the export.
    #[error("nbd export is refused: export={export:?} code={code:#x} message={message:?}")]
    Refused {
        /// The export asked for.
        export: String,
        /// The option reply's type.
        code: u32,
        /// The server's words.
        message: String,
    },
    /// The server answered a request with an error number.
    #[error("nbd request failed: request={request} errno={errno}")]
    Server {
        /// Which request.
        request: &'static str,
        /// The error number of NBD proto.md.
        errno: u32,
    },
}

/// A request's type as NBD proto.md numbers it.
#[derive(Clone, Copy)]
enum Command {
    Read = 0,
    Write = 1,
    Disconnect = 2,
    Flush = 3,
    Trim = 4,
    WriteZeroes = 6,
}

impl Command {
    const fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Disconnect => "disconnect",
            Self::Flush => "flush",
            Self::Trim => "trim",
            Self::WriteZeroes => "write_zeroes",
        }
    }
}

trait Duplex: Read + Write + Send {}
impl<T: Read + Write + Send> Duplex for T {}

/// A connection in transmission mode.
pub struct NbdClient {
    stream: Box<dyn Duplex>,
    size: u64,
    cookie: u64,
}

impl NbdClient {
    /// Connects and enters transmission for `export`. `timeout` holds for the connection and for every later wait.
    ///
    /// # Errors
    /// See [`NbdError`].
    pub fn connect(address: &NbdAddress, export: &str, timeout: Duration) -> Result<Self, NbdError> {
        let stream: Box<dyn Duplex> = match address {
            NbdAddress::Unix(path) => {
                let stream = UnixStream::connect(path)?;
                stream.set_read_timeout(Some(timeout))?;
                stream.set_write_timeout(Some(timeout))?;
                Box::new(stream)
            }
            NbdAddress::Tcp(address) => {
                let stream = TcpStream::connect_timeout(address, timeout)?;
                stream.set_nodelay(true)?;
                stream.set_read_timeout(Some(timeout))?;
                stream.set_write_timeout(Some(timeout))?;
                Box::new(stream)
            }
        };
        Self::handshake(stream, export)
    }

    fn handshake(mut stream: Box<dyn Duplex>, export: &str) -> Result<Self, NbdError> {
        expect("greeting magic", read_u64(&mut stream)?, NBDMAGIC)?;
        expect("option magic", read_u64(&mut stream)?, IHAVEOPT)?;
        let flags = read_u16(&mut stream)?;
        expect("handshake flags", u64::from(flags & HANDSHAKE_FLAGS), u64::from(HANDSHAKE_FLAGS))?;
        let mut hello = u32::from(HANDSHAKE_FLAGS).to_be_bytes().to_vec();
        hello.extend(IHAVEOPT.to_be_bytes());
        hello.extend(OPT_GO.to_be_bytes());
        hello.extend((export.len() as u32 + 6).to_be_bytes());
        hello.extend((export.len() as u32).to_be_bytes());
        hello.extend(export.as_bytes());
        hello.extend(0u16.to_be_bytes());
        stream.write_all(&hello)?;
        let size = read_go_replies(&mut stream, export)?;
        Ok(Self { stream, size, cookie: 0 })
    }

    /// Bytes of the export.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Reads `buffer.len()` bytes at `offset`.
    ///
    /// # Errors
    /// See [`NbdError`].
    pub fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), NbdError> {
        self.send(Command::Read, offset, buffer.len() as u32, &[])?;
        self.receive(Command::Read)?;
        Ok(self.stream.read_exact(buffer)?)
    }

    /// Writes `data` at `offset`.
    ///
    /// # Errors
    /// See [`NbdError`].
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), NbdError> {
        self.send(Command::Write, offset, data.len() as u32, data)?;
        self.receive(Command::Write)
    }

    /// Makes everything answered before durable.
    ///
    /// # Errors
    /// See [`NbdError`].
    pub fn flush(&mut self) -> Result<(), NbdError> {
        self.send(Command::Flush, 0, 0, &[])?;
        self.receive(Command::Flush)
    }

    /// Gives a range back.
    ///
    /// # Errors
    /// See [`NbdError`].
    pub fn trim(&mut self, offset: u64, length: u32) -> Result<(), NbdError> {
        self.send(Command::Trim, offset, length, &[])?;
        self.receive(Command::Trim)
    }

    /// Makes a range zeros.
    ///
    /// # Errors
    /// See [`NbdError`].
    pub fn write_zeroes(&mut self, offset: u64, length: u32) -> Result<(), NbdError> {
        self.send(Command::WriteZeroes, offset, length, &[])?;
        self.receive(Command::WriteZeroes)
    }

    /// Says goodbye; the server closes the connection.
    ///
    /// # Errors
    /// See [`NbdError`].
    pub fn disconnect(mut self) -> Result<(), NbdError> {
        self.send(Command::Disconnect, 0, 0, &[])
    }

    fn send(&mut self, command: Command, offset: u64, length: u32, data: &[u8]) -> Result<(), NbdError> {
        self.cookie += 1;
        let mut request = Vec::with_capacity(28 + data.len());
        request.extend(REQUEST_MAGIC.to_be_bytes());
        request.extend(0u16.to_be_bytes());
        request.extend((command as u16).to_be_bytes());
        request.extend(self.cookie.to_be_bytes());
        request.extend(offset.to_be_bytes());
        request.extend(length.to_be_bytes());
        request.extend(data);
        Ok(self.stream.write_all(&request)?)
    }

    fn receive(&mut self, command: Command) -> Result<(), NbdError> {
        let magic = read_u32(&mut self.stream)?;
        expect("reply magic", u64::from(magic), u64::from(SIMPLE_REPLY_MAGIC))?;
        let errno = read_u32(&mut self.stream)?;
        expect("cookie", read_u64(&mut self.stream)?, self.cookie)?;
        match errno {
            0 => Ok(()),
            errno => Err(NbdError::Server { request: command.name(), errno }),
        }
    }
}

/// Reads the replies to `NBD_OPT_GO` up to the final one; answers the export's size.
fn read_go_replies(stream: &mut impl Read, export: &str) -> Result<u64, NbdError> {
    let mut size = None;
    loop {
        expect("option reply magic", read_u64(stream)?, OPTION_REPLY_MAGIC)?;
        expect("option of the reply", u64::from(read_u32(stream)?), u64::from(OPT_GO))?;
        let code = read_u32(stream)?;
        let length = read_u32(stream)?;
        if length > OPTION_REPLY_BYTES_MAX {
            return Err(NbdError::Protocol { what: "option reply is too long", value: u64::from(length) });
        }
        let mut data = vec![0; length as usize];
        stream.read_exact(&mut data)?;
        match code {
            REP_ACK => {
                return size
                    .ok_or(NbdError::Protocol { what: "no export information before the ack", value: 0 });
            }
            REP_INFO => size = export_size(&data)?.or(size),
            code => {
                let message = String::from_utf8_lossy(&data).into_owned();
                return Err(NbdError::Refused { export: export.to_owned(), code, message });
            }
        }
    }
}

/// The size in an `NBD_INFO_EXPORT`; `None` for other information.
fn export_size(data: &[u8]) -> Result<Option<u64>, NbdError> {
    let malformed = NbdError::Protocol { what: "malformed information, bytes", value: data.len() as u64 };
    match data.split_first_chunk::<2>() {
        Some((kind, rest)) if u16::from_be_bytes(*kind) == INFO_EXPORT => match rest.split_first_chunk::<8>()
        {
            Some((size, flags)) if flags.len() == 2 => Ok(Some(u64::from_be_bytes(*size))),
            _ => Err(malformed),
        },
        Some(_) => Ok(None),
        None => Err(malformed),
    }
}

fn expect(what: &'static str, value: u64, wanted: u64) -> Result<(), NbdError> {
    if value == wanted { Ok(()) } else { Err(NbdError::Protocol { what, value }) }
}

fn read_u64(stream: &mut impl Read) -> io::Result<u64> {
    let mut bytes = [0; 8];
    stream.read_exact(&mut bytes).map(|()| u64::from_be_bytes(bytes))
}

fn read_u32(stream: &mut impl Read) -> io::Result<u32> {
    let mut bytes = [0; 4];
    stream.read_exact(&mut bytes).map(|()| u32::from_be_bytes(bytes))
}

fn read_u16(stream: &mut impl Read) -> io::Result<u16> {
    let mut bytes = [0; 2];
    stream.read_exact(&mut bytes).map(|()| u16::from_be_bytes(bytes))
}

/// Encodes what may not stand in a URI's query (RFC 3986).
fn percent_encode(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' | b':' | b'@' => {
                out.push(char::from(byte));
            }
            byte => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

#[cfg(test)]
mod tests;
