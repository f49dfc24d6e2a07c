//! The way into the replicated metadata: propose a change, or read what is committed.
//!
//! Called by the operations ([`crate::volume`], [`crate::session`], [`crate::cluster`]).
//! Must never know: what commands mean, who asks.

use crate::command::{Command, Outcome};
use crate::machine::SharedState;
use crate::refusal::Refusal;
use crate::state::MetaState;
use bytes::Bytes;
use spline_raft::{Group, LogCommand, ProposeError};

/// Rounds of a read whose lease is lost while it reads, before the caller is told to come back.
const READ_ROUNDS: usize = 3;

/// A handle to the metadata; clones share it.
#[derive(Clone)]
pub struct Ledger {
    group: Group,
    state: SharedState,
}

impl Ledger {
    /// Over a started group and the state that its machine changes.
    pub fn new(group: Group, state: SharedState) -> Self {
        Self { group, state }
    }

    /// Logs a command and waits until it is applied.
    ///
    /// # Errors
    /// What `apply` refused; `Unavailable` if this server does not lead or the outcome is unknown; `NoSpace` if the
    /// log has no room.
    pub async fn propose(&self, command: Command) -> Outcome {
        let logged = LogCommand { meta: Bytes::from(command.encode()), payload: Bytes::new() };
        let answer = self.group.propose(logged).await.map_err(refuse)?;
        serde_json::from_slice::<Outcome>(&answer)
            .map_err(|error| Refusal::internal(format!("answer can not be read: error={error}")))?
    }

    /// Looks at the committed state: everything that was answered before the call is in it.
    ///
    /// # Errors
    /// `Unavailable` if this server does not lead.
    pub async fn read<T>(&self, look: impl Fn(&MetaState) -> T) -> Result<T, Refusal> {
        for _ in 0..READ_ROUNDS {
            let lease = self.group.read_lease().await.map_err(refuse)?;
            let seen = self.state.read(&look);
            if lease.still_held() {
                return Ok(seen);
            }
        }
        Err(Refusal::unavailable("leadership of the metadata is unsettled, try again"))
    }

    /// Looks at the state as it is here and now, perhaps not the newest. For schedulers and gauges.
    pub fn peek<T>(&self, look: impl FnOnce(&MetaState) -> T) -> T {
        self.state.read(look)
    }
}

fn refuse(error: ProposeError) -> Refusal {
    match error {
        ProposeError::NotLeader { .. } => {
            Refusal::unavailable("this metadata server does not lead, try another or try again")
        }
        ProposeError::Unknown => {
            Refusal::unavailable("the outcome is unknown, look at the state before trying again")
        }
        ProposeError::Stopped => Refusal::unavailable("this metadata server is stopping"),
        ProposeError::Overloaded => {
            Refusal::unavailable("the metadata server's log can not keep up, try again")
        }
        ProposeError::LogFull => {
            Refusal::no_space("the metadata server's log has no room, free space in its data directory")
        }
    }
}
