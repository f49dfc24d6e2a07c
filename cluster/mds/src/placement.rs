//! Where replicas and chunks lie: which chunkservers form a copyset, which copysets hold a segment's chunks.
//!
//! Called by [`crate::cluster`] (once, to create the copysets) and [`crate::session`] (per segment). Pure: chance
//! comes as an argument. Must never know: the state, the log, the network.

use rand::{Rng, RngExt};
use spline_types::{ChunkserverId, CopysetId};
use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};

/// A chunkserver that may hold replicas.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Site {
    /// Its id.
    pub id: ChunkserverId,
    /// Its failure zone; replicas of one copyset lie in distinct ones.
    pub zone: String,
}

/// What the copysets must look like.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// How many.
    pub copysets: usize,
    /// Members of each.
    pub replicas: usize,
    /// Most other chunkservers with which one shares copysets. Exceeded only for a chunkserver that would otherwise
    /// hold nothing.
    pub scatter_width: usize,
}

/// Chooses the members of all copysets: in distinct zones, spread evenly, with bounded scatter width. The first
/// member of each, who bootstraps and leads first, is spread evenly too.
///
/// Returns `None` if there are fewer zones than replicas.
pub fn plan_copysets(sites: &[Site], shape: Shape, random: &mut impl Rng) -> Option<Vec<Vec<ChunkserverId>>> {
    let zones: BTreeSet<&str> = sites.iter().map(|site| site.zone.as_str()).collect();
    if shape.replicas == 0 || zones.len() < shape.replicas {
        return None;
    }
    let mut plan = Plan::new(sites, shape, random);
    for _ in 0..shape.copysets {
        plan.add_copyset(random)?;
    }
    let mut copysets = plan.copysets;
    spread_first_members(&mut copysets, sites.len());
    Some(copysets.into_iter().map(|members| members.into_iter().map(|at| sites[at].id).collect()).collect())
}

/// The plan while it grows; chunkservers are numbered by their place in `sites`.
struct Plan<'a> {
    sites: &'a [Site],
    shape: Shape,
    /// Breaks ties between equally loaded chunkservers; drawn once per copyset.
    tie: Vec<u32>,
    load: Vec<usize>,
    partners: Vec<BTreeSet<usize>>,
    copysets: Vec<Vec<usize>>,
}

impl<'a> Plan<'a> {
    fn new(sites: &'a [Site], shape: Shape, random: &mut impl Rng) -> Self {
        let count = sites.len();
        Self {
            sites,
            shape,
            tie: (0..count).map(|_| random.random()).collect(),
            load: vec![0; count],
            partners: vec![BTreeSet::new(); count],
            copysets: Vec::with_capacity(shape.copysets),
        }
    }

    /// Adds one copyset around the least loaded chunkserver.
    fn add_copyset(&mut self, random: &mut impl Rng) -> Option<()> {
        self.tie.fill_with(|| random.random());
        let first = (0..self.sites.len()).min_by_key(|at| (self.load[*at], self.tie[*at]))?;
        let members = self
            .complete(first, true)
            .or_else(|| self.known_group_of(first))
            .or_else(|| self.complete(first, false))?;
        for (place, at) in members.iter().enumerate() {
            self.load[*at] += 1;
            let others = members.iter().enumerate().filter(|(other, _)| *other != place).map(|(_, at)| *at);
            self.partners[*at].extend(others);
        }
        self.copysets.push(members);
        Some(())
    }

    /// A group around `first`: least loaded chunkservers of unused zones, one after the other. `bounded` keeps to the
    /// scatter width.
    fn complete(&self, first: usize, bounded: bool) -> Option<Vec<usize>> {
        let mut members = vec![first];
        while members.len() < self.shape.replicas {
            let fits = |at: &usize| {
                members.iter().all(|member| {
                    self.sites[*member].zone != self.sites[*at].zone
                        && (!bounded || self.may_pair(*member, *at))
                })
            };
            let next = (0..self.sites.len()).filter(fits).min_by_key(|at| (self.load[*at], self.tie[*at]))?;
            members.push(next);
        }
        // A newcomer brings up to replicas - 1 partners at once: count them together.
        let within = |at: &usize| {
            let new =
                members.iter().filter(|other| *other != at && !self.partners[*at].contains(other)).count();
            self.partners[*at].len() + new <= self.shape.scatter_width
        };
        (!bounded || members.iter().all(within)).then_some(members)
    }

    fn may_pair(&self, a: usize, b: usize) -> bool {
        let width = self.shape.scatter_width;
        self.partners[a].contains(&b) || (self.partners[a].len() < width && self.partners[b].len() < width)
    }

    /// The group that holds `first` already whose members are loaded least.
    fn known_group_of(&self, first: usize) -> Option<Vec<usize>> {
        let load = |members: &&Vec<usize>| members.iter().map(|at| self.load[*at]).sum::<usize>();
        self.copysets.iter().filter(|members| members.contains(&first)).min_by_key(load).cloned()
    }
}

/// Rotates each copyset so that the member that is first in the fewest copysets so far comes first.
fn spread_first_members(copysets: &mut [Vec<usize>], sites: usize) {
    let mut firsts = vec![0usize; sites];
    for members in copysets {
        let place = (0..members.len()).min_by_key(|place| firsts[members[*place]]).unwrap_or(0);
        members.rotate_left(place);
        firsts[members[0]] += 1;
    }
}

/// Copysets that hold a segment. Few, because raft's work is per group and round: the writes of one hot region share
/// rounds. Several, so that a hot region has several leaders.
pub const SEGMENT_COPYSETS: usize = 3;

/// A copyset that may take new chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Which.
    pub copyset: CopysetId,
    /// Who leads it, if known.
    pub leader: Option<ChunkserverId>,
    /// Its share of new chunks relative to the others, such as the bytes its tightest member has for it; not 0.
    pub weight: u64,
    /// Chunks that lie in it already.
    pub chunks: u64,
}

impl Slot {
    /// Compares how full two are for their weights, had each `more` chunks.
    fn cmp_fill(&self, other: &Slot, more: [u64; 2]) -> Ordering {
        let left = u128::from(self.chunks + more[0]) * u128::from(other.weight.max(1));
        let right = u128::from(other.chunks + more[1]) * u128::from(self.weight.max(1));
        left.cmp(&right)
    }
}

/// Chooses the copysets of a segment's `count` new chunks, in order: [`SEGMENT_COPYSETS`] of those with the fewest
/// chunks per weight, with different leaders if such are nearly as empty, in turn. Each gets the same share of the segment,
/// however empty it is, because a hot region wants all its leaders; over many segments copysets fill in proportion to
/// their weights, as far as shares of a third allow it. Neighbouring chunks lie in different ones.
///
/// Returns `None` if there is no slot.
pub fn place_chunks(slots: &[Slot], count: usize, random: &mut impl Rng) -> Option<Vec<CopysetId>> {
    let share = count.div_ceil(SEGMENT_COPYSETS) as u64;
    let chosen = choose(slots, share, random);
    (!chosen.is_empty()).then(|| chosen.iter().cycle().take(count).map(|slot| slot.copyset).collect())
}

/// "Nearly as empty" means: not fuller than the emptiest one with a `share` of the segment.
fn choose(slots: &[Slot], share: u64, random: &mut impl Rng) -> Vec<Slot> {
    // Ties are broken by chance, so that two small volumes do not both begin with the same copysets.
    let mut left: Vec<(Slot, u32)> = slots.iter().map(|slot| (*slot, random.random())).collect();
    left.sort_by(|(a, tie_a), (b, tie_b)| a.cmp_fill(b, [1, 1]).then(tie_a.cmp(tie_b)));
    let mut chosen: Vec<Slot> = Vec::with_capacity(SEGMENT_COPYSETS);
    while chosen.len() < SEGMENT_COPYSETS && !left.is_empty() {
        let emptiest = left[0].0;
        let near = left.partition_point(|(slot, _)| slot.cmp_fill(&emptiest, [1, 1 + share]).is_le());
        let is_new = |(slot, _): &(Slot, u32)| chosen.iter().all(|other| other.leader != slot.leader);
        let at = left[..near].iter().position(is_new).unwrap_or(0);
        chosen.push(left.remove(at).0);
    }
    chosen
}

/// How often each chunkserver occurs.
pub fn count_replicas<'a>(
    copysets: impl IntoIterator<Item = &'a [ChunkserverId]>,
) -> BTreeMap<ChunkserverId, usize> {
    let mut counts = BTreeMap::new();
    for member in copysets.into_iter().flatten() {
        *counts.entry(*member).or_insert(0) += 1;
    }
    counts
}

#[cfg(test)]
mod tests;
