//! Why the device refuses a message.

use crate::vhost::inflight::InflightError;
use crate::vhost::memory::{MapError, MemoryError, OutsideMemory};
use thiserror::Error;

/// Why a message changed nothing.
#[derive(Debug, Error)]
pub enum Refusal {
    /// A queue that is not there.
    #[error("no such queue: queue={queue} queues={queues}")]
    Queue {
        /// Which.
        queue: u32,
        /// How many there are.
        queues: u16,
    },
    /// Not while queues are served.
    #[error("queue is served and must be stopped first: setting={0}")]
    Serving(&'static str),
    /// Something must come before it.
    #[error("message is too early: missing={0}")]
    Early(&'static str),
    /// Features that were not offered.
    #[error("features were not offered: features={0:#x}")]
    Features(u64),
    /// Protocol features that were not offered.
    #[error("protocol features were not offered: features={0:#x}")]
    ProtocolFeatures(u64),
    /// A message that needs protocol features which the front-end did not accept.
    #[error("protocol feature was not negotiated: features={0:#x}")]
    NotNegotiated(u64),
    /// A size that no queue has.
    #[error("queue size must be a power of two up to the limit: size={size} limit={limit}")]
    Size {
        /// What was asked for.
        size: u32,
        /// What is allowed.
        limit: u16,
    },
    /// An index that no ring has.
    #[error("index is too large: index={0}")]
    Base(u32),
    /// Memory that can not be taken.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Rings that are not in the memory.
    #[error("ring: {0}")]
    Ring(#[from] OutsideMemory),
    /// A log that can not be mapped.
    #[error("dirty log: {0}")]
    Log(MapError),
    /// A log that is too small.
    #[error("dirty log does not cover the guest's memory: memory_end={0:#x}")]
    LogSize(u64),
    /// An in-flight region that can not be used.
    #[error(transparent)]
    Inflight(#[from] InflightError),
    /// An in-flight region without room for a queue.
    #[error("in-flight region has no room for the queue: queue={queue} size={size}")]
    InflightShape {
        /// Which queue.
        queue: u16,
        /// Its descriptors.
        size: u16,
    },
    /// Nothing in the config space can be written.
    #[error("config space can not be written")]
    Config,
}
