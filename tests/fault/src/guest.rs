//! The workload of [`workload`](crate::workload) as a guest sends it: over virtqueues, with its data in its own memory.
//!
//! A guest's disk is never connected anew: a request that is not answered, or answered with an error, is a defect.

use crate::block;
use crate::history::History;
use crate::workload::{BLOCKS, DEPTH, EXPORT_BYTES, RECOVERY_LIMIT, offset};
use anyhow::{Context, bail, ensure};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use spline_harness::virtio::{Slot, VirtioDisk, Wish};
use spline_harness::wait_until;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

#[derive(Debug, Default)]
struct Told {
    answered: AtomicU64,
    /// Longest that the guest has gone without an answer, microseconds.
    longest_gap: AtomicU64,
    stop: AtomicBool,
}

/// A running workload of a guest.
pub struct GuestLoad {
    told: Arc<Told>,
    thread: JoinHandle<anyhow::Result<History>>,
}

impl GuestLoad {
    /// Starts on the socket of an export; `seed` decides the order of blocks.
    pub fn start(socket: &Path, history: History, seed: u64) -> Self {
        let told = Arc::new(Told::default());
        let (socket, seen) = (socket.to_owned(), Arc::clone(&told));
        let thread = std::thread::spawn(move || {
            let outcome = Runner::new(socket, history, seed, seen).and_then(Runner::run);
            if let Err(error) = &outcome {
                // Whoever waits for progress meanwhile is told no more than that there is none.
                eprintln!("guest's workload: {error:#}");
            }
            outcome
        });
        Self { told, thread }
    }

    /// Waits until `count` more requests are answered.
    ///
    /// # Errors
    /// If they are not in time, or the workload has found a defect.
    pub fn wait_for_progress(&self, count: u64) -> anyhow::Result<()> {
        let answered = || self.told.answered.load(Ordering::Acquire);
        let wanted = answered() + count;
        wait_until("a guest's requests to be answered", RECOVERY_LIMIT, || {
            Ok((answered() >= wanted || self.thread.is_finished()).then_some(()))
        })?;
        ensure!(answered() >= wanted, "workload ended: answered={}", answered());
        Ok(())
    }

    /// Longest that the guest, with its queue full, has gone without an answer so far.
    pub fn longest_gap(&self) -> Duration {
        Duration::from_micros(self.told.longest_gap.load(Ordering::Acquire))
    }

    /// Stops sending, waits for every answer, reads all blocks and answers the history.
    ///
    /// # Errors
    /// The defect that was found.
    pub fn finish(self) -> anyhow::Result<History> {
        self.told.stop.store(true, Ordering::Release);
        match self.thread.join() {
            Ok(outcome) => outcome,
            Err(_) => bail!("workload panicked"),
        }
    }
}

#[derive(Clone, Copy)]
struct Request {
    block: usize,
    is_read: bool,
}

struct Runner {
    disk: VirtioDisk,
    /// Where each request's data lies.
    places: Vec<Slot>,
    requests: Vec<Option<Request>>,
    history: History,
    random: StdRng,
    told: Arc<Told>,
}

impl Runner {
    fn new(socket: PathBuf, history: History, seed: u64, told: Arc<Told>) -> anyhow::Result<Self> {
        let wish = Wish { queues: 1, queue_size: 128, read_only: false, memory: DEPTH * block::BYTES };
        let disk = VirtioDisk::open(&socket, wish)?;
        ensure!(disk.facts().size >= EXPORT_BYTES, "disk is too small: bytes={}", disk.facts().size);
        let place = |at| disk.slot(at * block::BYTES, &[block::BYTES]);
        let places = (0..DEPTH).map(place).collect::<anyhow::Result<_>>()?;
        let random = StdRng::seed_from_u64(seed);
        Ok(Self { disk, places, requests: vec![None; DEPTH], history, random, told })
    }

    fn run(mut self) -> anyhow::Result<History> {
        for slot in 0..DEPTH {
            self.issue(slot)?;
        }
        let (mut answers, mut last) = (Vec::new(), Instant::now());
        while self.requests.iter().any(Option::is_some) {
            self.disk.reap(0, 1, RECOVERY_LIMIT, &mut answers)?;
            let gap = std::mem::replace(&mut last, Instant::now()).elapsed().as_micros() as u64;
            self.told.longest_gap.fetch_max(gap, Ordering::AcqRel);
            for answer in std::mem::take(&mut answers) {
                ensure!(answer.result == 0, "guest got an error: result={}", answer.result);
                self.complete(answer.tag)?;
                if !self.told.stop.load(Ordering::Acquire) {
                    self.issue(answer.tag)?;
                }
            }
        }
        for number in 0..BLOCKS {
            self.read(0, number);
            self.disk.reap(0, 1, RECOVERY_LIMIT, &mut answers)?;
            let answer = answers.pop().context("an answer")?;
            ensure!(answer.result == 0 && answers.is_empty(), "answer={answer:?}");
            self.complete(0)?;
        }
        Ok(self.history)
    }

    fn read(&mut self, slot: usize, block: usize) {
        self.requests[slot] = Some(Request { block, is_read: true });
        self.disk.read(0, offset(block), &self.places[slot], slot);
    }

    /// Asks for a block that has no request in flight; two of three are writes.
    fn issue(&mut self, slot: usize) -> anyhow::Result<()> {
        let block = loop {
            let block = self.random.random_range(0..BLOCKS);
            if !self.requests.iter().flatten().any(|request| request.block == block) {
                break block;
            }
        };
        if self.random.random_range(0..3) == 0 {
            self.read(slot, block);
            return Ok(());
        }
        let data = block::fill(block as u64, self.history.begin_write(block));
        self.disk.fill(slot * block::BYTES, &data)?;
        self.requests[slot] = Some(Request { block, is_read: false });
        self.disk.write(0, offset(block), &self.places[slot], slot);
        Ok(())
    }

    fn complete(&mut self, slot: usize) -> anyhow::Result<()> {
        let request = self.requests.get_mut(slot).and_then(Option::take);
        let Request { block, is_read } = request.context("answered twice: complete_once")?;
        if is_read {
            let mut bytes = vec![0; block::BYTES];
            self.disk.take(slot * block::BYTES, &mut bytes)?;
            let version = block::read(block as u64, &bytes).map_err(anyhow::Error::msg)?;
            self.history.read(block, version).map_err(anyhow::Error::msg)?;
        } else {
            self.history.acknowledged(block);
        }
        self.told.answered.fetch_add(1, Ordering::AcqRel);
        Ok(())
    }
}
