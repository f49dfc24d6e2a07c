//! Which pages of an area are free. Pure.
//!
//! Called by [`area`](super). The lowest free pages are taken first, so that pages that were used once are used again. Data for
//! which no run of pages is long enough is spread over several: free pages are never of no use because of where they lie
//! (`bounded`: at most [`RUNS_MAX`] runs). Must not know: memory.

/// Bytes of a page: what the smallest request holds, and what the gateway's direct IO wants data to be aligned to.
pub const PAGE_BYTES: usize = 4096;
/// Most runs of one buffer. Data of up to 4 MiB has no more pages; for more a run must have as many pages on average.
pub const RUNS_MAX: usize = 1024;

const BITS: usize = u64::BITS as usize;

/// Pages that follow each other.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Run {
    /// The first one's number.
    pub first: usize,
    /// How many; never 0.
    pub count: usize,
}

impl Run {
    /// The number behind the last one's.
    pub const fn end(self) -> usize {
        self.first + self.count
    }
}

/// The pages of one buffer, in the order of their bytes.
#[derive(PartialEq, Eq, Debug)]
pub enum Runs {
    /// The usual case, which needs no memory.
    One(Run),
    /// More of them.
    Many(Vec<Run>),
}

impl Runs {
    /// All runs.
    pub fn as_slice(&self) -> &[Run] {
        match self {
            Self::One(run) => std::slice::from_ref(run),
            Self::Many(runs) => runs,
        }
    }
}

/// The pages of an area.
#[derive(Debug)]
pub struct Pages {
    /// One bit for each page, set while it is free.
    free: Vec<u64>,
    count: usize,
    /// Free ones.
    left: usize,
    /// None below this one is free.
    lowest: usize,
    /// None from this one up has been taken since the system has had it back.
    touched: usize,
}

impl Pages {
    /// `count` free pages.
    pub fn new(count: usize) -> Self {
        let mut pages = Self { free: vec![0; count.div_ceil(BITS)], count, left: 0, lowest: 0, touched: 0 };
        pages.mark(Run { first: 0, count }, true);
        pages
    }

    /// How many are free.
    pub fn left(&self) -> usize {
        self.left
    }

    /// Takes `count` pages, in one run if there is one; `None` if there are not enough, or only in too many runs.
    pub fn take(&mut self, count: usize) -> Option<Runs> {
        if count == 0 || count > self.left {
            return None;
        }
        self.lowest = self.find(self.lowest, self.count, true);
        let runs = match self.first_fit(count) {
            Some(run) => Runs::One(run),
            None => Runs::Many(self.longest(count)?),
        };
        for run in runs.as_slice() {
            self.mark(*run, false);
            self.touched = self.touched.max(run.end());
        }
        Some(runs)
    }

    /// Makes taken pages free again.
    pub fn give(&mut self, run: Run) {
        self.mark(run, true);
        self.lowest = self.lowest.min(run.first);
    }

    /// Free runs that were taken before, to be given back to the system, which is taken as done.
    pub fn cool(&mut self) -> Vec<Run> {
        let runs: Vec<Run> = self.runs(self.touched).collect();
        if let Some(last) = runs.last().filter(|last| last.end() == self.touched) {
            self.touched = last.first;
        }
        runs
    }

    fn first_fit(&self, count: usize) -> Option<Run> {
        let mut first = self.lowest;
        while first + count <= self.count {
            let end = self.find(first, first + count, false);
            if end == first + count {
                return Some(Run { first, count });
            }
            first = self.find(end, self.count, true);
        }
        None
    }

    /// The longest runs that are `count` pages together, in the order of their numbers.
    fn longest(&self, count: usize) -> Option<Vec<Run>> {
        let mut runs: Vec<Run> = self.runs(self.count).collect();
        runs.sort_unstable_by_key(|run| std::cmp::Reverse(run.count));
        let (mut missing, mut used) = (count, 0);
        for run in &mut runs {
            run.count = run.count.min(missing);
            missing -= run.count;
            used += 1;
            if missing == 0 {
                break;
            }
        }
        if missing > 0 || used > RUNS_MAX {
            return None;
        }
        runs.truncate(used);
        runs.sort_unstable_by_key(|run| run.first);
        Some(runs)
    }

    /// Free runs below `until`.
    fn runs(&self, until: usize) -> impl Iterator<Item = Run> {
        let mut at = 0;
        std::iter::from_fn(move || {
            let first = self.find(at, until, true);
            at = self.find(first, until, false);
            (first < until).then(|| Run { first, count: at - first })
        })
    }

    /// The first page of `from..until` that is free, or that is not; `until` if there is none.
    fn find(&self, from: usize, until: usize, free: bool) -> usize {
        let mut mask = u64::MAX << (from % BITS);
        let mut at = from - from % BITS;
        while at < until {
            let word = self.free[at / BITS];
            let bits = if free { word } else { !word } & mask;
            if bits != 0 {
                return until.min(at + bits.trailing_zeros() as usize);
            }
            mask = u64::MAX;
            at += BITS;
        }
        until
    }

    fn mark(&mut self, run: Run, free: bool) {
        let mut at = run.first;
        while at < run.end() {
            let bit = at % BITS;
            let many = (BITS - bit).min(run.end() - at);
            let mask = u64::MAX >> (BITS - many) << bit;
            let word = &mut self.free[at / BITS];
            debug_assert_eq!(*word & mask, if free { 0 } else { mask }, "pages change hands once");
            *word ^= mask;
            at += many;
        }
        match free {
            true => self.left += run.count,
            false => self.left -= run.count,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pages(runs: &Runs) -> impl Iterator<Item = usize> {
        runs.as_slice().iter().flat_map(|run| run.first..run.end())
    }

    #[test]
    fn the_lowest_come_first_and_are_one_run_where_there_is_one() {
        let mut free = Pages::new(200);
        let taken: Vec<Runs> = [1, 64, 3].map(|count| free.take(count).expect("fits")).into();
        let one = |first, count| Runs::One(Run { first, count });
        assert_eq!(taken, [one(0, 1), one(1, 64), one(65, 3)]);
        taken[1].as_slice().iter().for_each(|run| free.give(*run));
        assert_eq!(free.take(65), Some(one(68, 65)), "the hole is too short");
        assert_eq!(free.take(2), Some(one(1, 2)));
        assert_eq!((free.take(0), free.take(200)), (None, None));
    }

    #[test]
    fn holes_are_used_together() {
        let count = 4 * RUNS_MAX;
        let mut free = Pages::new(count);
        let all: Vec<Runs> = (0..count).map(|_| free.take(1).expect("fits")).collect();
        let odd = all.iter().flat_map(pages).filter(|page| page % 2 == 1);
        odd.for_each(|first| free.give(Run { first, count: 1 }));
        assert_eq!(free.take(RUNS_MAX + 1), None, "more runs than a request may name");
        let spread = free.take(RUNS_MAX).expect("as many as a request may name");
        assert_eq!(spread.as_slice().len(), RUNS_MAX);
        assert_eq!(free.left(), RUNS_MAX);
    }

    #[test]
    fn what_was_used_is_given_back_to_the_system_once() {
        let mut free = Pages::new(1000);
        let (low, high) = (free.take(10).expect("fits"), free.take(100).expect("fits"));
        assert_eq!(free.cool(), []);
        high.as_slice().iter().for_each(|run| free.give(*run));
        assert_eq!(free.cool(), [Run { first: 10, count: 100 }]);
        assert_eq!(free.cool(), [], "nothing was used since");
        low.as_slice().iter().for_each(|run| free.give(*run));
        assert_eq!(free.cool(), [Run { first: 0, count: 10 }]);
    }

    proptest! {
        #[test]
        fn pages_have_one_owner_and_all_come_back(
            count in 1usize..700, steps in proptest::collection::vec((any::<bool>(), 1usize..200), 1..120),
        ) {
            let mut free = Pages::new(count);
            let (mut owned, mut taken) = (vec![false; count], Vec::new());
            for (takes, number) in steps {
                if takes || taken.is_empty() {
                    let left = owned.iter().filter(|owned| !**owned).count();
                    prop_assert_eq!(free.left(), left);
                    let runs = free.take(number);
                    prop_assert_eq!(runs.is_some(), number <= left, "however the free ones lie");
                    let Some(runs) = runs else { continue };
                    prop_assert_eq!(pages(&runs).count(), number);
                    for page in pages(&runs) {
                        prop_assert!(!std::mem::replace(&mut owned[page], true), "page {} is taken", page);
                    }
                    taken.push(runs);
                } else {
                    let runs: Runs = taken.swap_remove(number % taken.len());
                    pages(&runs).for_each(|page| owned[page] = false);
                    runs.as_slice().iter().for_each(|run| free.give(*run));
                }
                let used = owned.iter().rposition(|owned| *owned).map_or(0, |last| last + 1);
                prop_assert!(free.touched >= used);
            }
            for runs in taken {
                runs.as_slice().iter().for_each(|run| free.give(*run));
            }
            prop_assert_eq!(free.take(count), Some(Runs::One(Run { first: 0, count })));
        }
    }
}
