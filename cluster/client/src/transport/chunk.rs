//! Attempts over the wire: connections to chunkservers. Must never know what an outcome leads to.

use crate::retry::{Answer, Outcome};
use bytes::Bytes;
use spline_types::ChunkCommand;
use spline_wire::chunk::{Reply, encode_request};
use spline_wire::{CallError, Caller, Kind};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{PoisonError, RwLock};
use tokio::time::Instant;

/// Chunkserver addresses that are remembered, far above a cluster's size; beyond it all are forgotten and connected to
/// anew, so that addresses that moved away do not pile up.
const ADDRESSES_MAX: usize = 4096;

/// Connections to the cluster's chunkservers, one to each: requests that leave together share a system call.
#[derive(Debug, Default)]
pub(super) struct Chunkservers {
    callers: RwLock<HashMap<SocketAddr, Caller>>,
}

impl Chunkservers {
    pub(super) async fn attempt(
        &self,
        to: SocketAddr,
        command: &ChunkCommand,
        payload: Vec<Bytes>,
        deadline: Instant,
    ) -> Outcome {
        let caller = self.caller(to);
        let frame = caller.call(Kind::ChunkRequest, encode_request(command), payload, deadline).await?;
        let reply = Reply::decode(&frame.meta)
            .ok()
            .filter(|_| frame.kind == Kind::ChunkReply)
            .ok_or_else(|| {
                tracing::error!(%to, kind = ?frame.kind, meta = ?frame.meta, "chunkserver answered nonsense; are both of one version");
                CallError::Lost("reply could not be understood".into())
            })?;
        let result = reply.result.map(|()| frame.into_payload());
        Ok(Answer { result, leader_hint: reply.leader_hint })
    }

    /// Connects, if there is no connection yet. A failure is the next attempt's to see.
    pub(super) async fn connect(&self, to: SocketAddr, deadline: Instant) {
        self.caller(to).connect(deadline).await;
    }

    fn caller(&self, to: SocketAddr) -> Caller {
        // Only whole entries go in and out, so a poisoned map is whole.
        if let Some(caller) = self.callers.read().unwrap_or_else(PoisonError::into_inner).get(&to) {
            return caller.clone();
        }
        let mut callers = self.callers.write().unwrap_or_else(PoisonError::into_inner);
        if callers.len() >= ADDRESSES_MAX {
            callers.clear();
        }
        callers.entry(to).or_insert_with(|| Caller::new(to)).clone()
    }
}
