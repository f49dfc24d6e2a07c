//! Places in the log's queue for what this host proposes: taken before openraft sees a proposal, given back once the log
//! has written it, or when it is refused on the way.
//!
//! Called by `group` (taking) and `log_store` (giving back). An entry that openraft has accepted must find room in the log:
//! a refusal there ends the replica. So who would overfill the queue waits here. What peers send has a share of its own
//! (`network::intake`). `bounded`.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::command::LogCommand;

/// Bytes that an entry takes in the queue beside its command: record and entry headers, its place in memory.
pub(crate) const ENTRY_COST: u64 = 128;
/// Longest wait for a place. A log that does not get through its queue in that time is better told to who proposes.
const WAIT_MAX: Duration = Duration::from_secs(2);

/// The share of a log's queue that proposals may take, and again what peers send may: three eighths each. The rest is for
/// what nobody asks a place for: votes, purges, membership, a new leader's first entry.
pub(crate) fn share(queue_bytes: u64) -> u64 {
    queue_bytes / 8 * 3
}

/// A host's places for proposals, in bytes.
#[derive(Debug)]
pub(crate) struct Places {
    free: Arc<Semaphore>,
    limit: u32,
}

/// Held by a proposal until the log has written it.
#[derive(Debug)]
pub(crate) struct Place(OwnedSemaphorePermit);

impl Places {
    /// Places of `limit` bytes together; one larger proposal takes them all.
    pub(crate) fn new(limit: u64) -> Places {
        let limit = u32::try_from(limit).unwrap_or(u32::MAX);
        Places { free: Arc::new(Semaphore::new(limit as usize)), limit }
    }

    /// A place for `command`, in the order of asking. `None` if there was none within [`WAIT_MAX`].
    pub(crate) async fn take(&self, command: &LogCommand) -> Option<Place> {
        let bytes = command.bytes() as u64 + ENTRY_COST;
        let bytes = u32::try_from(bytes).map_or(self.limit, |bytes| bytes.min(self.limit));
        if let Ok(place) = self.free.clone().try_acquire_many_owned(bytes) {
            return Some(Place(place));
        }
        let waited = tokio::time::timeout(WAIT_MAX, self.free.clone().acquire_many_owned(bytes)).await;
        // The semaphore is never closed.
        waited.ok()?.ok().map(Place)
    }
}

impl Place {
    /// Adds `other`, of the same host: both are given back together.
    pub(crate) fn join(into: &mut Option<Place>, other: Option<Place>) {
        match (into.as_mut(), other) {
            (Some(place), Some(other)) => place.0.merge(other.0),
            (None, other) => *into = other,
            (Some(_), None) => {}
        }
    }
}

/// What an entry carries through openraft: a command, and its place until the log has written it.
#[derive(Debug, Default)]
pub(crate) struct Placed {
    pub(crate) command: LogCommand,
    /// `None` if the entry came from a peer or from the log.
    pub(crate) place: Option<Place>,
    /// The command is several, tied by [`bundle`](crate::bundle).
    pub(crate) is_bundle: bool,
}

impl Placed {
    pub(crate) fn bytes(&self) -> usize {
        self.command.bytes()
    }
}

impl Clone for Placed {
    /// A place is held once: the copy has none.
    fn clone(&self) -> Placed {
        Placed { command: self.command.clone(), place: None, is_bundle: self.is_bundle }
    }
}

impl From<LogCommand> for Placed {
    fn from(command: LogCommand) -> Placed {
        Placed { command, place: None, is_bundle: false }
    }
}

impl fmt::Display for Placed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "command({}+{} bytes)", self.command.meta.len(), self.command.payload.len())
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use futures_util::FutureExt;

    use super::*;

    fn command(bytes: usize) -> LogCommand {
        LogCommand { meta: Bytes::new(), payload: Bytes::from(vec![0; bytes]) }
    }

    #[tokio::test(start_paused = true)]
    async fn who_would_overfill_the_queue_waits_but_not_for_ever() {
        let places = Places::new(share(8 << 20));
        let (first, second) = (command(2 << 20), command(1 << 20));
        let mut held = places.take(&first).await;
        let mut waiting = Box::pin(places.take(&second));
        assert!(
            held.is_some() && waiting.as_mut().now_or_never().is_none(),
            "3 MiB and two headers are too much"
        );
        held = None;
        let got = waiting.await;
        assert!(held.is_none() && got.is_some());
        assert!(places.take(&first).await.is_none(), "nobody gives up a place");
    }

    #[tokio::test]
    async fn a_proposal_larger_than_the_share_goes_alone_and_places_are_given_back_together() {
        let places = Places::new(1 << 20);
        let large = places.take(&command(5 << 20)).await;
        assert!(large.is_some() && places.free.available_permits() == 0);
        drop(large);
        let mut joined = None;
        Place::join(&mut joined, places.take(&command(1000)).await);
        Place::join(&mut joined, None);
        Place::join(&mut joined, places.take(&command(1000)).await);
        assert_eq!(places.free.available_permits() as u64, (1 << 20) - 2 * (1000 + ENTRY_COST));
        drop(joined);
        assert_eq!(places.free.available_permits(), 1 << 20);
    }
}
