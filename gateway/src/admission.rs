//! How much of a volume's work may be in flight: requests and bytes. A permit is taken before a request's payload is
//! even read, and given back by dropping it, once the reply has left.
//!
//! Called by links. Invariant: `bounded`.

use futures_util::future::BoxFuture;
use std::sync::Arc;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The limits of one volume, shared by its links; first come, first served.
pub(crate) struct Admission {
    requests: Arc<Semaphore>,
    bytes: Arc<Semaphore>,
    requests_max: usize,
    bytes_max: u64,
}

/// The right to have one request in flight.
pub(crate) struct Permit {
    _request: OwnedSemaphorePermit,
    _bytes: OwnedSemaphorePermit,
}

impl Admission {
    pub(crate) fn new(requests_max: usize, bytes_max: u64) -> Self {
        Self {
            requests: Arc::new(Semaphore::new(requests_max)),
            bytes: Arc::new(Semaphore::new(bytes_max as usize)),
            requests_max,
            bytes_max,
        }
    }

    /// A permit for a request with `bytes` of data, if there is room now.
    pub(crate) fn try_acquire(&self, bytes: u32) -> Option<Permit> {
        let request = Arc::clone(&self.requests).try_acquire_owned().ok()?;
        let bytes = Arc::clone(&self.bytes).try_acquire_many_owned(bytes).ok()?;
        Some(Permit { _request: request, _bytes: bytes })
    }

    /// A permit once there is room. `bytes` is at most the limit on bytes, which a checked config and a checked
    /// request see to.
    pub(crate) fn acquire(&self, bytes: u32) -> BoxFuture<'static, Permit> {
        let (requests, pool) = (Arc::clone(&self.requests), Arc::clone(&self.bytes));
        Box::pin(async move {
            let open = "these semaphores are never closed";
            let request = requests.acquire_owned().await.expect(open);
            Permit { _request: request, _bytes: pool.acquire_many_owned(bytes).await.expect(open) }
        })
    }

    /// Requests and bytes in flight now.
    pub(crate) fn inflight(&self) -> (u64, u64) {
        let requests = self.requests_max - self.requests.available_permits();
        (requests as u64, self.bytes_max - self.bytes.available_permits() as u64)
    }

    /// Most requests.
    pub(crate) const fn requests_max(&self) -> usize {
        self.requests_max
    }

    /// Most bytes.
    pub(crate) const fn bytes_max(&self) -> u64 {
        self.bytes_max
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
}
