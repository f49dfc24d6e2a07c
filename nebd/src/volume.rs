//! The volume as nebd holds it: the export that guests are told of, the requests they wait for, and the data of these.
//!
//! Called by the event loop, the connections and the link; owned by the event loop. Must not know: sockets.
//! `complete_once`: an answer that fits no request that was sent is an error, and cuts the link.

use crate::area::{Area, Buffer};
use crate::budget::{Budget, COMMON_BYTES, SHARE_BYTES};
use crate::export::Export;
use crate::inflight::{Entry, Inflight, Outcome};
use crate::link::LinkDown;
use crate::metrics::Metrics;
use crate::nbd::connection::ConnectionId;
use crate::nbd::transmission::{STATUS_BYTES_MAX, Ticket};
use spline_link::memory::MemoryError;
use spline_link::{Accepted, extents};
use spline_types::{BlockOp, Completion, Extent, Fault, RequestId, Unavailable};
use std::rc::Rc;
use std::time::Instant;

// Whatever extents the gateway answers, they fit.
const _: () = assert!(extents::EXTENT_BYTES * extents::EXTENTS_MAX <= STATUS_BYTES_MAX as usize);

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
    /// A write's data, kept for a replay, or room for what a read or a status brings; `None` for other requests.
    pub data: Option<Rc<Buffer>>,
}

/// What a successful request brings its guest.
#[derive(Debug)]
pub enum Answer {
    /// Nothing but success.
    Done,
    /// As many bytes as were asked for.
    Data(Rc<Buffer>),
    /// At least one extent, from the asked offset, not past the asked end.
    Extents(Vec<Extent>),
}

/// Whom to tell what.
pub type Ended = (Origin, Result<Answer, Fault>);

/// The volume.
#[derive(Debug)]
pub struct Volume {
    /// What guests are told.
    pub export: Export,
    /// What guests wait for.
    pub inflight: Inflight<Asked>,
    /// What clients' data may take.
    pub budget: Budget,
    /// Where the data of new requests lies.
    pub area: Rc<Area>,
    /// Another session has the volume, or had it: the link is at rest until a client that came afterwards asks.
    pub lost: bool,
    /// Counters.
    pub metrics: Metrics,
    /// The time of this turn of the event loop.
    pub now: Instant,
}

/// An area for all that `connections` clients may hold together.
///
/// # Errors
/// If there is no descriptor or address space left.
pub fn area_for(connections: usize) -> Result<Rc<Area>, MemoryError> {
    Area::create(COMMON_BYTES + SHARE_BYTES * connections as u64)
}

impl Volume {
    /// The link is gone: what it was sent will be sent again. If the gateway knew the area (`shared`), it may still put data of
    /// reads there: `next` is to be used from now on.
    pub fn link_lost(&mut self, shared: bool, next: impl FnOnce() -> Result<Rc<Area>, MemoryError>) {
        self.metrics.link_up.set(0);
        let replays = self.inflight.link_lost();
        self.metrics.replays.inc_by(replays as u64);
        if shared {
            match next() {
                Ok(area) => self.move_to(area),
                Err(error) => tracing::error!(
                    %error,
                    "no new memory for the next link; end a gateway that hangs before this one is used again"
                ),
            }
        }
    }

    /// Data of writes stays where it is until it is answered, nobody writes there. What is to be read comes to the new area.
    fn move_to(&mut self, area: Rc<Area>) {
        let old = std::mem::replace(&mut self.area, area);
        let area = &self.area;
        self.inflight.contexts_mut(|asked| {
            let Some(data) = &mut asked.data else { return };
            // It is as large as the old one and nothing else is in it: there is room.
            if asked.origin.ticket.op != BlockOp::Write
                && let Some(room) = area.take(data.length())
            {
                *data = Rc::new(room);
            }
        });
        old.retire();
    }

    /// A gateway serves the volume; `read_only` is what our config wants.
    pub fn accepted(&mut self, accepted: &Accepted, read_only: bool) {
        self.export.update(accepted, read_only);
        self.metrics.link_up.set(1);
        self.metrics.link_connects.inc();
    }

    /// It has `size` bytes now.
    pub fn resized(&mut self, size: u64) {
        if size != self.export.geometry.size {
            tracing::info!(size, "volume resized");
            self.export.geometry.size = size;
        }
    }

    /// Another gateway process has taken the link over: what the one before withdrew will be sent again.
    pub fn renewed(&mut self) {
        let replays = self.inflight.renew();
        self.metrics.replays.inc_by(replays as u64);
    }

    /// Ends a request of which the gateway says that it has ended so, and put `payload` bytes of a status's extents into its
    /// buffer. Answers what its guest is told, and who that is; `None` if it will be sent again.
    ///
    /// # Errors
    /// If it was not asked for, or not so.
    pub fn complete(
        &mut self,
        id: RequestId,
        completion: Completion,
        payload: usize,
    ) -> Result<Option<Ended>, LinkDown> {
        let entry = self.inflight.sent(id).ok_or(LinkDown::WrongAnswer(id))?;
        let request = entry.request;
        let found = match (&completion, request.op, &entry.context.data) {
            (Completion::Done(()), BlockOp::Status, Some(data)) if payload <= data.length() => {
                // Decoded from a copy: what lies in the buffer may change.
                let mut bytes = vec![0; payload];
                data.read(0, &mut bytes);
                extents::decode(&bytes, request.range.length())?
            }
            _ if payload == 0 => Vec::new(),
            _ => return Err(LinkDown::WrongAnswer(id)),
        };
        let Entry { context, started, .. } = match self.inflight.complete(id, &completion) {
            Outcome::Answer(entry) => entry,
            // Withdrawn: the guest learns nothing, it is sent again.
            Outcome::Kept => return Ok(None),
            Outcome::Unknown => return Err(LinkDown::WrongAnswer(id)),
        };
        let result = match (completion, request.op, context.data) {
            (Completion::Done(()), BlockOp::Read, Some(data)) => Ok(Answer::Data(data)),
            (Completion::Done(()), BlockOp::Status, _) => Ok(Answer::Extents(found)),
            (Completion::Done(()), ..) => Ok(Answer::Done),
            (Completion::Failed(fault), ..) => Err(fault),
            (Completion::Withdrawn, ..) => Err(Fault::Unavailable(Unavailable::Unreachable)),
        };
        let outcome = result.as_ref().map(|_| ()).map_err(|fault| *fault);
        self.metrics.answered(request.op, request.range.length(), self.now - started, &outcome);
        Ok(Some((context.origin, result)))
    }

    /// Counts a request that leaves the table without an answer of the gateway.
    pub fn count(&self, entry: &Entry<Asked>, result: &Result<(), Fault>) {
        let request = &entry.request;
        self.metrics.answered(request.op, request.range.length(), self.now - entry.started, result);
    }
}
