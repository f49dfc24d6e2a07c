//! Schedulers: pure functions from a view of the cluster to operators.
//!
//! Called by [`crate::cluster`] on a tick. Nothing here remembers anything: what is in flight is part of the view, so
//! a restarted MDS goes on where the old one was. Must never know: the log, the network, clocks.
//!
//! Parts: [`replace`] rebuilds lost replicas, [`leaders`] spreads leadership, [`view`] gathers what both look at.

pub mod leaders;
pub mod replace;
pub mod view;

use spline_types::{ChunkserverId, CopysetId};
use std::time::Duration;
pub use view::{CopysetView, ServerView, View};

/// What to do to a copyset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Operator {
    /// Add a replica, wait until it caught up, remove another.
    Replace {
        /// The copyset.
        copyset: CopysetId,
        /// The newcomer.
        add: ChunkserverId,
        /// The member it replaces.
        remove: ChunkserverId,
    },
    /// Give up a replacement whose newcomer is lost.
    Abort {
        /// The copyset.
        copyset: CopysetId,
        /// The newcomer.
        add: ChunkserverId,
    },
    /// Hand leadership to another member.
    Transfer {
        /// The copyset.
        copyset: CopysetId,
        /// The next leader.
        to: ChunkserverId,
    },
}

/// What the schedulers keep to.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Most replacements and transfers in flight, those of the view included.
    pub operators_max: usize,
    /// Replicas of a chunkserver that has been silent for this long are rebuilt elsewhere.
    pub rebuild_after: Duration,
}

/// What to start now. Lost replicas come first; leadership is moved only while nothing is rebuilt.
pub fn plan(view: &View, limits: Limits) -> Vec<Operator> {
    let mut operators = replace::aborts(view, limits);
    let rebuilding = view.copysets.iter().filter(|copyset| copyset.replacing.is_some()).count();
    let mut room = limits.operators_max.saturating_sub(rebuilding + view.transfers.len());
    let replacements = replace::replacements(view, limits, room);
    room -= replacements.len();
    if rebuilding == 0 && replacements.is_empty() {
        operators.extend(leaders::transfers(view, room));
    }
    operators.extend(replacements);
    operators
}

#[cfg(test)]
mod tests;
