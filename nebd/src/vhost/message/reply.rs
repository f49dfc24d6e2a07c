//! What we send: replies to a front-end's messages, and the one message that we begin.
//!
//! Called by `device` and `control`. Must not know: sockets.

use super::{
    FLAG_REPLY, GET_CONFIG, GET_INFLIGHT_FD, GET_VRING_BASE, HEADER_BYTES, InflightPlace, QueueNumber,
    SET_LOG_BASE, VERSION,
};
use std::os::fd::OwnedFd;

/// VHOST_USER_BACKEND_CONFIG_CHANGE_MSG (vhost-user specification, "Back-end message types").
const BACKEND_CONFIG_CHANGE: u32 = 2;

/// What a reply says.
#[derive(Debug)]
pub enum Body {
    /// A number; of an acknowledgement, 0 for success.
    Number(u64),
    /// Where a queue would go on.
    Base(QueueNumber),
    /// A part of the config space; without bytes, an error.
    Config {
        /// Where it starts.
        offset: u32,
        /// As asked.
        flags: u32,
        /// The part.
        bytes: Vec<u8>,
    },
    /// A new in-flight region.
    Inflight(InflightPlace, OwnedFd),
    /// The log is in use.
    Log {
        /// Its bytes.
        bytes: u64,
        /// Where it starts in its file.
        offset: u64,
    },
}

/// A reply to one request.
#[derive(Debug)]
pub struct Reply {
    /// The request's number.
    pub request: u32,
    /// What it says.
    pub body: Body,
}

impl Reply {
    /// An acknowledgement (VHOST_USER_PROTOCOL_F_REPLY_ACK).
    pub fn acknowledge(request: u32, success: bool) -> Self {
        Self { request, body: Body::Number(u64::from(!success)) }
    }

    /// The reply to GET_VRING_BASE.
    pub fn base(queue: u32, next_available: u16) -> Self {
        let number = QueueNumber { queue, number: next_available.into() };
        Self { request: GET_VRING_BASE, body: Body::Base(number) }
    }

    /// The reply to GET_CONFIG.
    pub fn config(offset: u32, flags: u32, bytes: Vec<u8>) -> Self {
        Self { request: GET_CONFIG, body: Body::Config { offset, flags, bytes } }
    }

    /// The reply to GET_INFLIGHT_FD.
    pub fn inflight(place: InflightPlace, fd: OwnedFd) -> Self {
        Self { request: GET_INFLIGHT_FD, body: Body::Inflight(place, fd) }
    }

    /// The reply to SET_LOG_BASE.
    pub fn log(bytes: u64, offset: u64) -> Self {
        Self { request: SET_LOG_BASE, body: Body::Log { bytes, offset } }
    }

    /// Its bytes, and the descriptor that goes with them.
    pub fn encode(self) -> (Vec<u8>, Option<OwnedFd>) {
        let mut payload = Vec::new();
        let mut fd = None;
        match self.body {
            Body::Number(number) => payload.extend(number.to_ne_bytes()),
            Body::Base(QueueNumber { queue, number }) => {
                payload.extend(queue.to_ne_bytes());
                payload.extend(number.to_ne_bytes());
            }
            // An error has no payload at all.
            Body::Config { bytes, .. } if bytes.is_empty() => {}
            Body::Config { offset, flags, bytes } => {
                payload.extend(offset.to_ne_bytes());
                payload.extend((bytes.len() as u32).to_ne_bytes());
                payload.extend(flags.to_ne_bytes());
                payload.extend(bytes);
            }
            Body::Inflight(place, file) => {
                payload.extend(place.bytes.to_ne_bytes());
                payload.extend(place.offset.to_ne_bytes());
                payload.extend(place.queues.to_ne_bytes());
                payload.extend(place.queue_size.to_ne_bytes());
                // The C structure that others send and expect ends with as much padding.
                payload.extend([0; 4]);
                fd = Some(file);
            }
            Body::Log { bytes, offset } => {
                payload.extend(bytes.to_ne_bytes());
                payload.extend(offset.to_ne_bytes());
            }
        }
        let mut message = header(self.request, VERSION | FLAG_REPLY, payload.len() as u32).to_vec();
        message.append(&mut payload);
        (message, fd)
    }
}

/// Tells the front-end that the config space has changed. Nothing is answered.
pub fn config_changed() -> [u8; HEADER_BYTES] {
    header(BACKEND_CONFIG_CHANGE, VERSION, 0)
}

fn header(request: u32, flags: u32, payload: u32) -> [u8; HEADER_BYTES] {
    let mut bytes = [0; HEADER_BYTES];
    for (place, word) in bytes.chunks_exact_mut(4).zip([request, flags, payload]) {
        place.copy_from_slice(&word.to_ne_bytes());
    }
    bytes
}
