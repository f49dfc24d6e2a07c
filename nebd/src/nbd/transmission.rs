//! The transmission phase: requests of one client as a state machine over bytes (proto.md, "Transmission phase").
//!
//! Called by `connection`. Must not know: sockets, the link, replies' encoding. Each request is parsed once and checked
//! against the export here; what comes out is a request that the gateway may get, or a refusal.
//! `guest_cannot_crash_us`: no length is believed before it is checked. `bounded`: a request's buffer is taken only within the
//! connection's [`Room`].

use crate::area::{Area, Buffer, page_bytes};
use crate::export::Export;
use crate::nbd::errno::{NbdError, nbd_error};
use crate::nbd::protocol::*;
use spline_types::limits::REQUEST_BYTES_MAX;
use spline_types::{BlockOp, ByteRange, Fault, Invalid};
use std::fmt;
use std::rc::Rc;

/// Longest payload of a refused write that is read and thrown away, bytes; more cuts the connection.
pub const DRAIN_MAX: u32 = 2 * REQUEST_BYTES_MAX;

/// What the handshake agreed upon.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Agreed {
    /// Structured replies.
    pub structured: bool,
    /// Block status with base:allocation.
    pub allocation: bool,
    /// The client knows our block sizes and is held to them.
    pub block_size: bool,
}

/// What is needed to answer a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ticket {
    /// The client's name for the request.
    pub cookie: u64,
    /// What was asked.
    pub op: BlockOp,
    /// Where.
    pub range: ByteRange,
    /// A read's answer must be one chunk (NBD_CMD_FLAG_DF).
    pub one_chunk: bool,
    /// A status's answer must be one extent (NBD_CMD_FLAG_REQ_ONE).
    pub one_extent: bool,
}

/// What the gateway's answer to a status may take, and what the client's does, bytes.
pub const STATUS_BYTES_MAX: u64 = 96 << 10;

impl Ticket {
    /// Bytes of the buffer in which the request's data lies, or comes to lie.
    pub fn data_bytes(&self) -> u64 {
        match self.op {
            BlockOp::Status => STATUS_BYTES_MAX,
            op if op.carries_data() => self.range.length(),
            _ => 0,
        }
    }

    /// Most bytes of memory that the request and its answer hold, small change left out.
    pub fn holds(&self) -> u64 {
        page_bytes(self.data_bytes())
    }
}

/// A request for the gateway.
#[derive(PartialEq, Eq, Debug)]
pub struct Incoming {
    /// How to answer it; holds op and range.
    pub ticket: Ticket,
    /// Durable before it is answered.
    pub fua: bool,
    /// A write's data, or room for what a read or a status brings: [`Ticket::data_bytes`]. `None` for other requests.
    pub data: Option<Buffer>,
}

/// A request that is answered with an error at once.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Refused {
    /// The client's name for the request.
    pub cookie: u64,
    /// The error of a reply.
    pub error: NbdError,
    /// Why, for a structured reply's text.
    pub fault: Fault,
}

/// How much the connection may still take in.
#[derive(Clone, Copy, Debug)]
pub struct Room<'a> {
    /// Requests.
    pub requests: usize,
    /// What requests and their answers hold, bytes.
    pub bytes: u64,
    /// Where their data lies.
    pub area: &'a Rc<Area>,
}

/// What the bytes so far lead to.
#[derive(PartialEq, Eq, Debug)]
pub enum Event {
    /// More bytes are needed.
    NeedMore,
    /// The next request does not fit the room; nothing of it was taken.
    Full,
    /// A request for the gateway.
    Request(Incoming),
    /// A request without bytes: it is done already.
    Nothing(Ticket),
    /// A request that fails here.
    Refused(Refused),
    /// NBD_CMD_DISC: answer what is in flight, then close.
    Disconnect,
    /// The client broke the protocol; the connection is cut.
    Violation(Violation),
}

/// Why a connection is cut during transmission.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Violation {
    /// Not a request where one must be.
    Magic(u32),
    /// A write with more data than we would even throw away.
    Payload(u32),
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Magic(magic) => write!(f, "not a request: magic={magic:#x}"),
            Self::Payload(bytes) => write!(f, "write is too long: bytes={bytes} limit={DRAIN_MAX}"),
        }
    }
}

#[derive(Debug)]
enum State {
    Header,
    /// A write of whose data the first `have` bytes are there.
    Payload {
        incoming: Incoming,
        have: usize,
    },
    Drain {
        refused: Refused,
        left: u32,
    },
}

/// The state machine of one connection's requests.
#[derive(Debug)]
pub struct Transmission {
    agreed: Agreed,
    state: State,
}

/// A request's header as it came.
struct Raw {
    flags: u16,
    command: u16,
    cookie: u64,
    offset: u64,
    length: u32,
}

impl Transmission {
    /// Starts with what the handshake agreed upon.
    pub fn new(agreed: Agreed) -> Self {
        Self { agreed, state: State::Header }
    }

    /// What the handshake agreed upon.
    pub fn agreed(&self) -> Agreed {
        self.agreed
    }

    /// Takes at most one request from `input`. Answers how many bytes it took, and where that leads.
    pub fn advance(&mut self, input: &[u8], export: &Export, room: Room<'_>) -> (usize, Event) {
        match &mut self.state {
            State::Header => self.header(input, export, room),
            State::Payload { incoming, have } => {
                let mut taken = 0;
                if let Some(data) = &incoming.data {
                    taken = input.len().min(data.length() - *have);
                    data.write(*have, &input[..taken]);
                    *have += taken;
                }
                (taken, self.finish())
            }
            State::Drain { refused, left } => {
                let taken = input.len().min(*left as usize);
                *left -= taken as u32;
                if *left > 0 {
                    return (taken, Event::NeedMore);
                }
                let refused = *refused;
                self.state = State::Header;
                (taken, Event::Refused(refused))
            }
        }
    }

    /// The buffer of a write whose data is still coming, to be read into directly, and how many bytes of it are there.
    pub fn payload(&self) -> Option<(&Buffer, usize)> {
        match &self.state {
            State::Payload { incoming, have } => incoming.data.as_ref().map(|data| (data, *have)),
            _ => None,
        }
    }

    /// `count` more bytes were put into the [`payload`](Self::payload).
    pub fn filled(&mut self, count: usize) {
        if let State::Payload { have, .. } = &mut self.state {
            *have += count;
        }
    }

    /// Bytes of memory of the write whose data is still coming.
    pub fn coming(&self) -> u64 {
        match &self.state {
            State::Payload { incoming, .. } => incoming.ticket.holds(),
            State::Header | State::Drain { .. } => 0,
        }
    }

    fn finish(&mut self) -> Event {
        match std::mem::replace(&mut self.state, State::Header) {
            State::Payload { incoming, have } if have == incoming.data.as_ref().map_or(0, Buffer::length) => {
                Event::Request(incoming)
            }
            unfinished => {
                self.state = unfinished;
                Event::NeedMore
            }
        }
    }

    fn header(&mut self, input: &[u8], export: &Export, room: Room<'_>) -> (usize, Event) {
        let Some(head) = input.first_chunk::<REQUEST_BYTES>() else { return (0, Event::NeedMore) };
        let raw = match Raw::parse(head) {
            Ok(raw) => raw,
            Err(violation) => return (REQUEST_BYTES, Event::Violation(violation)),
        };
        if raw.command == CMD_DISC {
            return (REQUEST_BYTES, Event::Disconnect);
        }
        match self.check(&raw, export) {
            Err(fault) => match self.refuse(&raw, fault) {
                // A refused write's data is behind it.
                Event::NeedMore => {
                    let (taken, event) = self.advance(&input[REQUEST_BYTES..], export, room);
                    (REQUEST_BYTES + taken, event)
                }
                event => (REQUEST_BYTES, event),
            },
            Ok((ticket, _)) if ticket.range.is_empty() && ticket.op != BlockOp::Flush => {
                (REQUEST_BYTES, Event::Nothing(ticket))
            }
            Ok((ticket, fua)) => {
                if room.requests == 0 || ticket.holds() > room.bytes {
                    return (0, Event::Full);
                }
                let data = match ticket.data_bytes() {
                    0 => None,
                    bytes => match room.area.take(bytes as usize) {
                        Some(data) => Some(data),
                        None => return (0, Event::Full),
                    },
                };
                let incoming = Incoming { ticket, fua, data };
                if ticket.op != BlockOp::Write {
                    return (REQUEST_BYTES, Event::Request(incoming));
                }
                self.state = State::Payload { incoming, have: 0 };
                let (taken, event) = self.advance(&input[REQUEST_BYTES..], export, room);
                (REQUEST_BYTES + taken, event)
            }
        }
    }

    fn refuse(&mut self, raw: &Raw, fault: Fault) -> Event {
        let op = raw.op().unwrap_or(BlockOp::Flush);
        let refused = Refused { cookie: raw.cookie, error: nbd_error(op, fault), fault };
        if op != BlockOp::Write || raw.length == 0 {
            return Event::Refused(refused);
        }
        if raw.length > DRAIN_MAX {
            return Event::Violation(Violation::Payload(raw.length));
        }
        self.state = State::Drain { refused, left: raw.length };
        Event::NeedMore
    }

    /// The one check of a request (proto.md, "Request types" and "Error values").
    fn check(&self, raw: &Raw, export: &Export) -> Result<(Ticket, bool), Fault> {
        let op = raw.op().ok_or(Fault::Invalid(Invalid::Flags))?;
        // FUA is accepted with every command, as the specification demands.
        let known = CMD_FLAG_FUA
            | match op {
                BlockOp::Read if self.agreed.structured => CMD_FLAG_DF,
                BlockOp::WriteZeroes { .. } => CMD_FLAG_NO_HOLE | CMD_FLAG_FAST_ZERO,
                BlockOp::Status => CMD_FLAG_REQ_ONE,
                _ => 0,
            };
        if raw.flags & !known != 0 {
            return Err(Fault::Invalid(Invalid::Flags));
        }
        let nothing_asked = raw.offset == 0 && raw.length == 0;
        let fits = match op {
            BlockOp::Flush => nothing_asked,
            BlockOp::Status => self.agreed.allocation && raw.length > 0,
            _ => true,
        };
        if !fits {
            return Err(Fault::Invalid(Invalid::Flags));
        }
        if op.modifies() && export.read_only {
            return Err(Fault::ReadOnly);
        }
        let range = ByteRange::new(raw.offset, raw.length.into()).ok_or(Fault::Invalid(Invalid::PastEnd))?;
        export.geometry.check(op, range)?;
        let block = u64::from(BLOCK_BYTES_MIN);
        let aligned = range.offset().is_multiple_of(block) && range.length().is_multiple_of(block);
        if self.agreed.block_size && !aligned {
            return Err(Fault::Invalid(Invalid::Alignment));
        }
        let ticket = Ticket {
            cookie: raw.cookie,
            op,
            range,
            one_chunk: raw.flags & CMD_FLAG_DF != 0,
            one_extent: raw.flags & CMD_FLAG_REQ_ONE != 0,
        };
        Ok((ticket, op.modifies() && raw.flags & CMD_FLAG_FUA != 0))
    }
}

impl Raw {
    fn parse(head: &[u8; REQUEST_BYTES]) -> Result<Self, Violation> {
        let [m0, m1, m2, m3, f0, f1, c0, c1, rest @ ..] = *head;
        let magic = u32::from_be_bytes([m0, m1, m2, m3]);
        if magic != REQUEST_MAGIC {
            return Err(Violation::Magic(magic));
        }
        let [k0, k1, k2, k3, k4, k5, k6, k7, o0, o1, o2, o3, o4, o5, o6, o7, l0, l1, l2, l3] = rest;
        Ok(Self {
            flags: u16::from_be_bytes([f0, f1]),
            command: u16::from_be_bytes([c0, c1]),
            cookie: u64::from_be_bytes([k0, k1, k2, k3, k4, k5, k6, k7]),
            offset: u64::from_be_bytes([o0, o1, o2, o3, o4, o5, o6, o7]),
            length: u32::from_be_bytes([l0, l1, l2, l3]),
        })
    }

    /// What the command asks for; `None` if we do not know it.
    fn op(&self) -> Option<BlockOp> {
        Some(match self.command {
            CMD_READ => BlockOp::Read,
            CMD_WRITE => BlockOp::Write,
            CMD_FLUSH => BlockOp::Flush,
            CMD_TRIM => BlockOp::Discard,
            CMD_CACHE => BlockOp::Cache,
            CMD_WRITE_ZEROES => BlockOp::WriteZeroes {
                no_hole: self.flags & CMD_FLAG_NO_HOLE != 0,
                fast: self.flags & CMD_FLAG_FAST_ZERO != 0,
            },
            CMD_BLOCK_STATUS => BlockOp::Status,
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests;
