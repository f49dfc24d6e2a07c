//! The requests that a link with a ring has taken and not answered, and what is done for those that no lane takes.
//!
//! Used by the link's `ring`. `complete_once`: a ticket names one request until it is removed.

use crate::admission::Permit;
use crate::buffer::BufferPool;
use crate::engine::EngineAnswer;
use crate::link::staying::weight;
use crate::link::{data_of, fitting};
use crate::session::{Session, hung_up};
use crate::shared::SharedData;
use bytes::Bytes;
use spline_link::extents;
use spline_link::ring::RingAnswer;
use spline_types::{BlockOp, BlockRequest, Completion, Fault, RequestId};
use std::os::fd::OwnedFd;
use std::sync::Weak;
use std::time::Instant;

/// A request under way.
pub(super) struct Ongoing {
    pub(super) request: BlockRequest,
    /// Given back with it.
    #[allow(dead_code, reason = "held for its drop")]
    pub(super) permit: Permit,
    pub(super) since: Instant,
}

/// Why a request was not carried out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum NotDone {
    Fault(Fault),
    /// nebd has left, and will send it again.
    Left,
}

impl From<Fault> for NotDone {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

/// Requests by ticket.
#[derive(Default)]
pub(super) struct Requests {
    places: Vec<Option<Ongoing>>,
    free: Vec<u32>,
    len: usize,
    /// Their data.
    bytes: u64,
}

impl Requests {
    pub(super) fn insert(&mut self, ongoing: Ongoing) -> u32 {
        self.len += 1;
        self.bytes += u64::from(data_of(&ongoing.request));
        match self.free.pop() {
            Some(ticket) => {
                self.places[ticket as usize] = Some(ongoing);
                ticket
            }
            None => {
                self.places.push(Some(ongoing));
                // No more than a ring has places.
                (self.places.len() - 1) as u32
            }
        }
    }

    pub(super) fn remove(&mut self, ticket: u32) -> Option<Ongoing> {
        let ongoing = self.places.get_mut(ticket as usize)?.take()?;
        self.free.push(ticket);
        self.len -= 1;
        self.bytes -= u64::from(data_of(&ongoing.request));
        Some(ongoing)
    }

    /// What they weigh for the thread ([`staying`](crate::link::staying)).
    pub(super) fn weight(&self) -> usize {
        weight(self.len, self.bytes)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Takes all of them out.
    pub(super) fn drain(&mut self) -> impl Iterator<Item = Ongoing> {
        (self.len, self.bytes) = (0, 0);
        self.free.clear();
        std::mem::take(&mut self.places).into_iter().flatten()
    }
}

/// Carries out a request with copies of its data; answers how many bytes of extents were put into it.
///
/// What was read goes nowhere once nebd has left `socket`: if this process stood still meanwhile, another gateway may have answered,
/// and the memory be of another use.
///
/// # Errors
/// The engine's; `Internal` if the memory has vanished; or that nebd has left.
pub(super) async fn execute(
    session: &Session,
    buffers: &BufferPool,
    socket: &Weak<OwnedFd>,
    request: BlockRequest,
    data: SharedData,
) -> Result<u32, NotDone> {
    let payload = match request.op {
        BlockOp::Write if data.len() > 0 => {
            let mut buffer = buffers.take(data.len());
            data.copy_out(buffer.as_mut_slice()).map_err(|_| Fault::Internal)?;
            buffer.freeze()
        }
        _ => Bytes::new(),
    };
    match fitting(&request, session.engine.execute(request, payload).await?)? {
        EngineAnswer::Done => Ok(0),
        EngineAnswer::Data(parts) => {
            let mut at = 0;
            for part in parts {
                bring(&data, socket, at, &part)?;
                at += part.len();
            }
            Ok(0)
        }
        EngineAnswer::Extents(list) => {
            let fit = data.len() / extents::EXTENT_BYTES;
            let bytes = extents::encode(&list[..list.len().min(fit)]);
            bring(&data, socket, 0, &bytes)?;
            // At most `EXTENTS_MAX` of twelve bytes.
            Ok(bytes.len() as u32)
        }
    }
}

/// Copies what was read to where nebd wants it, if it is still there.
fn bring(data: &SharedData, socket: &Weak<OwnedFd>, at: usize, part: &[u8]) -> Result<(), NotDone> {
    match hung_up(socket) {
        true => Err(NotDone::Left),
        false => data.copy_in(at, part).map_err(|_| Fault::Internal.into()),
    }
}

/// How a request ended, for nebd.
pub(super) fn answer(id: RequestId, result: Result<u32, Fault>) -> RingAnswer {
    match result {
        Ok(payload) => RingAnswer { id, completion: Completion::Done(()), payload },
        Err(fault) => RingAnswer { id, completion: Completion::Failed(fault), payload: 0 },
    }
}

/// It is to be sent again.
pub(super) fn withdrawn(id: RequestId) -> RingAnswer {
    RingAnswer { id, completion: Completion::Withdrawn, payload: 0 }
}
