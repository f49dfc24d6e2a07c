//! Why a connection ended.

/// Why a connection could not be made or can not go on. Except for `Payload`, the connection is of no more use.
#[derive(thiserror::Error, Debug)]
pub enum WireError {
    /// The socket failed, or could not be connected.
    #[error("connection failed: {0}")]
    Io(#[from] std::io::Error),
    /// No connection or preface in time.
    #[error("no connection in time: limit={limit:?}")]
    Timeout {
        /// The limit that passed.
        limit: std::time::Duration,
    },
    /// The peer does not speak this protocol.
    #[error("peer does not speak spline's data protocol; is the address right: first_bytes={bytes:02x?}")]
    NotSpline {
        /// What it sent instead of a preface.
        bytes: [u8; 8],
    },
    /// No common version.
    #[error("no common protocol version; upgrade the older side: peer speaks {} to {}, this speaks {} to {}",
        theirs.0, theirs.1, ours.0, ours.1)]
    Versions {
        /// Oldest and newest of the peer.
        theirs: (u16, u16),
        /// Oldest and newest of this build.
        ours: (u16, u16),
    },
    /// Bytes that are not a frame.
    #[error("bad frame: {what}: value={value:#x}")]
    Malformed {
        /// Which field, and what is wrong with it.
        what: &'static str,
        /// Its value.
        value: u64,
    },
    /// The payload does not match its checksum, while header and meta do: the stream is still in step and `next` may
    /// be called again. Happens when the sender's memory changed while it was being sent.
    #[error("payload does not match its checksum: kind={kind:?} request={request}")]
    Payload {
        /// Kind of the damaged frame.
        kind: crate::frame::Kind,
        /// Its request number.
        request: u64,
    },
    /// The peer ended the connection inside a frame.
    #[error("connection ended inside a frame")]
    Truncated,
}
