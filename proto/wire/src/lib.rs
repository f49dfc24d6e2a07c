//! The data plane: frames over TCP between gateways, chunkservers and their raft peers.
//!
//! Called by the cluster client, raft and the chunkserver; the gateway uses [`outbox`] for its link socket too.
//!
//! Knows: the 32-byte frame header, checksums, version negotiation, how many queued frames become few system calls,
//! which reply belongs to which call, and the codecs of chunk requests and replies.
//! Must never know: routes, retries, sessions, raft messages, what a chunk is stored in.
//!
//! Modules in the order in which a request meets them: [`chunk`] (its meta) → [`call`] → [`frame`] → [`outbox`] →
//! [`connection`] → [`fault`] (on the way back); [`version`] lists what has changed between versions.

pub mod call;
pub mod chunk;
pub mod connection;
pub mod fault;
pub mod frame;
pub mod outbox;
pub mod version;

mod error;

pub use call::{CallError, Caller};
pub use connection::{FrameReceiver, FrameSender, accept, connect, split};
pub use error::WireError;
pub use frame::{Frame, Kind};
pub use outbox::{Closed, TrySendError};
