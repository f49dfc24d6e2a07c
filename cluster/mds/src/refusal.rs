//! Why the metadata server does not do what it was asked: a kind that tells the caller what to do, and a message for
//! people.
//!
//! Called by every module. Refusals that `apply` decides travel as JSON in its answer; the gRPC code of each kind is
//! one exhaustive match here. Must never know: requests, replies.

use serde::{Deserialize, Serialize};

/// What the caller should do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RefusalKind {
    /// Change the request.
    Invalid,
    /// Look at the name or id: there is no such thing.
    NotFound,
    /// Choose another name.
    Exists,
    /// Give up what was meant for the volume that had this name before.
    Replaced,
    /// Wait for, or change, the state that the message names.
    Precondition,
    /// Close the session: a newer one exists.
    Fenced,
    /// Try again at once: someone else changed the same thing meanwhile.
    Conflict,
    /// Add space or free some.
    NoSpace,
    /// Try again later.
    Unavailable,
    /// Nothing; an operator must look.
    Internal,
}

impl RefusalKind {
    /// A short lower-case name for metric labels.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Invalid => "invalid",
            Self::NotFound => "not_found",
            Self::Exists => "exists",
            Self::Replaced => "replaced",
            Self::Precondition => "precondition",
            Self::Fenced => "fenced",
            Self::Conflict => "conflict",
            Self::NoSpace => "no_space",
            Self::Unavailable => "unavailable",
            Self::Internal => "internal",
        }
    }

    /// The gRPC status code.
    pub const fn code(self) -> tonic::Code {
        match self {
            Self::Invalid => tonic::Code::InvalidArgument,
            Self::NotFound => tonic::Code::NotFound,
            Self::Exists | Self::Replaced => tonic::Code::AlreadyExists,
            Self::Precondition | Self::Fenced => tonic::Code::FailedPrecondition,
            Self::Conflict => tonic::Code::Aborted,
            Self::NoSpace => tonic::Code::ResourceExhausted,
            Self::Unavailable => tonic::Code::Unavailable,
            Self::Internal => tonic::Code::Internal,
        }
    }
}

/// A request that is not carried out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// What the caller should do.
    pub kind: RefusalKind,
    /// What is wrong, for people.
    pub message: String,
}

macro_rules! constructors {
    ($($(#[$doc:meta])* $name:ident => $kind:ident),*) => {$(
        $(#[$doc])*
        pub fn $name(message: impl Into<String>) -> Self {
            Self { kind: RefusalKind::$kind, message: message.into() }
        }
    )*};
}

impl Refusal {
    constructors! {
        /// The request is wrong.
        invalid => Invalid,
        /// No such thing.
        not_found => NotFound,
        /// The name is taken.
        exists => Exists,
        /// The name is another volume's now.
        replaced => Replaced,
        /// The state does not allow it.
        precondition => Precondition,
        /// A newer session exists.
        fenced => Fenced,
        /// Raced with another change.
        conflict => Conflict,
        /// No space.
        no_space => NoSpace,
        /// Not now.
        unavailable => Unavailable,
        /// A defect of ours.
        internal => Internal
    }
}

impl From<Refusal> for tonic::Status {
    fn from(refusal: Refusal) -> Self {
        tonic::Status::new(refusal.kind.code(), refusal.message)
    }
}
