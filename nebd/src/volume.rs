//! The volume as nebd holds it: the export that guests are told of, and the requests they wait for.
//!
//! Called by the event loop, the connections and the link; owned by the event loop. Must not know: sockets.

use crate::budget::Budget;
use crate::export::Export;
use crate::inflight::{Entry, Inflight};
use crate::metrics::Metrics;
use crate::nbd::connection::ConnectionId;
use crate::nbd::transmission::Ticket;
use spline_link::Accepted;
use spline_types::{Extent, Fault};
use std::rc::Rc;
use std::time::Instant;

/// Whom to answer.
#[derive(Clone, Copy, Debug)]
pub struct Origin {
    /// The client.
    pub connection: ConnectionId,
    /// The client's request.
    pub ticket: Ticket,
}

/// What the in-flight table keeps of a client's request.
#[derive(Debug)]
pub struct Asked {
    /// Whom to answer.
    pub origin: Origin,
    /// A write's data, kept for a replay; empty for other requests.
    pub payload: Rc<Vec<u8>>,
}

/// Data of a read.
#[derive(Debug)]
pub enum ReadData<'a> {
    /// Small: still in the receive buffer.
    Slice(&'a [u8]),
    /// Large: in a buffer of its own.
    Shared(Rc<Vec<u8>>),
}

impl ReadData<'_> {
    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Self::Slice(bytes) => bytes,
            Self::Shared(bytes) => bytes,
        }
    }
}

/// What a successful request brings its guest.
#[derive(Debug)]
pub enum Answer<'a> {
    /// Nothing but success.
    Done,
    /// As many bytes as were asked for.
    Data(ReadData<'a>),
    /// At least one extent, from the asked offset, not past the asked end.
    Extents(Vec<Extent>),
}

/// The volume.
#[derive(Debug)]
pub struct Volume {
    /// What guests are told.
    pub export: Export,
    /// What guests wait for.
    pub inflight: Inflight<Asked>,
    /// What clients' data may take.
    pub budget: Budget,
    /// Another session has the volume, or had it: the link is at rest until a client that came afterwards asks.
    pub lost: bool,
    /// Counters.
    pub metrics: Metrics,
    /// The time of this turn of the event loop.
    pub now: Instant,
}

impl Volume {
    /// The link is gone: what it was sent will be sent again.
    pub fn link_lost(&mut self) {
        self.metrics.link_up.set(0);
        let replays = self.inflight.link_lost();
        self.metrics.replays.inc_by(replays as u64);
    }

    /// A gateway serves the volume; `read_only` is what our config wants.
    pub fn accepted(&mut self, accepted: &Accepted, read_only: bool) {
        self.export.update(accepted, read_only);
        self.metrics.link_up.set(1);
        self.metrics.link_connects.inc();
    }

    /// Counts a request that leaves the table.
    pub fn count(&self, entry: &Entry<Asked>, result: &Result<(), Fault>) {
        let request = &entry.request;
        self.metrics.answered(request.op, request.range.length(), self.now - entry.started, result);
    }
}
