//! Moving a whole state to a replica that the log can no longer reach: items streamed, throttled, resumable.
//!
//! Called by `network` ([`send`]) and by `network::receive` ([`Inbound`]). The contents are the user's.
//! The receiver says which items it still needs, so a transfer that broke goes on where it was. `bounded`: a few items
//! are on the way at once, all transfers of a host share one budget of bytes per second, and one whose sender is silent
//! is given up.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use openraft::async_runtime::watch::WatchReceiver;
use openraft::error::NetworkError;
use tokio::sync::{Mutex, MutexGuard};

use crate::codec::message::{Reply, Request};
use crate::command::GroupId;
use crate::member::Member;
use crate::metrics::Metrics;
use crate::network::peers::Link;
use crate::state_machine::SnapshotSink;
use crate::state_machine::adapter::SnapshotData;
use crate::types::{RpcError, SnapshotMeta, TypeConfig, Vote};

/// Items of one transfer on the way at once.
const ITEMS_IN_FLIGHT: usize = 4;
/// Longest wait for one item or for the list of needed items: the receiver writes to its disk.
const ITEM_LIMIT: Duration = Duration::from_secs(30);
/// Longest wait for the end: the receiver syncs everything.
const FINISH_LIMIT: Duration = Duration::from_secs(120);

/// A transfer of which nothing was heard for this long is given up: its sender waits far less between two items, even
/// with many transfers in one budget.
const SILENCE_LIMIT: Duration = Duration::from_secs(120);

const REPLACED: &str = "this snapshot transfer was replaced by another";
const INSTALLING: &str = "another snapshot is being installed, try again";

/// A budget of bytes per second shared by all transfers of a host.
pub(crate) struct Throttle {
    bytes_per_second: u64,
    free_at: Mutex<Instant>,
}

impl Throttle {
    /// 0 is no limit.
    pub(crate) fn new(bytes_per_second: u64) -> Throttle {
        Throttle { bytes_per_second, free_at: Mutex::new(Instant::now()) }
    }

    async fn take(&self, bytes: usize) {
        if self.bytes_per_second == 0 {
            return;
        }
        let cost = Duration::from_secs_f64(bytes as f64 / self.bytes_per_second as f64);
        let start = {
            let mut free_at = self.free_at.lock().await;
            let start = (*free_at).max(Instant::now());
            *free_at = start + cost;
            start
        };
        tokio::time::sleep_until(start.into()).await;
    }
}

fn failed(reason: impl ToString) -> RpcError {
    RpcError::Network(NetworkError::from_string(reason))
}

/// Sends `snapshot` and waits until the receiver has installed it. Returns the receiver's vote.
pub(crate) async fn send(
    group: GroupId,
    link: &Link,
    vote: Vote,
    snapshot: openraft::alias::SnapshotOf<TypeConfig, SnapshotData>,
    throttle: &Throttle,
    metrics: &Metrics,
) -> Result<Vote, RpcError> {
    let SnapshotData::Source(mut source) = snapshot.snapshot else {
        return Err(failed("the checkpoint has no source yet"));
    };
    let session = session_number(group);
    let begin = Request::SnapshotBegin { vote, session, meta: snapshot.meta, manifest: source.manifest() };
    let needed = match link.call(group, begin, ITEM_LIMIT).await.map_err(failed)? {
        Reply::Needs(items) => items,
        Reply::HigherVote(vote) => return Ok(vote),
        other => return Err(failed(format!("{other:?}"))),
    };
    tracing::info!(%group, items = needed.len(), "sending a snapshot");
    let mut on_the_way = FuturesUnordered::new();
    for item in needed {
        while on_the_way.len() >= ITEMS_IN_FLIGHT {
            written(on_the_way.next().await)?;
        }
        let data = source.read(item).await.map_err(failed)?;
        throttle.take(data.len()).await;
        metrics.snapshot_items_sent.inc();
        on_the_way.push(link.call(group, Request::SnapshotItem { session, item, data }, ITEM_LIMIT));
    }
    while let Some(reply) = on_the_way.next().await {
        written(Some(reply))?;
    }
    match link.call(group, Request::SnapshotFinish { session }, FINISH_LIMIT).await.map_err(failed)? {
        Reply::Installed(vote) => Ok(vote),
        other => Err(failed(format!("{other:?}"))),
    }
}

fn written(reply: Option<Result<Reply, String>>) -> Result<(), RpcError> {
    match reply {
        None | Some(Ok(Reply::ItemWritten)) => Ok(()),
        Some(Ok(other)) => Err(failed(format!("{other:?}"))),
        Some(Err(reason)) => Err(failed(reason)),
    }
}

/// Tells transfers to one receiver apart: unlike any other of this process, and unlikely one of another.
fn session_number(group: GroupId) -> u64 {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let clock = std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_micros() as u64);
    (clock << 12) ^ (u64::from(group.0) << 1) ^ NEXT.fetch_add(1, Ordering::Relaxed)
}

/// The transfer a replica is receiving, if any. A new one replaces it, but not while it is being installed: what was
/// received lies where the new one would write.
#[derive(Default)]
pub(crate) struct Inbound {
    slot: Mutex<Option<Transfer>>,
    /// Held until an install has ended; taken with `slot` held.
    installing: Mutex<()>,
}

struct Transfer {
    session: u64,
    vote: Vote,
    meta: SnapshotMeta,
    sink: Box<dyn SnapshotSink>,
    /// When something of it was last heard.
    heard: tokio::time::Instant,
}

impl Inbound {
    /// Gives up a transfer whose sender is silent: what it holds (memory, files, room promised on the disk) is wanted
    /// elsewhere. What was received may still be of use to the next one. Does not wait.
    pub(crate) fn drop_silent(&self) {
        // Locked: something is being done with it.
        let Ok(mut slot) = self.slot.try_lock() else { return };
        if let Some(gone) = slot.take_if(|transfer| transfer.heard.elapsed() > SILENCE_LIMIT) {
            tracing::warn!(
                session = gone.session,
                "sender of a snapshot is silent, the transfer is given up"
            );
        }
    }

    pub(crate) async fn begin(
        &self,
        member: &Arc<Member>,
        vote: Vote,
        session: u64,
        meta: SnapshotMeta,
        manifest: Bytes,
    ) -> Reply {
        let known = member.raft.borrow_watched().vote;
        if known > vote {
            return Reply::HigherVote(known);
        }
        let mut slot = match self.free().await {
            Ok(slot) => slot,
            Err(reason) => return Reply::Refused(reason),
        };
        let mut sink = match member.replica.sink().await {
            Ok(Ok(sink)) => sink,
            Ok(Err(error)) => return Reply::Refused(error.to_string()),
            Err(reason) => return Reply::Refused(reason),
        };
        match sink.begin(manifest).await {
            Ok(items) => {
                *slot = Some(Transfer { session, vote, meta, sink, heard: tokio::time::Instant::now() });
                Reply::Needs(items)
            }
            Err(error) => Reply::Refused(error.to_string()),
        }
    }

    pub(crate) async fn item(&self, session: u64, item: u32, data: Bytes) -> Reply {
        let mut slot = self.slot.lock().await;
        let Some(transfer) = slot.as_mut().filter(|transfer| transfer.session == session) else {
            return Reply::Refused(REPLACED.to_owned());
        };
        let written = transfer.sink.write(item, data).await;
        transfer.heard = tokio::time::Instant::now();
        match written {
            Ok(()) => Reply::ItemWritten,
            Err(error) => {
                *slot = None;
                Reply::Refused(error.to_string())
            }
        }
    }

    pub(crate) async fn finish(&self, member: &Arc<Member>, session: u64) -> Reply {
        let (transfer, _installing) = match self.take(session).await {
            Ok(taken) => taken,
            Err(reason) => return Reply::Refused(reason),
        };
        match member.replica.install(transfer.vote, transfer.meta, transfer.sink).await {
            Ok(vote) => Reply::Installed(vote),
            Err(reason) => Reply::Refused(reason),
        }
    }

    /// The slot, empty: the old sink goes first, two must not write to one place.
    async fn free(&self) -> Result<MutexGuard<'_, Option<Transfer>>, String> {
        let mut slot = self.slot.lock().await;
        drop(self.installing.try_lock().map_err(|_| INSTALLING)?);
        *slot = None;
        Ok(slot)
    }

    /// The transfer of `session`, to be installed; no other begins until the guard is dropped.
    async fn take(&self, session: u64) -> Result<(Transfer, MutexGuard<'_, ()>), String> {
        let mut slot = self.slot.lock().await;
        let installing = self.installing.try_lock().map_err(|_| INSTALLING)?;
        let transfer = slot.take_if(|transfer| transfer.session == session).ok_or(REPLACED)?;
        Ok((transfer, installing))
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use futures_util::future::BoxFuture;

    use super::*;
    use crate::types::LeaderId;

    struct Nowhere;

    impl SnapshotSink for Nowhere {
        fn begin(&mut self, _: Bytes) -> BoxFuture<'_, io::Result<Vec<u32>>> {
            Box::pin(async { Ok(Vec::new()) })
        }

        fn write(&mut self, _: u32, _: Bytes) -> BoxFuture<'_, io::Result<()>> {
            Box::pin(async { Ok(()) })
        }

        fn finish(self: Box<Self>) -> BoxFuture<'static, io::Result<()>> {
            Box::pin(async { Ok(()) })
        }
    }

    fn transfer(session: u64) -> Transfer {
        let vote = Vote { leader_id: LeaderId { term: 1, node_id: 1 }, committed: true };
        let heard = tokio::time::Instant::now();
        Transfer { session, vote, meta: SnapshotMeta::default(), sink: Box::new(Nowhere), heard }
    }

    #[tokio::test(start_paused = true)]
    async fn a_transfer_whose_sender_is_silent_is_given_up() {
        let inbound = Inbound::default();
        *inbound.free().await.expect("nothing is there yet") = Some(transfer(1));
        tokio::time::advance(SILENCE_LIMIT).await;
        inbound.drop_silent();
        let written = inbound.item(1, 0, Bytes::new()).await;
        assert_eq!(written, Reply::ItemWritten, "its time is not over");
        tokio::time::advance(SILENCE_LIMIT).await;
        inbound.drop_silent();
        assert!(inbound.slot.lock().await.is_some(), "the item was heard");
        tokio::time::advance(Duration::from_millis(1)).await;
        inbound.drop_silent();
        assert!(inbound.slot.lock().await.is_none());
        assert_eq!(inbound.item(1, 0, Bytes::new()).await, Reply::Refused(REPLACED.to_owned()));
    }

    #[tokio::test]
    async fn no_transfer_begins_while_one_is_being_installed() {
        let inbound = Inbound::default();
        *inbound.free().await.expect("nothing is there yet") = Some(transfer(1));
        *inbound.free().await.expect("a transfer under way is replaced") = Some(transfer(2));
        assert!(inbound.take(1).await.is_err(), "it was replaced");
        let (taken, installing) = inbound.take(2).await.expect("is complete");
        assert_eq!(taken.session, 2);
        assert!(inbound.free().await.is_err(), "the install has not ended");
        drop(installing);
        assert!(inbound.free().await.is_ok());
    }
}
