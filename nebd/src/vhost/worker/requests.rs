//! Chains become requests, and requests are answered.
//!
//! Part of the worker. `complete_once`: a chain that was fetched is admitted to the in-flight table or answered here at once.
//! `bounded`: nothing is fetched that finds no place in the table. Must not know: the link.

use super::served::Served;
use super::{FETCHES_PER_TURN, SPARE_SEGMENTS_MAX, Worker};
use crate::inflight::Entry;
use crate::vhost::queue::{Chain, QueueError};
use crate::vhost::request::{self, Wish, understand};
use crate::vhost::status::{BlkStatus, blk_status};
use crate::vhost::stream::{Asked, GuestRequest};
use spline_link::ring::PIECES_MAX;
use spline_types::limits::VOLUME_INFLIGHT_REQUESTS;
use spline_types::{BlockOp, ByteRange, Fault, Invalid};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// A request in more pieces than a link carries: more than a device announces.
const TOO_LARGE: Fault = Fault::Invalid(Invalid::TooLarge);

fn pieces_of(chain: &Chain) -> usize {
    chain.readable.len().max(chain.writable.len())
}

impl Worker {
    /// Whether the table has room for more.
    pub(super) fn fetch_all(&mut self) -> bool {
        if !self.known && !self.lost {
            return false;
        }
        let mut broken = Vec::new();
        let mut chain = std::mem::take(&mut self.chain);
        let mut room = true;
        let mut queues = std::mem::take(&mut self.queues);
        for (number, served) in &mut queues {
            for _ in 0..FETCHES_PER_TURN {
                room = self.table.has_room(BlockOp::Flush, ByteRange::EMPTY);
                if !room || !served.is_open() {
                    break;
                }
                served.queue.ignore();
                match served.queue.fetch(&mut chain).and_then(|any| {
                    if any { self.take(*number, served, &mut chain).map(|()| true) } else { Ok(false) }
                }) {
                    Ok(true) => served.outside_since = None,
                    Ok(false) => break,
                    Err(QueueError::Outside(_)) if served.may_come(self.now) => break,
                    Err(why) => {
                        broken.push((*number, why));
                        break;
                    }
                }
            }
        }
        (self.chain, self.queues) = (chain, queues);
        for (queue, why) in broken {
            self.break_down(queue, why);
        }
        room
    }

    /// Admits a chain that was fetched, or answers it at once.
    pub(super) fn take(
        &mut self,
        number: u16,
        served: &mut Served,
        chain: &mut Chain,
    ) -> Result<(), QueueError> {
        let memory = Arc::clone(served.queue.memory());
        self.setup.export.geometry.size = self.setup.size.load(Ordering::Acquire);
        let understood = match memory.is_damaged() {
            true => Err(QueueError::Truncated),
            false => understand(chain, &memory, &self.setup.export, served.writethrough),
        };
        let (wish, status) = understood.inspect_err(|_| served.queue.forget(chain.head))?;
        let wish = if pieces_of(chain) > PIECES_MAX { Wish::Refused(TOO_LARGE) } else { wish };
        let fenced = self.lost || served.fenced > 0;
        served.fenced = served.fenced.saturating_sub(1);
        let (written, outcome) = match wish {
            Wish::Block { op, range, fua } if !fenced => {
                let mut data = self.spare.pop().unwrap_or_default();
                std::mem::swap(
                    &mut data,
                    if op == BlockOp::Read { &mut chain.writable } else { &mut chain.readable },
                );
                let guest =
                    GuestRequest { queue: number, head: chain.head, memory, data, status, abandoned: false };
                self.table.admit((op, range, fua), Asked::Guest(guest), self.now);
                if let Some(answered) = self.answered.take() {
                    self.polling.learn(self.now.saturating_duration_since(answered));
                }
                return Ok(());
            }
            Wish::Block { .. } => (0, Err(Fault::Fenced)),
            Wish::Serial => {
                memory.log(&chain.writable, &memory);
                (request::write_serial(&memory, &chain.writable, &self.setup.serial), Ok(()))
            }
            Wish::Nothing => (0, Ok(())),
            Wish::Refused(fault) => (0, Err(fault)),
        };
        if let Err(fault) = outcome {
            self.setup.metrics.refused(fault);
        }
        request::answer(&memory, status, outcome.map_or_else(blk_status, |()| BlkStatus::Ok));
        memory.log(&[status], &memory);
        served.queue.add_used(chain.head, written + 1);
        Ok(())
    }

    /// Answers a request that has left the table, unless nobody waits for it any more.
    pub(super) fn answer(&mut self, entry: Entry<Asked>, mut result: Result<(), Fault>) {
        let Asked::Guest(mut guest) = entry.context else { return };
        let request = &entry.request;
        if request.op == BlockOp::Write && guest.memory.is_damaged() {
            // What was written may be the zeros that took the place of what vanished.
            result = Err(Fault::Internal);
        }
        self.setup.metrics.answered(request.op, request.range.length(), self.now - entry.started, &result);
        if !guest.abandoned
            && let Some(served) = self.queues.get_mut(&guest.queue)
        {
            let read = if request.op == BlockOp::Read && result.is_ok() { request.range.length() } else { 0 };
            request::answer(&guest.memory, guest.status, result.map_or_else(blk_status, |()| BlkStatus::Ok));
            // The log is that of the memory as it is now: a migration may have begun meanwhile.
            let now = served.queue.memory();
            if read > 0 {
                now.log(&guest.data, &guest.memory);
            }
            now.log(&[guest.status], &guest.memory);
            // A read has at most 32 MiB.
            served.queue.add_used(guest.head, read as u32 + 1);
        }
        if guest.data.capacity() <= SPARE_SEGMENTS_MAX && self.spare.len() < VOLUME_INFLIGHT_REQUESTS {
            guest.data.clear();
            self.spare.push(guest.data);
        }
    }
}
