//! Why a request did not succeed: one closed list that tells the caller what to do, not what broke.

/// The closed list. Outward mappings (NBD, virtio, gRPC, wire) are one exhaustive match each, in files of their own.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Fault {
    /// The request itself is wrong; nobody retries.
    Invalid(Invalid),
    /// Not offered; nobody retries.
    Unsupported,
    /// The export or volume is read-only.
    ReadOnly,
    /// No space; an operator must add some or free some.
    NoSpace,
    /// A newer session exists; this one closes itself.
    Fenced,
    /// Every replica of the data is damaged; an operator must look.
    Corrupt,
    /// It may work later or elsewhere; the cluster client retries by the volume's policy.
    Unavailable(Unavailable),
    /// A defect or an unexpected failure of ours; an operator must look.
    Internal,
}

/// What is wrong with a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Invalid {
    /// The range does not lie inside the volume.
    PastEnd,
    /// More data than a request may carry.
    TooLarge,
    /// Not aligned to the block size that the client agreed to.
    Alignment,
    /// Flags or operation that do not fit together, or are unknown.
    Flags,
}

/// Why something can not be had now.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Unavailable {
    /// This replica does not lead the copyset.
    NotLeader,
    /// Too much is waiting there.
    Overloaded,
    /// No connection, no answer in time, or no majority.
    Unreachable,
}

impl Fault {
    /// A short lower-case name for logs and metric labels.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Invalid(_) => "invalid",
            Self::Unsupported => "unsupported",
            Self::ReadOnly => "read_only",
            Self::NoSpace => "no_space",
            Self::Fenced => "fenced",
            Self::Corrupt => "corrupt",
            Self::Unavailable(_) => "unavailable",
            Self::Internal => "internal",
        }
    }
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Invalid(Invalid::PastEnd) => "range lies past the end of the volume",
            Self::Invalid(Invalid::TooLarge) => "request carries more data than the limit",
            Self::Invalid(Invalid::Alignment) => "range is not aligned to the block size",
            Self::Invalid(Invalid::Flags) => "flags do not fit the operation",
            Self::Unsupported => "operation is not supported",
            Self::ReadOnly => "volume is read-only",
            Self::NoSpace => "no space left on the cluster",
            Self::Fenced => "a newer session holds the volume",
            Self::Corrupt => "every replica of the data is damaged",
            Self::Unavailable(Unavailable::NotLeader) => "replica does not lead its copyset",
            Self::Unavailable(Unavailable::Overloaded) => "overloaded",
            Self::Unavailable(Unavailable::Unreachable) => "unreachable",
            Self::Internal => "internal error",
        })
    }
}

impl std::error::Error for Fault {}
