//! Whether the thread of a lane stays on the processor where it is, for nebd to come to it.
//!
//! A request that is alone passes from nebd to this thread and back. Between two processors each of these wakes costs up to 30 µs
//! on a virtual machine, because one of them has to be fetched out of its sleep; on one processor it is a switch between
//! threads. So while its links have few requests under way a thread stays where the scheduler has put it, and nebd is
//! told where that is. With more of them both run at once, wherever the scheduler wants them.
//!
//! Used by the link's `ring`, on the threads of [`threads`](super::threads). Must not know: requests, rings. `bounded`: a stay ends
//! after [`LONGEST`], so that the scheduler can put both where there is less to do.

use prometheus_client::metrics::gauge::Gauge;
use rustix::thread::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};
use std::cell::RefCell;
use std::time::{Duration, Instant};
use tracing::{debug, warn};

/// Most requests of all links of a thread that a stay begins with: one of a guest, and one that overlaps it.
const FEW: usize = 2;
/// With more it ends: then two processors do more than one.
const MANY: usize = 4;
/// Data of a request, bytes, from which copying it takes longer than waking a processor: nebd copies while this thread goes on.
const LARGE: u32 = 128 << 10;
/// For so long there are no more than [`FEW`] before it begins: thousands of times what its beginning and end cost.
const CALM: Duration = Duration::from_millis(2);
/// Longest stay.
const LONGEST: Duration = Duration::from_secs(1);

/// When a thread stays. Pure.
#[derive(Debug, Default)]
struct Stay {
    calm: Option<Instant>,
    since: Option<Instant>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Change {
    Begin,
    End,
}

impl Stay {
    /// The thread has `open` requests under way.
    fn heed(&mut self, open: usize, now: Instant) -> Option<Change> {
        if let Some(since) = self.since {
            if open <= MANY && now.saturating_duration_since(since) < LONGEST {
                return None;
            }
            *self = Self::default();
            return Some(Change::End);
        }
        if open > FEW {
            self.calm = None;
            return None;
        }
        let calm = *self.calm.get_or_insert(now);
        if now.saturating_duration_since(calm) < CALM {
            return None;
        }
        self.since = Some(now);
        Some(Change::Begin)
    }
}

/// A thread that may stay.
#[derive(Debug, Default)]
struct Thread {
    open: usize,
    stay: Stay,
    /// Where it stays, and where it may run otherwise.
    at: Option<(u32, CpuSet)>,
    /// The kernel does not let it.
    refused: bool,
}

thread_local! {
    static THREAD: RefCell<Option<Thread>> = const { RefCell::new(None) };
}

/// Lets the calling thread stay; its links say what they have under way.
pub(super) fn allow() {
    THREAD.set(Some(Thread::default()));
}

/// What a thread is to call that one which stays may have started: it would stay there for good.
pub(super) fn not_with_its_parent() -> impl Fn() + Send + Sync + 'static {
    let allowed = sched_getaffinity(None);
    move || {
        if let Ok(allowed) = &allowed {
            // Refused as its parent is, which then does not stay.
            let _ = sched_setaffinity(None, allowed);
        }
    }
}

impl Thread {
    fn heed(&mut self, large: bool, now: Instant) {
        if self.refused {
            return;
        }
        match self.stay.heed(if large { MANY + 1 } else { self.open }, now) {
            None => {}
            Some(Change::Begin) => match stay_here() {
                Ok(at) => self.at = Some(at),
                Err(error) => {
                    self.refused = true;
                    warn!(
                        %error,
                        "a thread for links can not stay on its processor, requests that are alone take longer; allow \
                         sched_setaffinity or set stay_on_processor = false"
                    );
                }
            },
            Some(Change::End) => {
                if let Some((processor, allowed)) = self.at.take()
                    && let Err(error) = sched_setaffinity(None, &allowed)
                {
                    // Who took the others away has told the kernel where it may run instead.
                    debug!(processor, %error, "a thread for links is where it may be");
                }
            }
        }
    }
}

fn stay_here() -> rustix::io::Result<(u32, CpuSet)> {
    let allowed = sched_getaffinity(None)?;
    let processor = sched_getcpu();
    if processor >= CpuSet::MAX_CPU {
        return Err(rustix::io::Errno::INVAL);
    }
    let mut only = CpuSet::new();
    only.set(processor);
    sched_setaffinity(None, &only)?;
    // Less than MAX_CPU.
    Ok((processor as u32, allowed))
}

/// A link's part of what its thread has under way.
#[derive(Debug)]
pub(super) struct Share {
    open: usize,
    /// As nebd was told.
    told: Option<u32>,
    /// Links whose nebd was told a processor.
    staying: Gauge,
}

impl Share {
    pub(super) fn new(staying: Gauge) -> Self {
        Self { open: 0, told: None, staying }
    }

    /// The link has `open` requests under way, and has just taken one with `bytes` of data. Answers what nebd is to be told, if it
    /// is something new: the processor on which the thread stays, or that it does not.
    pub(super) fn heed(&mut self, open: usize, bytes: u32, now: Instant) -> Option<Option<u32>> {
        let before = std::mem::replace(&mut self.open, open);
        let processor = THREAD.with_borrow_mut(|thread| {
            let thread = thread.as_mut()?;
            thread.open = (thread.open + open).saturating_sub(before);
            thread.heed(bytes >= LARGE, now);
            thread.at.as_ref().map(|(processor, _)| *processor)
        });
        if processor == self.told {
            return None;
        }
        match (self.told, processor) {
            (None, Some(_)) => drop(self.staying.inc()),
            (Some(_), None) => drop(self.staying.dec()),
            _ => {}
        }
        self.told = processor;
        Some(processor)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        if self.told.is_some() {
            self.staying.dec();
        }
        let open = self.open;
        // A thread that ends may have forgotten its own before it drops its links.
        let _ = THREAD.try_with(|thread| {
            if let Some(thread) = thread.borrow_mut().as_mut() {
                thread.open = thread.open.saturating_sub(open);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(count: u64) -> Duration {
        Duration::from_millis(count)
    }

    #[test]
    fn a_stay_begins_when_it_is_calm_and_ends_when_it_is_not_or_after_a_while() {
        let (mut stay, start) = (Stay::default(), Instant::now());
        assert_eq!(stay.heed(1, start), None, "not yet");
        assert_eq!(stay.heed(FEW + 1, start + ms(1)), None, "not calm");
        assert_eq!(stay.heed(FEW, start + ms(2)), None, "calm anew");
        assert_eq!(stay.heed(0, start + ms(3)), None);
        assert_eq!(stay.heed(1, start + ms(4)), Some(Change::Begin));
        assert_eq!(stay.heed(MANY, start + ms(5)), None, "a few more do not end it");
        assert_eq!(stay.heed(MANY + 1, start + ms(6)), Some(Change::End));
        assert_eq!(stay.heed(MANY + 1, start + ms(60)), None);
        assert_eq!(stay.heed(1, start + ms(70)), None);
        let begun = start + ms(72);
        assert_eq!(stay.heed(1, begun), Some(Change::Begin));
        assert_eq!(stay.heed(1, begun + LONGEST - ms(1)), None);
        assert_eq!(stay.heed(1, begun + LONGEST), Some(Change::End), "the scheduler has its turn");
        assert_eq!(stay.heed(1, begun + LONGEST), None);
        assert_eq!(stay.heed(1, begun + LONGEST + CALM), Some(Change::Begin));
    }

    fn processors() -> u32 {
        sched_getaffinity(None).expect("is told").count()
    }

    #[test]
    fn a_thread_stays_for_all_its_links_and_leaves_for_one() {
        let own = processors();
        let staying = Gauge::default();
        let thread = std::thread::spawn({
            let staying = staying.clone();
            move || {
                let start = Instant::now();
                let mut elsewhere = Share::new(staying.clone());
                assert_eq!(elsewhere.heed(1, 0, start), None);
                assert_eq!(
                    elsewhere.heed(1, 0, start + CALM),
                    None,
                    "only threads that are allowed to stay do"
                );
                drop(elsewhere);
                allow();
                let (mut one, mut other) = (Share::new(staying.clone()), Share::new(staying.clone()));
                assert_eq!(one.heed(1, 0, start), None);
                let told = one.heed(1, 0, start + CALM).expect("something new");
                assert_eq!(told, Some(sched_getcpu() as u32), "where it is");
                assert_eq!(processors(), 1);
                assert_eq!(other.heed(1, 0, start + CALM), Some(told), "the other's nebd is told too");
                assert_eq!(staying.get(), 2);
                assert_eq!(other.heed(MANY, 0, start + CALM), Some(None), "together they have many");
                assert_eq!(processors(), own);
                assert_eq!(one.heed(1, 0, start + CALM), Some(None));
                assert_eq!(staying.get(), 0);
                drop(other);
                assert_eq!(one.heed(1, 0, start + CALM), None);
                assert!(
                    one.heed(1, 0, start + CALM * 2).is_some(),
                    "what a link had that is gone does not count"
                );
            }
        });
        thread.join().expect("passes");
        assert_eq!(staying.get(), 0);
    }
}
