//! The vocabulary of Spline: one word per thing, units as types, no dependencies.
//!
//! Called by every crate. Knows: ids, ranges, geometry, requests, completions, faults, the fence tag, limits.
//! Must never know: how any of them is serialised, stored or sent.
//!
//! Modules in the order in which a request meets them: [`request`] → [`geometry`] → [`range`] → [`chunk`] →
//! [`fault`]; [`ids`], [`size`] and [`limits`] serve all of them.

pub mod chunk;
pub mod fault;
pub mod geometry;
pub mod ids;
pub mod limits;
pub mod range;
pub mod request;
pub mod size;
pub mod volume;

pub use chunk::{ChunkCommand, ChunkId, ChunkOp, FenceTag};
pub use fault::{Fault, Invalid, Unavailable};
pub use geometry::{BlockSize, Geometry};
pub use ids::{ChunkIndex, ChunkserverId, CopysetId, Epoch, RequestId, SegmentIndex, Seq, VolumeId};
pub use range::{ByteRange, ChunkRange, Extent};
pub use request::{BlockOp, BlockRequest, Completion};
pub use size::ByteSize;
pub use volume::{OnUnavailable, VolumeName};
