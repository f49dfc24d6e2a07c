//! Whether the thread of a lane stays on the processor where it is, for nebd to come to it.
//!
//! A request that is alone passes from nebd to this thread and back. Between two processors each of these wakes costs up to 30 µs
//! on a virtual machine, because one of them has to be fetched out of its sleep; on one processor it is a switch between
//! threads. So while its links have few small requests under way a thread stays where the scheduler has put it, and nebd is
//! told where that is. With more of them both run at once, wherever the scheduler wants them.
//!
//! Used by the link's `ring`, on the threads of [`threads`](super::threads). Must not know: requests, rings. `bounded`: a stay ends
//! with the first request after [`LONGEST`], so that the scheduler can put both where there is less to do; one thread stays on a
//! processor.

use prometheus_client::metrics::gauge::Gauge;
use rustix::thread::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};
use std::cell::RefCell;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tracing::{debug, warn};

/// Most weight of all links of a thread that a stay begins with: a small request of a guest, and one that overlaps it.
const FEW: usize = 2;
/// With more it ends: then two processors do more than one.
const MANY: usize = 4;
/// Data that weighs as much as a request, bytes: nebd copies that of NBD clients, in a time in which this thread could go on.
const WEIGHT_BYTES: u64 = 16 << 10;
/// For so long there is no more than [`FEW`] before it begins: many times what its beginning and end cost.
const CALM: Duration = Duration::from_millis(2);
/// A stay ends with the first request after this time. Quick requests further apart begin none.
const LONGEST: Duration = Duration::from_secs(1);

/// What a link has under way, as far as two processors would help: `requests`, with `bytes` of data.
pub(super) fn weight(requests: usize, bytes: u64) -> usize {
    // No more bytes than are admitted.
    requests.max((bytes / WEIGHT_BYTES) as usize)
}

/// What has just changed what is under way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Moment {
    /// Requests were taken.
    Taken,
    /// Requests ended. A stay begins only now: a disk that wakes the thread draws it to the processor of its interrupt, where it
    /// wakes no second one. What ends in the turn that took it counts too.
    Ended,
}

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
    /// The thread has so much under way.
    fn heed(&mut self, moment: Moment, weight: usize, now: Instant) -> Option<Change> {
        if let Some(since) = self.since {
            if weight <= MANY && now.saturating_duration_since(since) < LONGEST {
                return None;
            }
            *self = Self::default();
            return Some(Change::End);
        }
        if weight > FEW {
            self.calm = None;
            return None;
        }
        let calm = *self.calm.get_or_insert(now);
        let lasted = now.saturating_duration_since(calm);
        if lasted >= LONGEST {
            // Nothing was asked for meanwhile.
            self.calm = Some(now);
        }
        if moment == Moment::Taken || lasted < CALM || lasted >= LONGEST {
            return None;
        }
        self.since = Some(now);
        Some(Change::Begin)
    }
}

/// Processors on which a thread of a gateway stays: each has one at most.
#[derive(Clone, Debug, Default)]
pub(super) struct Taken(Arc<Mutex<Vec<usize>>>);

impl Taken {
    fn list(&self) -> MutexGuard<'_, Vec<usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A thread's place on a processor; given back when it is dropped.
#[derive(Debug)]
struct Place {
    taken: Taken,
    processor: usize,
    /// Where the thread may run otherwise.
    allowed: CpuSet,
}

impl Place {
    /// Keeps the calling thread where it is; `None` if another one stays there.
    fn take(taken: &Taken) -> rustix::io::Result<Option<Self>> {
        let allowed = sched_getaffinity(None)?;
        let processor = sched_getcpu();
        if processor >= CpuSet::MAX_CPU {
            return Err(rustix::io::Errno::INVAL);
        }
        let mut list = taken.list();
        if list.contains(&processor) {
            return Ok(None);
        }
        sched_setaffinity(None, &only(processor))?;
        list.push(processor);
        Ok(Some(Self { taken: taken.clone(), processor, allowed }))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.taken.list().retain(|taken| *taken != self.processor);
        // Whoever gave the thread other processors meanwhile is obeyed.
        if sched_getaffinity(None) == Ok(only(self.processor))
            && let Err(error) = sched_setaffinity(None, &self.allowed)
        {
            debug!(processor = self.processor, %error, "a thread for links is where it may be");
        }
    }
}

fn only(processor: usize) -> CpuSet {
    let mut only = CpuSet::new();
    only.set(processor);
    only
}

/// A thread that may stay.
#[derive(Debug, Default)]
struct Thread {
    taken: Taken,
    links: usize,
    weight: usize,
    stay: Stay,
    place: Option<Place>,
    /// The kernel does not let it.
    refused: bool,
}

thread_local! {
    static THREAD: RefCell<Option<Thread>> = const { RefCell::new(None) };
}

/// Lets the calling thread stay; its links say what they have under way.
pub(super) fn allow(taken: Taken) {
    THREAD.set(Some(Thread { taken, ..Thread::default() }));
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
    fn heed(&mut self, moment: Moment, now: Instant) {
        if self.refused {
            return;
        }
        match self.stay.heed(moment, self.weight, now) {
            None => {}
            Some(Change::End) => self.place = None,
            Some(Change::Begin) => match Place::take(&self.taken) {
                Ok(Some(place)) => self.place = Some(place),
                // The scheduler has put both there; it may see to it until the next time.
                Ok(None) => self.stay = Stay::default(),
                Err(error) => {
                    self.refused = true;
                    warn!(
                        %error,
                        "a thread for links can not stay on its processor, requests that are alone take longer; to be \
                         without this set stay_on_processor = false"
                    );
                }
            },
        }
    }

    fn processor(&self) -> Option<u32> {
        // Less than MAX_CPU.
        self.place.as_ref().map(|place| place.processor as u32)
    }

    fn leave(&mut self, weight: usize) {
        self.weight = self.weight.saturating_sub(weight);
        self.links = self.links.saturating_sub(1);
        if self.links == 0 {
            (self.stay, self.place) = (Stay::default(), None);
        }
    }
}

/// A link's part of what its thread has under way.
#[derive(Debug)]
pub(super) struct Share {
    weight: usize,
    /// As nebd was told.
    told: Option<u32>,
    /// Links whose nebd was told a processor.
    staying: Gauge,
}

impl Share {
    /// That of a link on the calling thread, where it is used and dropped.
    pub(super) fn new(staying: Gauge) -> Self {
        THREAD.with_borrow_mut(|thread| {
            if let Some(thread) = thread {
                thread.links += 1;
            }
        });
        Self { weight: 0, told: None, staying }
    }

    /// The link has so much under way ([`weight`]). Answers what nebd is to be told, if it is something new: the processor on
    /// which the thread stays, or that it does not.
    pub(super) fn heed(&mut self, moment: Moment, weight: usize, now: Instant) -> Option<Option<u32>> {
        let before = std::mem::replace(&mut self.weight, weight);
        let processor = THREAD.with_borrow_mut(|thread| {
            let thread = thread.as_mut()?;
            thread.weight = (thread.weight + weight).saturating_sub(before);
            thread.heed(moment, now);
            thread.processor()
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
        let weight = self.weight;
        // A thread that ends may have forgotten its own before it drops its links.
        let _ = THREAD.try_with(|thread| {
            if let Some(thread) = thread.borrow_mut().as_mut() {
                thread.leave(weight);
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
        assert_eq!(stay.heed(Moment::Ended, 1, start), None, "not yet");
        assert_eq!(stay.heed(Moment::Taken, FEW + 1, start + ms(1)), None, "not calm");
        assert_eq!(stay.heed(Moment::Ended, FEW, start + ms(2)), None, "calm anew");
        assert_eq!(stay.heed(Moment::Ended, 0, start + ms(3)), None);
        assert_eq!(stay.heed(Moment::Taken, 1, start + ms(4)), None, "where nebd has woken it");
        assert_eq!(stay.heed(Moment::Ended, 0, start + ms(4)), Some(Change::Begin));
        assert_eq!(stay.heed(Moment::Taken, MANY, start + ms(5)), None, "a few more do not end it");
        assert_eq!(stay.heed(Moment::Taken, MANY + 1, start + ms(6)), Some(Change::End));
        assert_eq!(stay.heed(Moment::Ended, MANY + 1, start + ms(60)), None);
        assert_eq!(stay.heed(Moment::Ended, 1, start + ms(70)), None);
        let begun = start + ms(72);
        assert_eq!(stay.heed(Moment::Ended, 1, begun), Some(Change::Begin));
        assert_eq!(stay.heed(Moment::Ended, 1, begun + LONGEST - ms(1)), None);
        assert_eq!(
            stay.heed(Moment::Taken, 1, begun + LONGEST),
            Some(Change::End),
            "the scheduler has its turn"
        );
        assert_eq!(stay.heed(Moment::Taken, 1, begun + LONGEST), None);
        assert_eq!(stay.heed(Moment::Ended, 1, begun + LONGEST + CALM), Some(Change::Begin));
    }

    #[test]
    fn large_requests_and_rare_ones_begin_no_stay() {
        let (mut stay, mut now) = (Stay::default(), Instant::now());
        let large = weight(1, 128 << 10);
        assert!(large > MANY && weight(1, 4096) == 1 && weight(3, 4096) == 3 && weight(0, 0) == 0);
        for _ in 0..10 {
            assert_eq!(stay.heed(Moment::Taken, large, now), None);
            now += ms(5);
            assert_eq!(stay.heed(Moment::Ended, 0, now), None, "it was under way until now");
            now += ms(1);
        }
        for _ in 0..10 {
            now += LONGEST;
            assert_eq!(stay.heed(Moment::Taken, 1, now), None);
            assert_eq!(stay.heed(Moment::Ended, 0, now + ms(1)), None);
        }
    }

    fn processors() -> CpuSet {
        sched_getaffinity(None).expect("is told")
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
                assert_eq!(elsewhere.heed(Moment::Ended, 1, start), None);
                assert_eq!(
                    elsewhere.heed(Moment::Ended, 1, start + CALM),
                    None,
                    "only threads that are allowed to stay do"
                );
                drop(elsewhere);
                allow(Taken::default());
                let (mut one, mut other) = (Share::new(staying.clone()), Share::new(staying.clone()));
                assert_eq!(one.heed(Moment::Ended, 1, start), None);
                let told = one.heed(Moment::Ended, 1, start + CALM).expect("something new");
                assert_eq!(told, Some(sched_getcpu() as u32), "where it is");
                assert_eq!(processors().count(), 1);
                assert_eq!(
                    other.heed(Moment::Ended, 1, start + CALM),
                    Some(told),
                    "the other's nebd is told too"
                );
                assert_eq!(staying.get(), 2);
                assert_eq!(
                    other.heed(Moment::Ended, MANY, start + CALM),
                    Some(None),
                    "together they have many"
                );
                assert_eq!(processors(), own);
                assert_eq!(one.heed(Moment::Ended, 1, start + CALM), Some(None));
                assert_eq!(staying.get(), 0);
                drop(other);
                assert_eq!(one.heed(Moment::Ended, 1, start + CALM), None);
                assert!(
                    one.heed(Moment::Ended, 1, start + CALM * 2).is_some(),
                    "what a link had that is gone does not count"
                );
                assert_eq!(processors().count(), 1);
                drop(one);
                assert_eq!(processors(), own, "nobody is left to stay for");
            }
        });
        thread.join().expect("passes");
        assert_eq!(staying.get(), 0);
    }

    #[test]
    fn a_processor_is_stayed_on_by_one_and_what_an_operator_changes_is_left_alone() {
        let thread = std::thread::spawn(|| {
            let own = processors();
            let taken = Taken::default();
            let place = Place::take(&taken).expect("may").expect("nobody is here");
            let there = place.processor;
            let others = taken.clone();
            let also = std::thread::spawn(move || Place::take(&others).expect("may").map(|it| it.processor));
            assert_eq!(also.join().expect("passes"), None, "it has inherited where it runs");
            drop(place);
            assert_eq!(processors(), own);
            let place = Place::take(&taken).expect("may").expect("is free again");
            sched_setaffinity(None, &own).expect("may");
            let mut fewer = own;
            if own.count() > 1 {
                fewer.unset(there);
                sched_setaffinity(None, &fewer).expect("may");
            }
            drop(place);
            assert_eq!(processors(), fewer);
        });
        thread.join().expect("passes");
    }
}
