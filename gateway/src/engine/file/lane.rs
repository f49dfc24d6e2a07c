//! The quick path of a file: an io_uring of a link's own, whose operations read and write the memory that nebd shares. For a
//! request there is no future, no allocation and no copy; what a link has begun since it was polled goes to the kernel with one
//! call.
//!
//! Made by the file engine for each link, polled by the link's task. Knows: the file, its claims. Must not know: rings of links,
//! ids of requests. Invariants: `no_late_duplicate` (claims are held until the kernel has ended), `complete_once` (a ticket ends
//! once), `bounded` ([`FLIGHTS_MAX`]), `guest_cannot_crash_us` (foreign memory is touched by the kernel only, or where it is sealed).
#![allow(unsafe_code)]

mod flights;
mod reaper;
#[cfg(test)]
mod tests;

use super::uring::{self, Submitter};
use super::{Disk, Executor};
use crate::engine::{Ended, Lane};
use crate::shared::SharedData;
use flights::{Flight, Flights, Kind, Landed, Outcome};
use io_uring::IoUring;
use reaper::Leftover;
use rustix::io::Errno;
use spline_types::{BlockOp, BlockRequest, Fault};
use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Places in the submission queue: more than these go with the next call.
const SUBMISSIONS: u32 = 256;
/// Requests under way: as many as a link may have unanswered by default. More are for the general path.
const FLIGHTS_MAX: usize = 1024;

/// A link's way into a file.
pub(super) struct FileLane {
    disk: Arc<Disk>,
    /// There until it is dropped.
    work: Option<Work>,
}

struct Work {
    ring: AsyncFd<IoUring>,
    submitter: Submitter,
    flights: Flights,
    /// Slots that the kernel has not taken yet; the first `queued` of them are in the submission queue.
    todo: VecDeque<u32>,
    queued: usize,
    /// Of one look at the completions; kept for its memory.
    landed: Vec<Landed>,
    /// The ring has failed: nothing more is given to it, and everything is for the general path.
    broken: bool,
}

impl FileLane {
    /// A lane on the runtime of the caller; `None` if there is no io_uring here.
    pub(super) fn start(disk: &Arc<Disk>) -> Option<Self> {
        if !matches!(disk.executor, Executor::Ring(_)) {
            return None;
        }
        match Work::start(disk) {
            Ok(work) => Some(Self { disk: Arc::clone(disk), work: Some(work) }),
            Err(error) => {
                tracing::warn!(path = %disk.path.display(), %error, "no io_uring for a link, it is served the general way");
                None
            }
        }
    }

    /// What a request is here; `None` if it is for the general path.
    fn kind_of(&self, request: &BlockRequest, data: &SharedData) -> Option<Kind> {
        let kind = match request.op {
            BlockOp::Read => Kind::Read,
            BlockOp::Write => Kind::Write { durable: request.fua },
            BlockOp::Flush => Kind::Sync,
            _ => return None,
        };
        let fits = kind == Kind::Sync || (data.len() > 0 && data.len() as u64 == request.range.length());
        let refused = kind != Kind::Read && self.disk.poisoned.load(Ordering::Acquire);
        (fits && !refused).then_some(kind)
    }
}

impl Lane for FileLane {
    fn begin(&mut self, ticket: u32, request: &BlockRequest, data: SharedData) -> Result<(), SharedData> {
        let (Some(kind), Some(work)) = (self.kind_of(request, &data), &mut self.work) else {
            return Err(data);
        };
        let direct = kind != Kind::Sync && self.disk.is_direct(request.range);
        if work.broken || work.flights.is_full() || (direct && !self.disk.alignment.fits(data.pieces())) {
            return Err(data);
        }
        let alone = matches!(kind, Kind::Write { .. });
        let Some(claim) = self.disk.overlaps.claim(request.range, alone) else { return Err(data) };
        let mut flight = Flight::new(ticket, kind, request.range.offset(), claim, data);
        flight.direct = direct;
        work.todo.push_back(work.flights.add(flight));
        Ok(())
    }

    fn poll(&mut self, cx: &mut Context<'_>, ended: &mut Vec<Ended>) -> Poll<()> {
        let Some(work) = &mut self.work else { return Poll::Pending };
        work.poll(cx, &self.disk, ended)
    }

    fn is_idle(&self) -> bool {
        self.work.as_ref().is_none_or(|work| work.flights.is_empty())
    }
}

impl FileLane {
    /// Ends what the kernel has not been given, and has the rest waited for.
    fn give_up(&mut self) {
        let Some(Work { ring, mut flights, todo, .. }) = self.work.take() else { return };
        let unsent: Vec<Landed> =
            todo.into_iter().filter_map(|slot| flights.remove(slot, Err(Errno::CANCELED))).collect();
        self.disk.overlaps.release(unsent.into_iter().map(|landed| landed.claim));
        if !flights.is_empty() {
            Leftover { ring: ring.into_inner(), flights, disk: Arc::clone(&self.disk) }.reap();
        }
    }
}

impl Drop for FileLane {
    fn drop(&mut self) {
        self.give_up();
    }
}

impl Work {
    fn start(disk: &Disk) -> io::Result<Self> {
        // There is nowhere to go on from without a runtime.
        tokio::runtime::Handle::try_current().map_err(io::Error::other)?;
        let ring = uring::build(&disk.files, SUBMISSIONS, FLIGHTS_MAX as u32)?;
        // SAFETY: a ring owns its descriptor, and keeps it until it is dropped.
        let ring = unsafe { AsyncFd::register_with_interest(ring, Interest::READABLE) }?;
        Ok(Self {
            ring,
            submitter: Submitter::default(),
            flights: Flights::new(FLIGHTS_MAX),
            todo: VecDeque::new(),
            queued: 0,
            landed: Vec::new(),
            broken: false,
        })
    }

    /// Ready when anything has ended.
    fn poll(&mut self, cx: &mut Context<'_>, disk: &Disk, ended: &mut Vec<Ended>) -> Poll<()> {
        let before = ended.len();
        loop {
            if !self.todo.is_empty()
                && let Err(error) = self.launch(cx)
            {
                self.break_down(disk, &error, ended);
            }
            let todo = self.todo.len();
            self.land(disk, ended);
            if ended.len() > before {
                return Poll::Ready(());
            }
            if self.todo.len() > todo {
                continue;
            }
            match std::task::ready!(self.ring.poll_read_ready(cx)) {
                // What has ended since the look above made the descriptor ready anew, which this does not undo.
                Ok(mut guard) => guard.clear_ready(),
                Err(error) => {
                    self.break_down(disk, &error, ended);
                    return if ended.len() > before { Poll::Ready(()) } else { Poll::Pending };
                }
            }
        }
    }

    /// The ring can not be gone on with. What the kernel was not given fails; what it has it may still carry out: that is answered
    /// when it has ended, however long that takes, and its memory and claims are kept until then.
    fn break_down(&mut self, disk: &Disk, error: &io::Error, ended: &mut Vec<Ended>) {
        if std::mem::replace(&mut self.broken, true) {
            return;
        }
        // The kernel may have taken some before it failed.
        let taken = self.queued - self.ring.get_mut().submission().len();
        self.todo.drain(..taken);
        self.queued = 0;
        let unsent = self.todo.drain(..).filter_map(|slot| self.flights.remove(slot, Err(Errno::CANCELED)));
        let unsent: Vec<Landed> = unsent.collect();
        ended.extend(unsent.iter().map(|landed| (landed.ticket, Err(Fault::Internal))));
        disk.overlaps.release(unsent.into_iter().map(|landed| landed.claim));
        let under_way = self.flights.tickets().count();
        tracing::error!(path = %disk.path.display(), %error, under_way, "io_uring of a link does not go on, what it had not begun fails");
    }

    /// Gives the kernel what is to be done.
    fn launch(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        while !self.todo.is_empty() {
            self.fill();
            let taken = self.submitter.submit(self.ring.get_mut(), cx)?;
            if taken == self.todo.len() {
                self.todo.clear();
            } else {
                drop(self.todo.drain(..taken));
            }
            self.queued -= taken;
            if taken == 0 {
                // It is short of something, and has a pause.
                return Ok(());
            }
        }
        Ok(())
    }

    /// Puts as much as fits into the submission queue.
    fn fill(&mut self) {
        let mut submission = self.ring.get_mut().submission();
        for slot in self.todo.range(self.queued..) {
            let entry = self.flights.entry(*slot);
            // SAFETY: the entry's memory and vector are the flight's, which stays in its place in `flights` until its completion
            // is taken; a lane that is dropped before that gives them to a reaper.
            if unsafe { submission.push(&entry) }.is_err() {
                return;
            }
            self.queued += 1;
        }
    }

    /// Takes what has ended.
    fn land(&mut self, disk: &Disk, ended: &mut Vec<Ended>) {
        for entry in self.ring.get_mut().completion() {
            let slot = entry.user_data() as u32;
            match self.flights.land(slot, entry.result()) {
                Outcome::Landed(landed) => self.landed.push(landed),
                Outcome::Again if self.broken => {
                    self.landed.extend(self.flights.remove(slot, Err(Errno::CANCELED)))
                }
                Outcome::Again => self.todo.push_back(slot),
                Outcome::Unknown => {
                    tracing::error!(slot, "io_uring answered an operation that is not under way")
                }
            }
        }
        if self.landed.is_empty() {
            return;
        }
        ended.extend(self.landed.iter().map(|landed| (landed.ticket, landed.answer(disk))));
        disk.overlaps.release(self.landed.drain(..).map(|landed| landed.claim));
    }
}

impl Landed {
    fn answer(&self, disk: &Disk) -> Result<(), Fault> {
        self.result.map_err(|error| {
            let what = match self.kind {
                Kind::Read => "read",
                Kind::Write { .. } => "write",
                Kind::Sync => "sync",
            };
            if error == Errno::FAULT {
                // Whoever shared the memory has taken it away: nobody here must look, and the file is as good as before.
                tracing::debug!(path = %disk.path.display(), what, "memory of a request has vanished");
                return Fault::Internal;
            }
            if error == Errno::CANCELED {
                // The ring has failed, not the disk: told then.
                return Fault::Internal;
            }
            if matches!(self.kind, Kind::Sync | Kind::Write { durable: true }) {
                disk.poison();
            }
            disk.fault(what, error)
        })
    }
}
