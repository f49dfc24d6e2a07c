//! Guests that go on asking while something happens to the gateway, and how long they went without an answer.
//!
//! Called by [`crate::upgrade`]. A request that fails is counted, and asking goes on: what is asked for is how many. Must not
//! know: what happens to the gateway.

use crate::guest;
use anyhow::{Context, anyhow, ensure};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use spline_harness::virtio::{Slot, VirtioDisk};
use spline_harness::wait_until;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Bytes of a request.
const BLOCK: usize = 4096;
/// No answer takes this long: a guest without a disk.
const PATIENCE: Duration = Duration::from_secs(60);

/// How a guest asks.
#[derive(Clone, Copy, Debug)]
pub enum Manner {
    /// Reads a random block each millisecond, or as soon as the one before is answered.
    Probe,
    /// Always has this many writes of random blocks in flight.
    Write {
        /// Requests in flight.
        depth: usize,
    },
}

/// The prober's pace.
const EVERY: Duration = Duration::from_millis(1);

#[derive(Debug, Default)]
struct Told {
    answered: AtomicU64,
    errors: AtomicU64,
    /// Longest time between two answers since it was last taken, microseconds.
    longest_us: AtomicU64,
    stop: AtomicBool,
}

/// A guest that asks. Dropping it leaves its thread behind: [`finish`](Self::finish) it.
pub struct Asking {
    told: Arc<Told>,
    thread: JoinHandle<anyhow::Result<()>>,
}

impl Asking {
    /// Connects, writes the first `span` bytes of the disk, and goes on in a thread of its own.
    ///
    /// # Errors
    /// Those of the device.
    pub fn start(socket: &Path, span: u64, manner: Manner) -> anyhow::Result<Self> {
        guest::write_whole(socket, span)?;
        let told = Arc::new(Told::default());
        let (socket, seen) = (socket.to_owned(), Arc::clone(&told));
        // A driver stays on its thread.
        let asks = move || Asker::new(&socket, span, manner, seen)?.run();
        let thread = std::thread::Builder::new().name("guest".into()).spawn(asks)?;
        Ok(Self { told, thread })
    }

    /// The longest time between two answers since this was last asked, or since the start.
    pub fn take_longest(&self) -> Duration {
        Duration::from_micros(self.told.longest_us.swap(0, Ordering::AcqRel))
    }

    /// Waits until `count` more requests are answered.
    ///
    /// # Errors
    /// If they are not.
    pub fn wait_for(&self, count: u64) -> anyhow::Result<()> {
        let wanted = self.told.answered.load(Ordering::Acquire) + count;
        wait_until("a guest's requests to be answered", PATIENCE, || {
            ensure!(!self.thread.is_finished(), "the guest has ended");
            Ok((self.told.answered.load(Ordering::Acquire) >= wanted).then_some(()))
        })
    }

    /// Requests that failed so far.
    pub fn errors(&self) -> u64 {
        self.told.errors.load(Ordering::Acquire)
    }

    /// Requests answered so far.
    pub fn answered(&self) -> u64 {
        self.told.answered.load(Ordering::Acquire)
    }

    /// Lets it end.
    ///
    /// # Errors
    /// Those of the device.
    pub fn finish(self) -> anyhow::Result<()> {
        self.told.stop.store(true, Ordering::Release);
        self.thread.join().map_err(|_| anyhow!("a guest's thread panicked"))?
    }
}

struct Asker {
    disk: VirtioDisk,
    slots: Vec<Slot>,
    manner: Manner,
    blocks: u64,
    random: StdRng,
    told: Arc<Told>,
}

impl Asker {
    fn new(socket: &Path, span: u64, manner: Manner, told: Arc<Told>) -> anyhow::Result<Self> {
        let depth = match manner {
            Manner::Probe => 1,
            Manner::Write { depth } => depth,
        };
        let disk = VirtioDisk::open(socket, guest::wish(depth * BLOCK))?;
        let slots =
            (0..depth).map(|slot| disk.slot(slot * BLOCK, &[BLOCK])).collect::<anyhow::Result<_>>()?;
        let (blocks, random) = (span / BLOCK as u64, StdRng::seed_from_u64(0x5eed));
        Ok(Self { disk, slots, manner, blocks, random, told })
    }

    fn run(mut self) -> anyhow::Result<()> {
        let (mut answers, mut in_flight) = (Vec::new(), self.slots.len());
        (0..in_flight).for_each(|slot| self.ask(slot));
        let (mut last, mut due) = (Instant::now(), Instant::now());
        while in_flight > 0 {
            answers.clear();
            self.disk.reap(0, 1, PATIENCE, &mut answers).context("a guest got no answer")?;
            let now = Instant::now();
            self.told.longest_us.fetch_max((now - last).as_micros() as u64, Ordering::AcqRel);
            last = now;
            for answer in &answers {
                self.told.errors.fetch_add(u64::from(answer.result != 0), Ordering::AcqRel);
            }
            self.told.answered.fetch_add(answers.len() as u64, Ordering::AcqRel);
            if self.told.stop.load(Ordering::Acquire) {
                in_flight -= answers.len();
                continue;
            }
            if matches!(self.manner, Manner::Probe) {
                // What was missed meanwhile is not made up for: one at a time.
                due = (due + EVERY).max(now);
                std::thread::sleep(due - now);
            }
            answers.iter().for_each(|answer| self.ask(answer.tag));
        }
        Ok(())
    }

    fn ask(&mut self, slot: usize) {
        let offset = self.random.random_range(0..self.blocks) * BLOCK as u64;
        match self.manner {
            Manner::Probe => self.disk.read(0, offset, &self.slots[slot], slot),
            Manner::Write { .. } => self.disk.write(0, offset, &self.slots[slot], slot),
        }
    }
}
