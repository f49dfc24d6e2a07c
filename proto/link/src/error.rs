//! Why bytes from the other side are not what the contract allows. The link is cut; nothing is guessed.

use thiserror::Error;

/// A breach of the contract, named with the value that broke it.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum LinkError {
    /// The first bytes are not ours: something else speaks on this socket.
    #[error("not a spline link: magic={0:#010x}")]
    Magic(u32),
    /// No version that both sides speak.
    #[error(
        "no common link version: theirs_min={min} theirs_max={max} ours_min={ours_min} ours_max={ours_max}; \
         upgrade the older of nebd and gateway"
    )]
    Version {
        /// Oldest that the other side speaks.
        min: u16,
        /// Newest that the other side speaks.
        max: u16,
        /// Oldest that this side speaks.
        ours_min: u16,
        /// Newest that this side speaks.
        ours_max: u16,
    },
    /// A code outside its closed list.
    #[error("unknown code in a link message: field={field} value={value}")]
    Unknown {
        /// Which field.
        field: &'static str,
        /// What it held.
        value: u64,
    },
    /// A field that does not fit the rest of its message.
    #[error("field does not fit its link message: field={field} value={value}")]
    Mismatch {
        /// Which field.
        field: &'static str,
        /// What it held.
        value: u64,
    },
    /// A field beyond its limit.
    #[error("field of a link message is over its limit: field={field} value={value} limit={limit}")]
    Limit {
        /// Which field.
        field: &'static str,
        /// What it held.
        value: u64,
        /// The most it may hold.
        limit: u64,
    },
    /// Text that is not a volume name or not UTF-8.
    #[error("bad text in a link message: {0}")]
    Text(String),
}
