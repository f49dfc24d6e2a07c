//! How much of a volume's work may be in flight: requests and bytes. A permit is taken before a request's payload is
//! even read, and given back by dropping it, once the reply has left.
//!
//! Called by links, for every request: one atomic step to take a permit and one to give it back, and a lock only while
//! somebody waits. Invariant: `bounded`.

use futures_util::future::BoxFuture;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::oneshot;

/// What is in flight is one number: the bytes in its lower bits, the requests above them.
const BYTES_BITS: u32 = 40;
const ONE_REQUEST: u64 = 1 << BYTES_BITS;

/// The limits of one volume, shared by its links; first come, first served.
pub(crate) struct Admission(Arc<Limits>);

struct Limits {
    requests_max: u64,
    bytes_max: u64,
    inflight: AtomicU64,
    /// How many wait; while there are any, nobody passes them.
    waiting: AtomicUsize,
    queue: Mutex<VecDeque<Waiter>>,
}

struct Waiter {
    bytes: u32,
    ready: oneshot::Sender<Permit>,
}

/// The right to have one request in flight.
pub(crate) struct Permit {
    limits: Arc<Limits>,
    bytes: u32,
}

impl Limits {
    fn queue(&self) -> MutexGuard<'_, VecDeque<Waiter>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, bytes: u32) -> bool {
        let with_one_more = |inflight: u64| {
            let (requests, used) = (inflight / ONE_REQUEST, inflight % ONE_REQUEST);
            let fits = requests < self.requests_max && used + u64::from(bytes) <= self.bytes_max;
            fits.then_some(inflight + ONE_REQUEST + u64::from(bytes))
        };
        self.inflight.fetch_update(Ordering::SeqCst, Ordering::SeqCst, with_one_more).is_ok()
    }

    fn wait(&self, bytes: u32) -> oneshot::Receiver<Permit> {
        let (ready, granted) = oneshot::channel();
        let mut queue = self.queue();
        queue.push_back(Waiter { bytes, ready });
        self.waiting.store(queue.len(), Ordering::SeqCst);
        granted
    }

    /// Whoever gives back looks here afterwards, and whoever waits has said so before he looked at what is in flight: one of
    /// them sees the other.
    fn grant(self: &Arc<Self>) {
        let mut granted = Vec::new();
        let mut queue = self.queue();
        while let Some(first) = queue.front() {
            // Whoever does not wait any more is passed over. Asked once: who goes after that gives back what was taken for it.
            let gone = first.ready.is_closed();
            if !gone && !self.take(first.bytes) {
                break;
            }
            granted.extend(queue.pop_front().filter(|_| !gone));
        }
        self.waiting.store(queue.len(), Ordering::SeqCst);
        drop(queue);
        for Waiter { bytes, ready } in granted {
            // One who has just gone gives it back at once.
            drop(ready.send(Permit { limits: Arc::clone(self), bytes }));
        }
    }
}

impl Admission {
    /// At most `requests_max`, with `bytes_max` bytes of data together; a checked config has far fewer than can be counted.
    pub(crate) fn new(requests_max: usize, bytes_max: u64) -> Self {
        Self(Arc::new(Limits {
            requests_max: (requests_max as u64).min(u64::MAX / ONE_REQUEST),
            bytes_max: bytes_max.min(ONE_REQUEST - 1),
            inflight: AtomicU64::new(0),
            waiting: AtomicUsize::new(0),
            queue: Mutex::default(),
        }))
    }

    /// A permit for a request with `bytes` of data, if there is room now.
    pub(crate) fn try_acquire(&self, bytes: u32) -> Option<Permit> {
        let first_come = self.0.waiting.load(Ordering::SeqCst) == 0;
        (first_come && self.0.take(bytes)).then(|| Permit { limits: Arc::clone(&self.0), bytes })
    }

    /// A permit once there is room. `bytes` is at most the limit on bytes, which a checked config and a checked
    /// request see to.
    pub(crate) fn acquire(&self, bytes: u32) -> BoxFuture<'static, Permit> {
        let limits = Arc::clone(&self.0);
        Box::pin(async move {
            let granted = limits.wait(bytes);
            limits.grant();
            granted.await.expect("whoever waits is granted when there is room")
        })
    }

    /// Requests and bytes in flight now.
    pub(crate) fn inflight(&self) -> (u64, u64) {
        let inflight = self.0.inflight.load(Ordering::Relaxed);
        (inflight / ONE_REQUEST, inflight % ONE_REQUEST)
    }

    /// Most requests.
    pub(crate) fn requests_max(&self) -> usize {
        self.0.requests_max as usize
    }

    /// Most bytes.
    pub(crate) fn bytes_max(&self) -> u64 {
        self.0.bytes_max
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.limits.inflight.fetch_sub(ONE_REQUEST + u64::from(self.bytes), Ordering::SeqCst);
        if self.limits.waiting.load(Ordering::SeqCst) > 0 {
            self.limits.grant();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    #[test]
    fn permits_come_back_when_dropped() {
        let admission = Admission::new(2, 100);
        let first = admission.try_acquire(60).expect("room");
        assert!(admission.try_acquire(60).is_none(), "bytes are limited");
        assert_eq!(admission.inflight(), (1, 60), "a refused attempt keeps nothing");
        let second = admission.try_acquire(0).expect("room");
        assert!(admission.try_acquire(0).is_none(), "requests are limited");
        let mut waiting = admission.acquire(100);
        assert!((&mut waiting).now_or_never().is_none());
        drop((first, second));
        assert!(waiting.now_or_never().is_some());
        assert_eq!(admission.inflight(), (0, 0));
    }

    #[test]
    fn whoever_waits_is_not_overtaken_and_one_that_goes_blocks_nobody() {
        let admission = Admission::new(8, 100);
        let held = admission.try_acquire(90).expect("room");
        let mut large = admission.acquire(50);
        let mut small = admission.acquire(10);
        assert!((&mut large).now_or_never().is_none() && (&mut small).now_or_never().is_none());
        assert!(admission.try_acquire(1).is_none(), "comes after those who wait");
        drop(large);
        // The next step of anybody passes it over.
        let mut last = admission.acquire(0);
        let last = (&mut last).now_or_never().expect("room");
        let small = small.now_or_never().expect("room");
        assert_eq!(admission.inflight(), (3, 100));
        drop((held, small, last));
        assert_eq!(admission.inflight(), (0, 0));
        assert!(admission.try_acquire(100).is_some());
    }

    #[test]
    fn many_threads_stay_within_the_limits_and_all_are_served() {
        let admission = Arc::new(Admission::new(3, 100));
        let (now, rounds) = (Arc::new(AtomicU64::new(0)), 2_000);
        let threads: Vec<_> = (0..4u32)
            .map(|thread| {
                let (admission, now) = (Arc::clone(&admission), Arc::clone(&now));
                std::thread::spawn(move || {
                    for round in 0..rounds {
                        let bytes = 20 + (thread * 7 + round) % 60;
                        let permit = match admission.try_acquire(bytes) {
                            Some(permit) => permit,
                            None => block_on(admission.acquire(bytes)),
                        };
                        let used = now.fetch_add(u64::from(bytes), Ordering::SeqCst) + u64::from(bytes);
                        assert!(used <= 100, "{used}");
                        now.fetch_sub(u64::from(bytes), Ordering::SeqCst);
                        drop(permit);
                    }
                })
            })
            .collect();
        for thread in threads {
            thread.join().expect("is served");
        }
        assert_eq!(admission.inflight(), (0, 0));
    }

    #[test]
    fn whoever_goes_while_it_is_granted_keeps_nothing() {
        let admission = Arc::new(Admission::new(1, 100));
        let over = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let impatient = {
            let (admission, over) = (Arc::clone(&admission), Arc::clone(&over));
            std::thread::spawn(move || {
                while !over.load(Ordering::SeqCst) {
                    drop(admission.acquire(1).now_or_never());
                }
            })
        };
        for _ in 0..200_000 {
            drop(block_on_briefly(&admission));
        }
        over.store(true, Ordering::SeqCst);
        impatient.join().expect("ends");
        drop(admission.acquire(0).now_or_never());
        assert_eq!(admission.inflight(), (0, 0), "nothing is lost");
    }

    /// A permit, asked for until there is one.
    fn block_on_briefly(admission: &Admission) -> Permit {
        let since = std::time::Instant::now();
        loop {
            if let Some(permit) = admission.try_acquire(1).or_else(|| admission.acquire(1).now_or_never()) {
                return permit;
            }
            assert!(since.elapsed() < std::time::Duration::from_secs(20), "a permit was lost");
            std::thread::yield_now();
        }
    }

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        runtime.block_on(future)
    }
}
