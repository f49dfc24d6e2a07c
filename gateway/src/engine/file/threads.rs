//! Disk operations by a pool of threads with plain system calls: for kernels and containers without io_uring.
//!
//! Called by the file engine, which chooses between this and the ring when it opens a file.

use super::job::{Descriptors, Job};
use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// Threads per file: enough to keep a solid-state disk busy.
const THREADS: usize = 16;

/// A pool that serves one file.
pub(super) struct Threads {
    queue: Arc<Queue>,
    handles: Mutex<Vec<JoinHandle<()>>>,
}

#[derive(Default)]
struct Queue {
    /// Bounded by admission: each job belongs to an admitted request.
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    closed: bool,
}

impl Queue {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next job; `None` when the pool is closed and everything is done.
    fn next(&self) -> Option<Job> {
        let mut state = self.state();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                return Some(job);
            }
            if state.closed {
                return None;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Threads {
    pub(super) fn start(files: &Arc<Descriptors>) -> io::Result<Self> {
        let queue = Arc::new(Queue::default());
        let pool = Self { queue: Arc::clone(&queue), handles: Mutex::default() };
        for _ in 0..THREADS {
            let (queue, files) = (Arc::clone(&queue), Arc::clone(files));
            let serve = move || {
                while let Some(job) = queue.next() {
                    job.perform(&files);
                }
            };
            match std::thread::Builder::new().name("file-io".into()).spawn(serve) {
                Ok(handle) => pool.handles.lock().unwrap_or_else(PoisonError::into_inner).push(handle),
                Err(error) => {
                    pool.close();
                    return Err(error);
                }
            }
        }
        Ok(pool)
    }

    /// Queues a job; after the close it is dropped, which its owner is told.
    pub(super) fn submit(&self, job: Job) {
        let mut state = self.queue.state();
        if !state.closed {
            state.jobs.push_back(job);
            self.queue.changed.notify_one();
        }
    }

    /// Does what is queued and ends the threads. Blocks.
    pub(super) fn close(&self) {
        self.queue.state().closed = true;
        self.queue.changed.notify_all();
        let handles = std::mem::take(&mut *self.handles.lock().unwrap_or_else(PoisonError::into_inner));
        for handle in handles {
            let _ = handle.join();
        }
    }
}
