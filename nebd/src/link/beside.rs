//! The processor of a thread of nebd: that on which the gateway's stays, while it says so.
//!
//! Used by the event loop and by vhost workers, each for its own thread, after requests were shown: a request that is alone then
//! costs two switches between threads instead of waking two processors. Must not know: rings, requests. What the gateway says is
//! a claim: a processor on which this thread may not run is left alone.

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use tracing::info;

/// Where the calling thread is.
#[derive(Debug, Default)]
pub struct Beside {
    /// What the gateway said last.
    told: Option<u32>,
    /// Where this thread is beside the gateway's, and where it may run otherwise.
    elsewhere: Option<(usize, CpuSet)>,
    /// The kernel does not let it.
    refused: bool,
}

impl Beside {
    /// Goes where the gateway stays, or back.
    pub fn keep(&mut self, processor: Option<u32>) {
        if processor == self.told || self.refused {
            return;
        }
        self.told = processor;
        if let Err(error) = self.go(processor) {
            self.refused = true;
            info!(%error, "this thread can not be beside the gateway's, requests that are alone take longer");
        }
    }

    /// Whether this thread is on the processor of the gateway's: what it does keeps that from going on.
    pub fn is(&self) -> bool {
        self.elsewhere.is_some()
    }

    fn go(&mut self, processor: Option<u32>) -> rustix::io::Result<()> {
        if let Some((there, elsewhere)) = self.elsewhere {
            // Whoever gave the thread other processors meanwhile is obeyed.
            if sched_getaffinity(None)? == only(there) {
                sched_setaffinity(None, &elsewhere)?;
            }
            self.elsewhere = None;
        }
        let Some(processor) =
            processor.map(|number| number as usize).filter(|number| *number < CpuSet::MAX_CPU)
        else {
            return Ok(());
        };
        let allowed = sched_getaffinity(None)?;
        if allowed.is_set(processor) {
            sched_setaffinity(None, &only(processor))?;
            self.elsewhere = Some((processor, allowed));
        }
        Ok(())
    }
}

fn only(processor: usize) -> CpuSet {
    let mut only = CpuSet::new();
    only.set(processor);
    only
}

#[cfg(test)]
mod tests {
    use super::*;

    fn processors() -> Vec<u32> {
        let allowed = sched_getaffinity(None).expect("is told");
        (0..CpuSet::MAX_CPU as u32).filter(|number| allowed.is_set(*number as usize)).collect()
    }

    #[test]
    fn a_thread_goes_where_it_is_told_if_it_may_and_back() {
        let passes = std::thread::spawn(|| {
            let own = processors();
            let (first, last) = (own[0], own[own.len() - 1]);
            let foreign = (0..CpuSet::MAX_CPU as u32).find(|number| !own.contains(number)).expect("not all");
            let mut beside = Beside::default();
            for there in [first, last] {
                beside.keep(Some(there));
                assert_eq!(processors(), [there]);
                assert!(beside.is());
            }
            for nowhere in [None, Some(foreign), Some(u32::MAX)] {
                beside.keep(Some(last));
                beside.keep(nowhere);
                assert_eq!(processors(), own, "told={nowhere:?}");
                assert!(!beside.is());
            }
        });
        passes.join().expect("passes");
    }
}
