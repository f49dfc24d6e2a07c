//! Disk operations by io_uring: one ring and one thread per file. Everything that was queued while the thread was
//! away is submitted with one call, and one eventfd write wakes it for a whole burst.
//!
//! Called by the file engine, which chooses between this and threads when it opens a file.
#![allow(unsafe_code)]

use super::job::{Action, Descriptors, Job};
use io_uring::{IoUring, Probe, opcode, squeue, types};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;
use tokio::sync::oneshot;

/// Operations in the kernel at once; more wait in the thread's backlog. As deep as fast disks like it.
const DEPTH: u32 = 256;
/// Marks the completion of the read on the eventfd; no slot has this number.
const WAKE: u64 = u64::MAX;
/// Place of each descriptor in the ring's table.
const BUFFERED: u32 = 0;
const DIRECT: u32 = 1;
/// Longest transfer of one operation, bytes; the kernel cuts at a little less than 2 GiB, requests are far smaller.
const TRANSFER_MAX: usize = 1 << 30;

/// A ring that serves one file.
pub(super) struct Ring {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    state: Mutex<State>,
    /// Wakes the thread out of the kernel.
    wake: OwnedFd,
}

#[derive(Default)]
struct State {
    /// Bounded by admission: each job belongs to an admitted request.
    jobs: Vec<Job>,
    /// The thread is in the kernel, or about to be, and must be woken for a new job.
    asleep: bool,
    closed: bool,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // Can fail only when the counter is full, and then the thread is being woken.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

impl Ring {
    /// Starts a ring, if the kernel has one that can do all that is needed.
    ///
    /// # Errors
    /// Why not; threads serve instead.
    pub(super) fn start(files: &Arc<Descriptors>) -> io::Result<Self> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC)?;
        let shared = Arc::new(Shared { state: Mutex::default(), wake });
        let (told, tell) = (mpsc::channel(), Arc::clone(&shared));
        let (files, started) = (Arc::clone(files), told.0);
        let thread = std::thread::Builder::new().name("file-ring".into()).spawn(move || {
            // Made here: a ring of one issuer belongs to the thread that made it.
            match build(&files) {
                Ok(ring) => {
                    drop(started.send(Ok(())));
                    Reactor::new(ring, tell, files).run();
                }
                Err(error) => drop(started.send(Err(error))),
            }
        })?;
        told.1.recv().map_err(|_| io::Error::other("ring thread has died"))??;
        Ok(Self { shared, thread: Mutex::new(Some(thread)) })
    }

    /// Queues a job; after the close it is dropped, which its owner is told.
    pub(super) fn submit(&self, job: Job) {
        let mut state = self.shared.state();
        if state.closed {
            return;
        }
        state.jobs.push(job);
        let asleep = std::mem::take(&mut state.asleep);
        drop(state);
        if asleep {
            self.shared.wake();
        }
    }

    /// Does what is queued and ends the thread. Blocks.
    pub(super) fn close(&self) {
        self.shared.state().closed = true;
        self.shared.wake();
        if let Some(thread) = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take() {
            let _ = thread.join();
        }
    }
}

fn build(files: &Descriptors) -> io::Result<IoUring> {
    let modern = IoUring::builder().setup_single_issuer().setup_defer_taskrun().build(DEPTH);
    // Kernels before 6.1 know neither flag.
    let ring = modern.or_else(|_| IoUring::new(DEPTH))?;
    let mut probe = Probe::new();
    ring.submitter().register_probe(&mut probe)?;
    let needed = [opcode::Read::CODE, opcode::Write::CODE, opcode::Fsync::CODE, opcode::Fallocate::CODE];
    if !needed.iter().all(|code| probe.is_supported(*code)) {
        return Err(io::ErrorKind::Unsupported.into());
    }
    let buffered = files.buffered.as_raw_fd();
    let table: [RawFd; 2] = [buffered, files.direct.as_ref().map_or(buffered, AsRawFd::as_raw_fd)];
    ring.submitter().register_files(&table)?;
    Ok(ring)
}

/// A job in the kernel, and how many of its bytes are moved.
struct Flight {
    job: Job,
    moved: usize,
}

/// The thread's side: the only owner of the ring and of every job in it.
struct Reactor {
    ring: IoUring,
    shared: Arc<Shared>,
    flights: Vec<Option<Flight>>,
    free: Vec<usize>,
    backlog: VecDeque<Flight>,
    /// Where the kernel puts the eventfd's counter; boxed, so that it stays where it is.
    woken: Box<[u8; 8]>,
    /// The eventfd is being read.
    listening: bool,
    _files: Arc<Descriptors>,
}

impl Reactor {
    fn new(ring: IoUring, shared: Arc<Shared>, files: Arc<Descriptors>) -> Self {
        // One place in the ring is for the eventfd.
        let slots = DEPTH as usize - 1;
        Self {
            ring,
            shared,
            flights: (0..slots).map(|_| None).collect(),
            free: (0..slots).rev().collect(),
            backlog: VecDeque::new(),
            woken: Box::default(),
            listening: false,
            _files: files,
        }
    }

    fn run(mut self) {
        let mut fresh = Vec::new();
        loop {
            let closed = {
                let mut state = self.shared.state();
                std::mem::swap(&mut state.jobs, &mut fresh);
                // Whoever queues from now on wakes the kernel's wait below.
                state.asleep = true;
                state.closed
            };
            self.backlog.extend(fresh.drain(..).map(|job| Flight { job, moved: 0 }));
            if !closed {
                self.listen();
            }
            self.launch();
            let idle = self.free.len() == self.flights.len();
            // Nothing is queued after the close, and the close has written to the eventfd: its read will end.
            if closed && idle && !self.listening {
                return;
            }
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The completion queue is full: taking from it helps.
                Err(error) if error.raw_os_error() == Some(Errno::BUSY.raw_os_error()) => {}
                Err(error) => {
                    tracing::error!(%error, "io_uring does not take operations, file requests fail");
                    return self.abandon();
                }
            }
            self.shared.state().asleep = false;
            self.land();
        }
    }

    /// Fails everything; the kernel may still use the buffers of what is in flight, so that none may be freed.
    fn abandon(mut self) {
        let mut state = self.shared.state();
        state.closed = true;
        state.jobs.clear();
        drop(state);
        self.backlog.clear();
        for flight in self.flights.iter_mut().flatten() {
            let (nobody, _) = oneshot::channel();
            drop(std::mem::replace(&mut flight.job.done, nobody));
        }
        std::mem::forget(self);
    }

    /// Has the eventfd read, unless it is being read.
    fn listen(&mut self) {
        if !self.listening {
            self.listening = true;
            let fd = types::Fd(self.shared.wake.as_raw_fd());
            let entry = opcode::Read::new(fd, self.woken.as_mut_ptr(), 8).build().user_data(WAKE);
            self.push(&entry);
        }
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
        // SAFETY: the entry's memory is the flight's buffer or `woken`: both stay in place, and alive until the
        // completion is taken, in `flights` and `self`, which a failing ring leaks rather than frees.
        let pushed = unsafe { self.ring.submission().push(entry) };
        // One entry per slot and one for the eventfd: no more than the queue has room for.
        pushed.expect("the submission queue has a place for every slot");
    }

    /// Takes what has ended.
    fn land(&mut self) {
        let mut ended: [(u64, i32); 64] = [(0, 0); 64];
        loop {
            let mut count = 0;
            for (place, entry) in ended.iter_mut().zip(self.ring.completion()) {
                *place = (entry.user_data(), entry.result());
                count += 1;
            }
            for &(user_data, result) in &ended[..count] {
                self.landed(user_data, result);
            }
            if count < ended.len() {
                return;
            }
        }
    }

    fn landed(&mut self, user_data: u64, result: i32) {
        if user_data == WAKE {
            self.listening = false;
            return;
        }
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
