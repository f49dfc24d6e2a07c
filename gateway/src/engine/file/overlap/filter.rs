//! Counts claims by where they lie, coarsely: where nothing is counted, nothing can meet.
//!
//! Called by the table of overlaps. What it says is sure one way only: places that share a bucket seem to meet.

use super::Claim;

/// Pages of one granule: 64 KiB, so that a small request lies in one and a large one in few.
const GRANULE_PAGES: u64 = 16;
/// Buckets: with the 32 requests of a busy disk under way, one in 30 seems to meet another.
const BUCKETS: u64 = 1024;

/// How many claims lie in each bucket of granules.
pub(super) struct Filter {
    /// All, and those that are alone.
    counts: Box<[[u32; 2]; BUCKETS as usize]>,
}

impl Default for Filter {
    fn default() -> Self {
        Self { counts: Box::new([[0; 2]; BUCKETS as usize]) }
    }
}

/// The buckets of a claim, each once.
fn buckets(claim: &Claim) -> impl Iterator<Item = usize> + use<> {
    let (first, last) = (claim.first / GRANULE_PAGES, claim.last / GRANULE_PAGES);
    let end = last.saturating_add(1).min(first.saturating_add(BUCKETS));
    (first..end).map(|granule| (granule % BUCKETS) as usize)
}

impl Filter {
    /// Whether nothing that was added and not removed can conflict with a claim.
    pub(super) fn is_clear(&self, claim: &Claim) -> bool {
        buckets(claim).all(|bucket| self.counts[bucket][usize::from(!claim.alone)] == 0)
    }

    pub(super) fn add(&mut self, claim: &Claim) {
        for bucket in buckets(claim) {
            let [all, alone] = &mut self.counts[bucket];
            *all += 1;
            *alone += u32::from(claim.alone);
        }
    }

    pub(super) fn remove(&mut self, claim: &Claim) {
        for bucket in buckets(claim) {
            let [all, alone] = &mut self.counts[bucket];
            *all -= 1;
            *alone -= u32::from(claim.alone);
        }
    }
}
