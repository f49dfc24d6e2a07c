//! vhost-user messages: bytes of one message in, a checked [`Request`] out (vhost-user specification, "Message Specification" and
//! "Front-end message types").
//!
//! Called by `control` between `connection` and `device`. [`reply`] is the way back. Must not know: sockets, the state of the device.
//! `guest_cannot_crash_us`: sizes, flags and numbers of descriptors are judged here, once; descriptors that a message does not take
//! are closed. Integers are in the machine's byte order, both ends being on one host.

pub mod reply;

pub use reply::{Body, Reply, config_changed};

use super::memory::RegionPlace;
use std::os::fd::OwnedFd;
use thiserror::Error;

/// Bytes before every payload.
pub const HEADER_BYTES: usize = 12;
/// Longest payload, bytes: a memory table of [`DESCRIPTORS_MAX`] regions and a config space fit several times.
pub const PAYLOAD_BYTES_MAX: u32 = 4096;
/// Most descriptors of one message: what front-ends send with a memory table (8 in QEMU) and more.
pub const DESCRIPTORS_MAX: usize = 32;

/// Version in every header; newest first.
///
/// 1: the only one there is.
const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const FLAG_REPLY: u32 = 4;
const FLAG_NEED_REPLY: u32 = 8;

/// In a queue's descriptor message: there is none.
const NO_DESCRIPTOR: u64 = 1 << 8;
const QUEUE_MASK: u64 = 0xff;

const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_OWNER: u32 = 3;
const RESET_OWNER: u32 = 4;
const SET_MEM_TABLE: u32 = 5;
const SET_LOG_BASE: u32 = 6;
const SET_LOG_FD: u32 = 7;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_BASE: u32 = 10;
const GET_VRING_BASE: u32 = 11;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const SET_VRING_ERR: u32 = 14;
const GET_PROTOCOL_FEATURES: u32 = 15;
const SET_PROTOCOL_FEATURES: u32 = 16;
const GET_QUEUE_NUM: u32 = 17;
const SET_VRING_ENABLE: u32 = 18;
const SET_BACKEND_REQ_FD: u32 = 21;
const GET_CONFIG: u32 = 24;
const SET_CONFIG: u32 = 25;
const GET_INFLIGHT_FD: u32 = 31;
const SET_INFLIGHT_FD: u32 = 32;
const RESET_DEVICE: u32 = 34;
const GET_MAX_MEM_SLOTS: u32 = 36;
const ADD_MEM_REG: u32 = 37;
const REM_MEM_REG: u32 = 38;

/// Why a message is refused.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum MessageError {
    /// A version that we do not speak.
    #[error("unknown version of vhost-user: version={0}")]
    Version(u32),
    /// Flags that no request has.
    #[error("impossible flags: request={request} flags={flags:#x}")]
    Flags {
        /// The request's number.
        request: u32,
        /// Its flags.
        flags: u32,
    },
    /// A payload that is longer than any.
    #[error("payload is too long: request={request} bytes={bytes} limit={PAYLOAD_BYTES_MAX}")]
    TooLong {
        /// The request's number.
        request: u32,
        /// Bytes.
        bytes: u32,
    },
    /// A request that we do not know, or never offered.
    #[error("unknown request: request={0}")]
    Unknown(u32),
    /// A payload of another size than the request has.
    #[error("payload has the wrong size: request={request} bytes={bytes}")]
    Size {
        /// The request's number.
        request: u32,
        /// Bytes.
        bytes: usize,
    },
    /// More or fewer descriptors than the request has.
    #[error("wrong number of descriptors: request={request} descriptors={count}")]
    Descriptors {
        /// The request's number.
        request: u32,
        /// How many came.
        count: usize,
    },
    /// A field with a value that it can not have.
    #[error("impossible value: request={request} {field}={value:#x}")]
    Field {
        /// The request's number.
        request: u32,
        /// Which field.
        field: &'static str,
        /// What it says.
        value: u64,
    },
}

/// A message's header, checked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// The request's number.
    pub request: u32,
    /// An acknowledgement is asked for, if that was negotiated.
    pub need_reply: bool,
    /// Bytes of the payload.
    pub payload: u32,
}

impl Header {
    /// Reads one.
    ///
    /// # Errors
    /// Those after which nothing that follows can be understood.
    pub fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<Self, MessageError> {
        let [r0, r1, r2, r3, f0, f1, f2, f3, s0, s1, s2, s3] = *bytes;
        let request = u32::from_ne_bytes([r0, r1, r2, r3]);
        let flags = u32::from_ne_bytes([f0, f1, f2, f3]);
        let payload = u32::from_ne_bytes([s0, s1, s2, s3]);
        if flags & VERSION_MASK != VERSION {
            return Err(MessageError::Version(flags & VERSION_MASK));
        }
        if flags & !(VERSION_MASK | FLAG_NEED_REPLY) != 0 {
            return Err(MessageError::Flags { request, flags });
        }
        if payload > PAYLOAD_BYTES_MAX {
            return Err(MessageError::TooLong { request, bytes: payload });
        }
        Ok(Self { request, need_reply: flags & FLAG_NEED_REPLY != 0, payload })
    }
}

/// A number for a queue (vhost-user specification, "A vring state description").
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct QueueNumber {
    /// The queue, which may not exist.
    pub queue: u32,
    /// The number.
    pub number: u32,
}

/// Where a queue's rings lie (vhost-user specification, "A vring address description").
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct QueueAddresses {
    /// Descriptor table, by the front-end's address.
    pub descriptors: u64,
    /// Used ring, by the front-end's address.
    pub used: u64,
    /// Available ring, by the front-end's address.
    pub available: u64,
    /// Guest address under which writes to the used ring are logged, if they are (VHOST_VRING_F_LOG).
    pub used_log: Option<u64>,
}

/// Shape and place of an in-flight region (vhost-user specification, "Inflight description").
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct InflightPlace {
    /// Bytes.
    pub bytes: u64,
    /// Where it starts in its file.
    pub offset: u64,
    /// Queues.
    pub queues: u16,
    /// Descriptors of each queue.
    pub queue_size: u16,
}

/// What a front-end asks for. Names are those of the specification without VHOST_USER_.
#[derive(Debug)]
#[allow(missing_docs)] // The specification says what they mean; fields that are not plain have their own types.
pub enum Request {
    GetFeatures,
    SetFeatures(u64),
    GetProtocolFeatures,
    SetProtocolFeatures(u64),
    SetOwner,
    ResetOwner,
    ResetDevice,
    GetQueueNum,
    SetMemTable(Vec<(RegionPlace, OwnedFd)>),
    GetMaxMemSlots,
    AddMemReg(RegionPlace, OwnedFd),
    RemMemReg(RegionPlace),
    SetLogBase { bytes: u64, offset: u64, fd: OwnedFd },
    SetLogFd(OwnedFd),
    SetVringNum(QueueNumber),
    SetVringAddr { queue: u32, addresses: QueueAddresses },
    SetVringBase(QueueNumber),
    GetVringBase { queue: u32 },
    SetVringKick { queue: u32, fd: Option<OwnedFd> },
    SetVringCall { queue: u32, fd: Option<OwnedFd> },
    SetVringErr { queue: u32, fd: Option<OwnedFd> },
    SetVringEnable { queue: u32, enabled: bool },
    SetBackendReqFd(OwnedFd),
    GetConfig { offset: u32, bytes: u32, flags: u32 },
    SetConfig,
    GetInflightFd(InflightPlace),
    SetInflightFd(InflightPlace, OwnedFd),
}

impl Request {
    /// Whether it has a reply of its own, so that none is asked for by need_reply.
    pub fn has_reply(number: u32) -> bool {
        matches!(
            number,
            GET_FEATURES
                | GET_PROTOCOL_FEATURES
                | GET_QUEUE_NUM
                | GET_MAX_MEM_SLOTS
                | GET_VRING_BASE
                | GET_CONFIG
                | GET_INFLIGHT_FD
                | SET_LOG_BASE
        )
    }

    /// Reads the payload behind `header`, with the descriptors that came with the message.
    ///
    /// # Errors
    /// The message is refused; its descriptors are closed.
    pub fn decode(header: &Header, payload: &[u8], fds: Vec<OwnedFd>) -> Result<Self, MessageError> {
        let mut fields = Fields { request: header.request, payload, at: 0, fds };
        let request = fields.request()?;
        fields.end()?;
        Ok(request)
    }
}

/// What is left of a message.
struct Fields<'a> {
    request: u32,
    payload: &'a [u8],
    at: usize,
    fds: Vec<OwnedFd>,
}

impl Fields<'_> {
    fn request(&mut self) -> Result<Request, MessageError> {
        Ok(match self.request {
            GET_FEATURES => Request::GetFeatures,
            SET_FEATURES => Request::SetFeatures(self.u64()?),
            GET_PROTOCOL_FEATURES => Request::GetProtocolFeatures,
            SET_PROTOCOL_FEATURES => Request::SetProtocolFeatures(self.u64()?),
            SET_OWNER => Request::SetOwner,
            RESET_OWNER => Request::ResetOwner,
            RESET_DEVICE => Request::ResetDevice,
            GET_QUEUE_NUM => Request::GetQueueNum,
            SET_MEM_TABLE => self.memory_table()?,
            GET_MAX_MEM_SLOTS => Request::GetMaxMemSlots,
            ADD_MEM_REG => {
                self.padding()?;
                Request::AddMemReg(self.region()?, self.descriptor()?)
            }
            REM_MEM_REG => {
                self.padding()?;
                // Some front-ends send one, which is closed unused.
                self.fds.pop();
                Request::RemMemReg(self.region()?)
            }
            SET_LOG_BASE => {
                Request::SetLogBase { bytes: self.u64()?, offset: self.u64()?, fd: self.descriptor()? }
            }
            SET_LOG_FD => Request::SetLogFd(self.descriptor()?),
            SET_VRING_NUM => Request::SetVringNum(self.queue_number()?),
            SET_VRING_ADDR => self.addresses()?,
            SET_VRING_BASE => Request::SetVringBase(self.queue_number()?),
            GET_VRING_BASE => Request::GetVringBase { queue: self.queue_number()?.queue },
            SET_VRING_KICK => {
                let (queue, fd) = self.bell()?;
                Request::SetVringKick { queue, fd }
            }
            SET_VRING_CALL => {
                let (queue, fd) = self.bell()?;
                Request::SetVringCall { queue, fd }
            }
            SET_VRING_ERR => {
                let (queue, fd) = self.bell()?;
                Request::SetVringErr { queue, fd }
            }
            SET_VRING_ENABLE => self.enable()?,
            SET_BACKEND_REQ_FD => Request::SetBackendReqFd(self.descriptor()?),
            GET_CONFIG => {
                let (offset, bytes, flags) = self.config()?;
                Request::GetConfig { offset, bytes, flags }
            }
            SET_CONFIG => {
                self.config()?;
                Request::SetConfig
            }
            GET_INFLIGHT_FD => Request::GetInflightFd(self.inflight()?),
            SET_INFLIGHT_FD => Request::SetInflightFd(self.inflight()?, self.descriptor()?),
            unknown => return Err(MessageError::Unknown(unknown)),
        })
    }

    /// Everything must have been used, but for padding that a C structure may have at its end.
    fn end(&self) -> Result<(), MessageError> {
        let left = self.payload.len() - self.at;
        let padded = matches!(self.request, GET_INFLIGHT_FD | SET_INFLIGHT_FD) && left == 4;
        if left != 0 && !padded {
            return Err(self.size());
        }
        if self.fds.is_empty() { Ok(()) } else { Err(self.descriptors()) }
    }

    fn size(&self) -> MessageError {
        MessageError::Size { request: self.request, bytes: self.payload.len() }
    }

    fn descriptors(&self) -> MessageError {
        MessageError::Descriptors { request: self.request, count: self.fds.len() }
    }

    fn field(&self, field: &'static str, value: u64) -> MessageError {
        MessageError::Field { request: self.request, field, value }
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], MessageError> {
        let bytes = self.payload.get(self.at..).and_then(|rest| rest.first_chunk::<N>());
        let bytes = *bytes.ok_or_else(|| self.size())?;
        self.at += N;
        Ok(bytes)
    }

    fn u16(&mut self) -> Result<u16, MessageError> {
        self.take().map(u16::from_ne_bytes)
    }

    fn u32(&mut self) -> Result<u32, MessageError> {
        self.take().map(u32::from_ne_bytes)
    }

    fn u64(&mut self) -> Result<u64, MessageError> {
        self.take().map(u64::from_ne_bytes)
    }

    fn padding(&mut self) -> Result<(), MessageError> {
        self.take::<8>().map(|_| ())
    }

    /// The one descriptor that the request has.
    fn descriptor(&mut self) -> Result<OwnedFd, MessageError> {
        match (self.fds.len(), self.fds.pop()) {
            (1, Some(fd)) => Ok(fd),
            (count, _) => Err(MessageError::Descriptors { request: self.request, count }),
        }
    }

    fn queue_number(&mut self) -> Result<QueueNumber, MessageError> {
        Ok(QueueNumber { queue: self.u32()?, number: self.u32()? })
    }

    fn enable(&mut self) -> Result<Request, MessageError> {
        let QueueNumber { queue, number } = self.queue_number()?;
        match number {
            0 | 1 => Ok(Request::SetVringEnable { queue, enabled: number == 1 }),
            other => Err(self.field("enable", other.into())),
        }
    }

    fn bell(&mut self) -> Result<(u32, Option<OwnedFd>), MessageError> {
        let word = self.u64()?;
        if word & !(QUEUE_MASK | NO_DESCRIPTOR) != 0 {
            return Err(self.field("index_and_flag", word));
        }
        let fd = if word & NO_DESCRIPTOR == 0 { Some(self.descriptor()?) } else { None };
        Ok(((word & QUEUE_MASK) as u32, fd))
    }

    fn addresses(&mut self) -> Result<Request, MessageError> {
        const LOGGED: u32 = 1;
        let (queue, flags) = (self.u32()?, self.u32()?);
        let (descriptors, used, available, log) = (self.u64()?, self.u64()?, self.u64()?, self.u64()?);
        if flags & !LOGGED != 0 {
            return Err(self.field("flags", flags.into()));
        }
        let used_log = (flags & LOGGED != 0).then_some(log);
        let addresses = QueueAddresses { descriptors, used, available, used_log };
        Ok(Request::SetVringAddr { queue, addresses })
    }

    fn region(&mut self) -> Result<RegionPlace, MessageError> {
        Ok(RegionPlace {
            guest_address: self.u64()?,
            length: self.u64()?,
            user_address: self.u64()?,
            offset: self.u64()?,
        })
    }

    fn memory_table(&mut self) -> Result<Request, MessageError> {
        let (count, _) = (self.u32()? as usize, self.u32()?);
        if count == 0 || count > DESCRIPTORS_MAX {
            return Err(self.field("regions", count as u64));
        }
        if count != self.fds.len() {
            return Err(self.descriptors());
        }
        let places = (0..count).map(|_| self.region()).collect::<Result<Vec<_>, _>>()?;
        Ok(Request::SetMemTable(places.into_iter().zip(self.fds.drain(..)).collect()))
    }

    fn config(&mut self) -> Result<(u32, u32, u32), MessageError> {
        let (offset, bytes, flags) = (self.u32()?, self.u32()?, self.u32()?);
        if self.payload.len() - self.at != bytes as usize {
            return Err(self.size());
        }
        self.at = self.payload.len();
        Ok((offset, bytes, flags))
    }

    fn inflight(&mut self) -> Result<InflightPlace, MessageError> {
        Ok(InflightPlace {
            bytes: self.u64()?,
            offset: self.u64()?,
            queues: self.u16()?,
            queue_size: self.u16()?,
        })
    }
}

/// Reads a whole message from bytes that anybody made up: for tests.
///
/// # Errors
/// The message is refused.
pub fn decode(bytes: &[u8], fds: Vec<OwnedFd>) -> Result<(Header, Request), MessageError> {
    let Some((head, payload)) = bytes.split_first_chunk::<HEADER_BYTES>() else {
        return Err(MessageError::Size { request: 0, bytes: bytes.len() });
    };
    let header = Header::parse(head)?;
    if payload.len() != header.payload as usize {
        return Err(MessageError::Size { request: header.request, bytes: payload.len() });
    }
    Ok((header, Request::decode(&header, payload, fds)?))
}

#[cfg(test)]
mod tests;
