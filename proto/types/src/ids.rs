//! Identifiers. Each is a distinct type, so that a volume id can not be passed for a copyset id.

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
        pub struct $name($inner);

        impl $name {
            /// Wraps a raw number.
            pub const fn new(raw: $inner) -> Self {
                Self(raw)
            }

            /// The raw number, for encoders and displays.
            pub const fn get(self) -> $inner {
                self.0
            }

            /// The id after this one; `None` past the last.
            pub const fn next(self) -> Option<Self> {
                match self.0.checked_add(1) {
                    Some(raw) => Some(Self(raw)),
                    None => None,
                }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

id! {
    /// A volume. Never reused: a volume created under the name of a deleted one gets a new id.
    VolumeId(u64)
}
id! {
    /// A raft group that holds the replicas of chunks.
    CopysetId(u32)
}
id! {
    /// One formatted data directory. An emptied directory gets a new id: what a replica promised under the old
    /// id is lost with the data, so it must not vote under it (`acked_is_durable`).
    ChunkserverId(u32)
}
id! {
    /// Position of a chunk in its volume, counted in chunks from 0.
    ChunkIndex(u32)
}
id! {
    /// Position of a segment in its volume, counted in segments from 0.
    SegmentIndex(u32)
}
id! {
    /// Number of a volume's session. Newer wins (`one_writer`). 0 is "none yet".
    Epoch(u64)
}
id! {
    /// Number of an attempt within a session. Every attempt, retries included, takes a new one
    /// (`no_late_duplicate`). Starts at 1.
    Seq(u64)
}
id! {
    /// Number that nebd gives to a request; unique within one nebd process, growing.
    RequestId(u64)
}
