//! The cluster client: carries spans of a volume to the copysets that hold them, and tries again by the volume's
//! policy until there is a definite answer.
//!
//! Called by the gateway's cluster engine and session. Knows: where copysets are and who leads them, what a failed
//! attempt proves, when to try again and where, how the metadata server is asked.
//! Must never know: guests, links, how a request was split, how chunks are stored, raft.
//!
//! Invariants it has a part in: `no_late_duplicate` ([`attempt`](mod@attempt)), `one_writer` (every command carries the
//! session's epoch; a fenced session answers nothing but `Fenced`), `complete_once` (one call, one return value),
//! `bounded` (attempts and pauses have limits; requests are counted at the gateway's door).
//!
//! Modules in the order in which a request meets them: [`client`] (opens sessions) → [`volume`] (one session; drives
//! one span) → `route` → `attempt` → `transport` → `retry`; [`meta`] is what the metadata server is asked, `metrics`
//! counts.

pub mod client;
pub mod meta;
pub mod volume;

mod attempt;
mod metrics;
mod retry;
mod route;
mod transport;

pub use client::{ClientConfig, ClusterClient};
pub use meta::{MetaError, OpenedSession, Renewal, RenewedSession, SessionState};
pub use volume::{Span, SpanAnswer, VolumeClient};
