//! A client that writes, reads back and verifies all the time, and knows the longest that it waited.

use anyhow::{Context, bail, ensure};
use spline_conformance::disk::{Disk, Request, same};
use spline_conformance::pattern;
use spline_harness::wait_until;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Requests in flight.
const DEPTH: u64 = 16;
/// Places that are written again and again.
const SLOTS: u64 = 256;
/// Bytes of a request: some pages, so that a torn one would be seen.
const BYTES: usize = 16 << 10;
/// Rounds after which everything is made durable.
const FLUSH_EVERY: u64 = 16;
/// Odd, so that all slots are visited.
const STEP: u64 = 37;
const LIMIT: Duration = Duration::from_secs(60);

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    /// Rounds that were written and verified.
    beats: AtomicU64,
    longest: Mutex<Duration>,
}

/// A load that runs in a thread of its own until it is finished.
#[derive(Debug)]
pub(crate) struct Load {
    name: &'static str,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<anyhow::Result<()>>>,
}

impl Load {
    /// Starts it on the disk that `open` opens, which must hold zeros.
    pub(crate) fn start(
        name: &'static str,
        open: impl FnOnce() -> anyhow::Result<Box<dyn Disk>> + Send + 'static,
    ) -> anyhow::Result<Self> {
        let shared = Arc::new(Shared::default());
        let seen = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            let mut disk = open()?;
            Writer { versions: vec![0; SLOTS as usize], round: 0 }.run(disk.as_mut(), &seen)
        })?;
        let mut load = Self { name, shared, thread: Some(thread) };
        load.wait_for_beats(1)?;
        Ok(load)
    }

    /// Rounds so far.
    pub(crate) fn beats(&self) -> u64 {
        self.shared.beats.load(Ordering::Acquire)
    }

    /// Waits for so many rounds from now.
    pub(crate) fn wait_for_beats(&mut self, count: u64) -> anyhow::Result<()> {
        let wanted = self.beats() + count;
        let shared = Arc::clone(&self.shared);
        let what = format!("rounds of the load: load={}", self.name);
        wait_until(&what, LIMIT, || {
            if self.thread.as_ref().is_none_or(JoinHandle::is_finished) {
                return Ok(Some(()));
            }
            Ok((shared.beats.load(Ordering::Acquire) >= wanted).then_some(()))
        })?;
        if self.beats() < wanted {
            self.end()?;
            bail!("load has ended: load={}", self.name);
        }
        Ok(())
    }

    /// The longest that a round took since this was asked before.
    pub(crate) fn longest(&self) -> Duration {
        std::mem::take(&mut *self.shared.longest.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Stops it; everything is read again first.
    pub(crate) fn finish(mut self) -> anyhow::Result<()> {
        self.shared.stop.store(true, Ordering::Release);
        self.end()
    }

    fn end(&mut self) -> anyhow::Result<()> {
        let thread = self.thread.take().context("it has ended before")?;
        let ended = thread.join().map_err(|_| anyhow::anyhow!("panicked"));
        ended.and_then(|result| result).with_context(|| format!("load={}", self.name))
    }
}

/// What was written where.
struct Writer {
    /// The round that wrote each slot last; 0: none.
    versions: Vec<u64>,
    round: u64,
}

impl Writer {
    fn run(&mut self, disk: &mut dyn Disk, shared: &Shared) -> anyhow::Result<()> {
        let mut since = Instant::now();
        while !shared.stop.load(Ordering::Acquire) {
            self.once(disk).with_context(|| format!("round={}", self.round))?;
            let took = since.elapsed();
            since = Instant::now();
            let mut longest = shared.longest.lock().unwrap_or_else(PoisonError::into_inner);
            *longest = took.max(*longest);
            drop(longest);
            shared.beats.fetch_add(1, Ordering::Release);
        }
        disk.succeed(Request::Flush)?;
        let all: Vec<_> = (0..SLOTS).collect();
        all.chunks(DEPTH as usize).try_for_each(|slots| self.verify(disk, slots))
    }

    fn once(&mut self, disk: &mut dyn Disk) -> anyhow::Result<()> {
        let queues = disk.queues();
        self.round += 1;
        let first = self.round * DEPTH;
        let slots: Vec<_> = (first..first + DEPTH).map(|at| at * STEP % SLOTS).collect();
        let writes = slots.iter().map(|slot| {
            let offset = slot * BYTES as u64;
            (*slot as usize % queues, Request::write(offset, pattern(self.round, offset, BYTES)))
        });
        disk.all_succeed(writes.collect())?;
        for slot in &slots {
            self.versions[*slot as usize] = self.round;
        }
        if self.round.is_multiple_of(FLUSH_EVERY) {
            disk.succeed(Request::Flush)?;
        }
        // What was just written, and what was written half a turn ago.
        let older: Vec<_> = slots.iter().map(|slot| (slot + SLOTS / 2) % SLOTS).collect();
        self.verify(disk, &slots)?;
        self.verify(disk, &older)
    }

    fn verify(&self, disk: &mut dyn Disk, slots: &[u64]) -> anyhow::Result<()> {
        let queues = disk.queues();
        let reads = slots
            .iter()
            .map(|slot| (*slot as usize % queues, Request::read(slot * BYTES as u64, BYTES)))
            .collect();
        let found = disk.all_succeed(reads)?;
        ensure!(found.len() == slots.len(), "answers={} requests={}", found.len(), slots.len());
        for (slot, found) in slots.iter().zip(found) {
            let (offset, version) = (slot * BYTES as u64, self.versions[*slot as usize]);
            let wanted = if version == 0 { vec![0; BYTES] } else { pattern(version, offset, BYTES) };
            same(offset, &found, &wanted).with_context(|| format!("slot={slot} version={version}"))?;
        }
        Ok(())
    }
}
