//! Disk operations by io_uring: one ring and one task per file. What a link queued in one go is submitted with one
//! call, by the thread that queued it; the ring's descriptor tells the runtime of completions, so that no thread waits
//! for them alone.
//!
//! Called by the file engine, which chooses between this and threads when it opens a file.
#![allow(unsafe_code)]

use super::job::{Action, Descriptors, Job};
use super::uring::{self, BUFFERED, DIRECT, Submitter};
use futures_util::task::AtomicWaker;
use io_uring::{IoUring, opcode, squeue, types};
use rustix::io::Errno;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::task::{Context, Poll, ready};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::oneshot;

/// Operations in the kernel at once; more wait in the task's backlog. As deep as fast disks like it.
const DEPTH: u32 = 256;
/// Longest transfer of one operation, bytes; the kernel cuts at a little less than 2 GiB, requests are far smaller.
const TRANSFER_MAX: usize = 1 << 30;
/// Looks at new jobs and completions in one go; then others of the runtime's thread have their turn.
const TURNS_MAX: usize = 16;

/// A ring that serves one file.
pub(super) struct Ring {
    shared: Arc<Shared>,
    /// Told when the task has ended with everything done; disconnected if it ended otherwise.
    ended: Mutex<mpsc::Receiver<()>>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// The task, when it sleeps.
    task: AtomicWaker,
}

#[derive(Default)]
struct State {
    /// Bounded by admission: each job belongs to an admitted request.
    jobs: Vec<Job>,
    closed: bool,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ring {
    /// Starts a ring on the runtime of the caller, if the kernel has one that can do all that is needed.
    ///
    /// # Errors
    /// Why not; threads serve instead.
    pub(super) fn start(files: &Arc<Descriptors>) -> io::Result<Self> {
        let runtime = tokio::runtime::Handle::try_current().map_err(io::Error::other)?;
        let ring = uring::build(files, DEPTH, 2 * DEPTH)?;
        // SAFETY: a ring owns its descriptor, and keeps it until it is dropped.
        let ring = unsafe { AsyncFd::register_with_interest(ring, Interest::READABLE) }?;
        let shared = Arc::new(Shared::default());
        let (end, ended) = mpsc::channel();
        let mut reactor = Reactor::new(ring, Arc::clone(&shared), Arc::clone(files));
        runtime.spawn(async move {
            if poll_fn(|cx| reactor.poll(cx)).await.is_ok() {
                drop(reactor);
                // Nobody may want to know.
                let _ = end.send(());
            }
        });
        Ok(Self { shared, ended: Mutex::new(ended) })
    }

    /// Queues a job; after the close it is dropped, which its owner is told.
    pub(super) fn submit(&self, job: Job) {
        let mut state = self.shared.state();
        if state.closed {
            return;
        }
        state.jobs.push(job);
        drop(state);
        self.shared.task.wake();
    }

    /// Does what is queued and ends the task. Blocks. False if operations may still be under way in the kernel: the task
    /// ended by an error, or with its runtime.
    pub(super) fn close(&self) -> bool {
        self.shared.state().closed = true;
        self.shared.task.wake();
        self.ended.lock().unwrap_or_else(PoisonError::into_inner).recv().is_ok()
    }
}

/// A job in the kernel, and how many of its bytes are moved.
struct Flight {
    job: Job,
    moved: usize,
}

/// The task's side: the only owner of the ring and of every job in it.
struct Reactor {
    ring: AsyncFd<IoUring>,
    shared: Arc<Shared>,
    flights: Vec<Option<Flight>>,
    free: Vec<usize>,
    backlog: VecDeque<Flight>,
    /// Swapped with the queue of new jobs, so that both keep their memory.
    fresh: Vec<Job>,
    submitter: Submitter,
    _files: Arc<Descriptors>,
}

impl Reactor {
    fn new(ring: AsyncFd<IoUring>, shared: Arc<Shared>, files: Arc<Descriptors>) -> Self {
        let slots = DEPTH as usize;
        Self {
            ring,
            shared,
            flights: (0..slots).map(|_| None).collect(),
            free: (0..slots).rev().collect(),
            backlog: VecDeque::new(),
            fresh: Vec::new(),
            submitter: Submitter::default(),
            _files: files,
        }
    }

    /// Ready when the ring is closed and everything is done, or with the reason why the kernel does not go on.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.shared.task.register(cx.waker());
        for _ in 0..TURNS_MAX {
            let closed = self.take_jobs();
            self.launch();
            if let Err(error) = self.submitter.submit(self.ring.get_mut(), cx) {
                tracing::error!(%error, "io_uring does not go on, requests fail; end the file's exports and begin anew");
                return Poll::Ready(Err(error));
            }
            if self.land() {
                continue;
            }
            let idle = self.free.len() == self.flights.len() && self.backlog.is_empty();
            if closed && idle {
                return Poll::Ready(Ok(()));
            }
            match ready!(self.ring.poll_read_ready(cx)) {
                // What has ended since the look above made the descriptor ready anew, which this does not undo.
                Ok(mut guard) => guard.clear_ready(),
                Err(error) => {
                    tracing::error!(%error, "io_uring can not be waited for, requests fail; end the file's exports and begin anew");
                    return Poll::Ready(Err(error));
                }
            }
        }
        // Others of this thread have their turn.
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Puts new jobs into the backlog; answers whether there will be no more.
    fn take_jobs(&mut self) -> bool {
        let mut state = self.shared.state();
        std::mem::swap(&mut state.jobs, &mut self.fresh);
        let closed = state.closed;
        drop(state);
        self.backlog.extend(self.fresh.drain(..).map(|job| Flight { job, moved: 0 }));
        closed
    }

    /// Puts the backlog into the submission queue.
    fn launch(&mut self) {
        while let (Some(slot), false) = (self.free.last().copied(), self.backlog.is_empty()) {
            let Some(mut flight) = self.backlog.pop_front() else { return };
            let entry = entry_of(&mut flight).user_data(slot as u64);
            self.free.pop();
            self.flights[slot] = Some(flight);
            self.push(&entry);
        }
    }

    fn push(&mut self, entry: &squeue::Entry) {
        // SAFETY: the entry's memory is the flight's buffer, which stays in place, and alive until the completion is
        // taken, in `flights`: a reactor that is dropped before that leaks it.
        let pushed = unsafe { self.ring.get_mut().submission().push(entry) };
        // One entry per slot: no more than the queue has room for.
        pushed.expect("the submission queue has a place for every slot");
    }

    /// Takes what has ended; answers whether anything had.
    fn land(&mut self) -> bool {
        let mut ended: [(u64, i32); 64] = [(0, 0); 64];
        let mut any = false;
        loop {
            let mut count = 0;
            for (place, entry) in ended.iter_mut().zip(self.ring.get_mut().completion()) {
                *place = (entry.user_data(), entry.result());
                count += 1;
            }
            for &(user_data, result) in &ended[..count] {
                self.landed(user_data, result);
            }
            any |= count > 0;
            if count < ended.len() {
                return any;
            }
        }
    }

    fn landed(&mut self, user_data: u64, result: i32) {
        let slot = user_data as usize;
        let Some(mut flight) = self.flights.get_mut(slot).and_then(Option::take) else {
            return tracing::error!(user_data, "io_uring answered an operation that is not under way");
        };
        self.free.push(slot);
        let length = flight.job.length();
        if let Ok(step) = usize::try_from(result) {
            flight.moved += step;
            if flight.moved >= length {
                flight.job.finish(Ok(()));
            } else if step > 0 {
                self.backlog.push_front(flight);
            } else {
                let reads = matches!(flight.job.action, Action::Read(_));
                flight.job.zero_from(flight.moved);
                flight.job.finish(if reads { Ok(()) } else { Err(Errno::IO) });
            }
            return;
        }
        match Errno::from_raw_os_error(-result) {
            Errno::INTR | Errno::AGAIN => self.backlog.push_front(flight),
            error => flight.job.finish(Err(error)),
        }
    }
}

impl Drop for Reactor {
    /// Fails everything; the kernel may still use the buffers of what is in flight, so that none may be freed.
    fn drop(&mut self) {
        let mut state = self.shared.state();
        state.closed = true;
        state.jobs.clear();
        drop(state);
        for mut flight in self.flights.drain(..).flatten() {
            let (nobody, _) = oneshot::channel();
            drop(std::mem::replace(&mut flight.job.done, nobody));
            std::mem::forget(flight);
        }
    }
}

/// The entry for what is left of a flight.
fn entry_of(flight: &mut Flight) -> squeue::Entry {
    let direct = flight.job.is_direct_from(flight.moved);
    let fd = types::Fixed(if direct { DIRECT } else { BUFFERED });
    let (moved, range) = (flight.moved, flight.job.range);
    let at = range.offset() + moved as u64;
    match &mut flight.job.action {
        Action::Read(buffer) => {
            let rest = &mut buffer.as_mut_slice()[moved..];
            let length = rest.len().min(TRANSFER_MAX) as u32;
            opcode::Read::new(fd, rest.as_mut_ptr(), length).offset(at).build()
        }
        Action::Write { data, durable } => {
            let rest = &data[moved..];
            let length = rest.len().min(TRANSFER_MAX) as u32;
            let flags = if *durable { rustix::io::ReadWriteFlags::DSYNC.bits() } else { 0 };
            opcode::Write::new(fd, rest.as_ptr(), length).offset(at).rw_flags(flags as i32).build()
        }
        Action::Sync => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
        Action::Allocate(flags) => opcode::Fallocate::new(fd, range.length())
            .offset(range.offset())
            .mode(flags.bits() as i32)
            .build(),
    }
}
