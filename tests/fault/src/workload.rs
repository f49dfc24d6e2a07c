//! Random reads and writes of numbered blocks, 32 at a time, on an export whose makers are being killed.
//!
//! One thread owns the history and the connection's both halves; the test watches the number of acknowledgements. If
//! nebd itself dies, the connection ends: what was unanswered is of unknown outcome, and a new connection goes on.

use crate::block;
use crate::history::History;
use anyhow::{Context, bail, ensure};
use rand::RngExt;
use rand::SeedableRng;
use rand::rngs::StdRng;
use spline_harness::nbd::{Connection, Kind, Receiver, Sender};
use spline_harness::wait_until;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Requests in flight.
pub const DEPTH: usize = 32;
/// Blocks of the workload.
pub const BLOCKS: usize = 512;
/// Bytes that the export must have: blocks lie in groups of four, a MiB apart, and so in eight chunks.
pub const EXPORT_BYTES: u64 = (BLOCKS as u64 / 4) << 20;
/// Time in which a killed part and its clients must be back. Far above the real time: the machine may be slow.
pub const RECOVERY_LIMIT: Duration = Duration::from_secs(90);

/// Where a block lies.
pub(crate) fn offset(number: usize) -> u64 {
    ((number as u64 / 4) << 20) + (number as u64 % 4) * block::BYTES as u64
}

/// How long a request waited for its answer, over reconnections: what a guest notices.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Wait {
    /// When it was asked for.
    pub since: Instant,
    /// And for how long.
    pub time: Duration,
}

/// What the running workload tells.
#[derive(Debug, Default)]
struct Told {
    answered: AtomicU64,
    reconnected: AtomicU64,
    /// Of every request that was answered.
    waits: Mutex<Vec<Wait>>,
    stop: AtomicBool,
    /// Ends of the connection that are not a defect: the test kills nebd.
    nebd_may_die: AtomicBool,
}

impl Told {
    fn waits(&self) -> MutexGuard<'_, Vec<Wait>> {
        self.waits.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A running workload.
pub struct Workload {
    told: Arc<Told>,
    thread: JoinHandle<anyhow::Result<History>>,
}

impl Workload {
    /// Starts on an export; `seed` decides the order of blocks.
    pub fn start(socket: &Path, export: &str, history: History, seed: u64) -> Self {
        let told = Arc::new(Told::default());
        let runner = Runner {
            socket: socket.to_owned(),
            export: export.to_owned(),
            history,
            random: StdRng::seed_from_u64(seed),
            slots: vec![None; DEPTH],
            waiting_since: None,
            told: Arc::clone(&told),
        };
        let thread = std::thread::spawn(move || {
            let outcome = runner.run();
            if let Err(error) = &outcome {
                // Whoever waits for progress meanwhile is told no more than that there is none.
                eprintln!("workload: {error:#}");
            }
            outcome
        });
        Self { told, thread }
    }

    /// Requests answered so far.
    pub fn answered(&self) -> u64 {
        self.told.answered.load(Ordering::Acquire)
    }

    /// Times it has connected anew.
    pub fn reconnected(&self) -> u64 {
        self.told.reconnected.load(Ordering::Acquire)
    }

    /// Longest that a request has waited for its answer so far.
    pub fn longest_wait(&self) -> Duration {
        self.told.waits().iter().map(|wait| wait.time).max().unwrap_or_default()
    }

    /// All waits that ended since this was asked before.
    pub fn take_waits(&self) -> Vec<Wait> {
        std::mem::take(&mut *self.told.waits())
    }

    /// From now on the end of the connection is no defect.
    pub fn expect_nebd_to_die(&self) {
        self.told.nebd_may_die.store(true, Ordering::Release);
    }

    /// Waits until `count` more requests are answered.
    ///
    /// # Errors
    /// If they are not in time, or the workload has found a defect.
    pub fn wait_for_progress(&self, count: u64) -> anyhow::Result<()> {
        let wanted = self.answered() + count;
        wait_until("requests to be answered", RECOVERY_LIMIT, || {
            Ok((self.answered() >= wanted || self.thread.is_finished()).then_some(()))
        })?;
        ensure!(self.answered() >= wanted, "workload ended: answered={}", self.answered());
        Ok(())
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

/// Reads every block once and judges it.
///
/// # Errors
/// The first block that shows what it must not.
pub fn verify(socket: &Path, export: &str, history: &mut History) -> anyhow::Result<()> {
    let mut connection = Connection::open(socket, export, RECOVERY_LIMIT)?;
    for number in 0..history.blocks() {
        let bytes = connection.succeed(Kind::Read, offset(number), block::BYTES as u32, &[])?;
        let version = block::read(number as u64, &bytes).map_err(anyhow::Error::msg)?;
        history.read(number, version).map_err(anyhow::Error::msg)?;
    }
    connection.close()
}

#[derive(Clone, Copy, Debug)]
struct Request {
    block: usize,
    is_read: bool,
    /// Sent then.
    since: Instant,
}

struct Runner {
    socket: PathBuf,
    export: String,
    history: History,
    random: StdRng,
    /// What is in flight; the cookie is the position.
    slots: Vec<Option<Request>>,
    /// Since when the oldest request of a connection that ended has waited; until the next answer.
    waiting_since: Option<Instant>,
    told: Arc<Told>,
}

impl Runner {
    fn run(mut self) -> anyhow::Result<History> {
        while !self.serve_connection()? {
            self.told.reconnected.fetch_add(1, Ordering::AcqRel);
        }
        verify(&self.socket, &self.export, &mut self.history)?;
        Ok(self.history)
    }

    /// Runs on one connection; answers whether the work is done, not only the connection.
    fn serve_connection(&mut self) -> anyhow::Result<bool> {
        let connection = wait_until("a connection", RECOVERY_LIMIT, || {
            Connection::open(&self.socket, &self.export, RECOVERY_LIMIT).map(Some)
        })?;
        ensure!(connection.size() >= EXPORT_BYTES, "export is too small: bytes={}", connection.size());
        let (mut sender, mut receiver) = connection.split()?;
        for slot in 0..DEPTH {
            if self.issue(&mut sender, slot).is_err() {
                return self.connection_lost();
            }
        }
        while self.slots.iter().any(Option::is_some) {
            let Ok(Some(reply)) = receiver.reply() else { return self.connection_lost() };
            ensure!(reply.errno == 0, "client got an error: errno={} cookie={}", reply.errno, reply.cookie);
            let slot = usize::try_from(reply.cookie)?;
            if !self.complete(&mut receiver, slot)? {
                return self.connection_lost();
            }
            if !self.told.stop.load(Ordering::Acquire) && self.issue(&mut sender, slot).is_err() {
                return self.connection_lost();
            }
        }
        Ok(true)
    }

    /// Sends a request for a block that has none in flight; two of three are writes.
    fn issue(&mut self, sender: &mut Sender, slot: usize) -> anyhow::Result<()> {
        let block = loop {
            let block = self.random.random_range(0..BLOCKS);
            if !self.slots.iter().flatten().any(|request| request.block == block) {
                break block;
            }
        };
        let is_read = self.random.random_range(0..3) == 0;
        let since = self.waiting_since.unwrap_or_else(Instant::now);
        self.slots[slot] = Some(Request { block, is_read, since });
        let (kind, data) = match is_read {
            true => (Kind::Read, Vec::new()),
            false => (Kind::Write, block::fill(block as u64, self.history.begin_write(block))),
        };
        sender.send(kind, slot as u64, offset(block), block::BYTES as u32, &data)
    }

    /// Takes an answer; false if the connection ended in the middle of it.
    fn complete(&mut self, receiver: &mut Receiver, slot: usize) -> anyhow::Result<bool> {
        let request = self.slots.get_mut(slot).context("unknown cookie")?;
        let request = *request.as_ref().context("answered twice: complete_once")?;
        if request.is_read {
            let mut bytes = vec![0; block::BYTES];
            if receiver.data(&mut bytes).is_err() {
                return Ok(false);
            }
            let version = block::read(request.block as u64, &bytes).map_err(anyhow::Error::msg)?;
            self.history.read(request.block, version).map_err(anyhow::Error::msg)?;
        } else {
            self.history.acknowledged(request.block);
        }
        self.slots[slot] = None;
        self.waiting_since = None;
        self.told.waits().push(Wait { since: request.since, time: request.since.elapsed() });
        self.told.answered.fetch_add(1, Ordering::AcqRel);
        Ok(true)
    }

    /// The connection ended: a defect, unless the test kills nebd. Never means that the work is done.
    fn connection_lost(&mut self) -> anyhow::Result<bool> {
        ensure!(
            self.told.nebd_may_die.load(Ordering::Acquire),
            "connection ended, though nebd was not killed"
        );
        for request in self.slots.iter_mut().filter_map(Option::take) {
            self.waiting_since =
                Some(self.waiting_since.map_or(request.since, |oldest| oldest.min(request.since)));
            if !request.is_read {
                self.history.lost(request.block);
            }
        }
        Ok(false)
    }
}
