//! What the metadata server is asked and answers, in our own words. Called by `client` and `route`. Must never know
//! generated types: those stop in `transport/mds.rs`.

use spline_types::{
    ChunkserverId, CopysetId, Epoch, Fault, Geometry, OnUnavailable, SegmentIndex, Unavailable, VolumeId,
};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

/// Why the metadata server did not do what it was asked.
#[derive(thiserror::Error, Clone, PartialEq, Eq, Debug)]
pub enum MetaError {
    /// There is no such volume.
    #[error("{message} (mds={address})")]
    NotFound {
        /// Who said so.
        address: String,
        /// Its words.
        message: String,
    },
    /// The name is another volume's than the one that was known.
    #[error("{message} (mds={address})")]
    Replaced {
        /// Who said so.
        address: String,
        /// Its words.
        message: String,
    },
    /// It answered no.
    #[error("{message} (mds={address})")]
    Refused {
        /// Who said so.
        address: String,
        /// What it means.
        fault: Fault,
        /// Its words.
        message: String,
    },
    /// None could be reached; whether the last one carried it out is not known.
    #[error("no metadata server answers; check that it runs and that the address is right: {tried}")]
    Unreachable {
        /// Each address with its error.
        tried: String,
    },
    /// It answered what can not be.
    #[error("metadata server answered nonsense; are both of one version: {what} (mds={address})")]
    BadReply {
        /// Who said so.
        address: String,
        /// What is wrong.
        what: String,
    },
}

impl MetaError {
    /// What it means to a request.
    pub fn fault(&self) -> Fault {
        match self {
            Self::NotFound { .. } | Self::Replaced { .. } => Fault::Fenced,
            Self::Refused { fault, .. } => *fault,
            Self::Unreachable { .. } => Fault::Unavailable(Unavailable::Unreachable),
            Self::BadReply { .. } => Fault::Internal,
        }
    }
}

/// A session just opened.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct OpenedSession {
    /// The volume.
    pub volume: VolumeId,
    /// Its size and block size.
    pub geometry: Geometry,
    /// The session's number.
    pub epoch: Epoch,
    /// Nobody else had a session from this one on: who was served by one of them may be served by this one.
    pub run_since: Epoch,
    /// What requests do while the cluster can not serve them.
    pub on_unavailable: OnUnavailable,
    /// How long the session lasts without a renewal.
    pub lease: Duration,
    /// Copysets of the chunks of every allocated segment, 64 each.
    pub segments: HashMap<SegmentIndex, Arc<[CopysetId]>>,
}

/// The answer to a renewal.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Renewal {
    /// How long the sessions last from now.
    pub lease: Duration,
    /// One for each that was asked for.
    pub sessions: Vec<RenewedSession>,
}

/// One session of a renewal.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RenewedSession {
    /// The volume.
    pub volume: VolumeId,
    /// The session that was asked for: there may be another one of the same volume, under another name.
    pub epoch: Epoch,
    /// Whether the session is still ours.
    pub state: SessionState,
}

/// What became of a session.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SessionState {
    /// Still ours.
    Alive {
        /// Bytes of the volume; more than before after a resize.
        size: u64,
        /// The volume's name; another than before after a rename.
        name: String,
    },
    /// A newer session exists, or the volume is gone.
    Lost,
}

/// Where copysets are, as the metadata server knows it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct RouteUpdate {
    pub(crate) addresses: HashMap<ChunkserverId, SocketAddr>,
    pub(crate) copysets: HashMap<CopysetId, (Vec<ChunkserverId>, Option<ChunkserverId>)>,
}
