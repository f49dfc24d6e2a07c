//! A disk as a client sees it, whatever it speaks: what behaviours are written against.
//!
//! Called by the tests of behaviours. [`nbd`] and [`virtio`] are the clients. Must never know: who serves the disk.

pub mod nbd;
pub mod virtio;

use anyhow::{Context, ensure};

/// What a client asks of a disk. Ranges are bytes, multiples of 512: what every client can ask for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Request {
    /// Read, into pieces of these lengths.
    Read {
        /// Where it begins.
        offset: u64,
        /// Bytes of each piece.
        pieces: Vec<usize>,
    },
    /// Write, out of pieces.
    Write {
        /// Where it begins.
        offset: u64,
        /// The data.
        pieces: Vec<Vec<u8>>,
    },
    /// Make everything answered durable.
    Flush,
    /// Give a range back.
    Discard {
        /// Where it begins.
        offset: u64,
        /// Its length.
        length: u64,
    },
    /// Make a range zeros.
    Zero {
        /// Where it begins.
        offset: u64,
        /// Its length.
        length: u64,
        /// Its space may be given back.
        unmap: bool,
    },
}

impl Request {
    /// A read in one piece.
    pub fn read(offset: u64, length: usize) -> Self {
        Self::Read { offset, pieces: vec![length] }
    }

    /// A write in one piece.
    pub fn write(offset: u64, data: Vec<u8>) -> Self {
        Self::Write { offset, pieces: vec![data] }
    }

    /// Bytes of memory that it takes.
    pub fn payload(&self) -> usize {
        match self {
            Self::Read { pieces, .. } => pieces.iter().sum(),
            Self::Write { pieces, .. } => pieces.iter().map(Vec::len).sum(),
            Self::Flush | Self::Discard { .. } | Self::Zero { .. } => 0,
        }
    }
}

/// How a request ended: with a read's data, or with the client's number for what was wrong.
pub type Answer = Result<Vec<u8>, i32>;

/// What a disk says of itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Facts {
    /// Bytes.
    pub size: u64,
    /// The block size that it prefers, bytes.
    pub block_size: u64,
    /// It refuses writes.
    pub read_only: bool,
    /// Discards are served.
    pub discards: bool,
    /// Zeroes are served.
    pub zeroes: bool,
}

/// A client of a disk, with one or more queues (connections, virtqueues).
pub trait Disk {
    /// What the disk says of itself.
    fn facts(&self) -> Facts;

    /// Queues of this client.
    fn queues(&self) -> usize;

    /// Asks for all at once, each in its queue, so that they are in flight together; answers in the order of the requests.
    ///
    /// # Errors
    /// If one is not answered exactly once.
    fn all(&mut self, requests: Vec<(usize, Request)>) -> anyhow::Result<Vec<Answer>>;

    /// One request, waited for.
    ///
    /// # Errors
    /// As [`Disk::all`].
    fn one(&mut self, request: Request) -> anyhow::Result<Answer> {
        self.all(vec![(0, request)])?.pop().context("no answer")
    }

    /// A request that must succeed; answers a read's data.
    ///
    /// # Errors
    /// If it does not.
    fn succeed(&mut self, request: Request) -> anyhow::Result<Vec<u8>> {
        let what = brief(&request);
        let answer = self.one(request)?;
        answer.map_err(|error| anyhow::anyhow!("failed: error={error} request={what}"))
    }

    /// A request that must fail.
    ///
    /// # Errors
    /// If it succeeds.
    fn refuse(&mut self, request: Request) -> anyhow::Result<()> {
        let what = brief(&request);
        ensure!(self.one(request)?.is_err(), "should have been refused: request={what}");
        Ok(())
    }

    /// Requests that must all succeed, in flight together; answers what the reads have read.
    ///
    /// # Errors
    /// If one does not.
    fn all_succeed(&mut self, requests: Vec<(usize, Request)>) -> anyhow::Result<Vec<Vec<u8>>> {
        let whats: Vec<String> = requests.iter().map(|(_, request)| brief(request)).collect();
        let answers = self.all(requests)?.into_iter().zip(whats);
        answers
            .map(|(answer, what)| answer.map_err(|error| anyhow::anyhow!("failed: error={error} {what}")))
            .collect()
    }

    /// Writes; must succeed.
    ///
    /// # Errors
    /// If it does not.
    fn write(&mut self, offset: u64, data: Vec<u8>) -> anyhow::Result<()> {
        self.succeed(Request::write(offset, data)).map(drop)
    }

    /// Reads; must succeed.
    ///
    /// # Errors
    /// If it does not.
    fn read(&mut self, offset: u64, length: usize) -> anyhow::Result<Vec<u8>> {
        self.succeed(Request::read(offset, length))
    }

    /// A range must hold these bytes.
    ///
    /// # Errors
    /// Where it does not.
    fn holds(&mut self, offset: u64, bytes: &[u8]) -> anyhow::Result<()> {
        same(offset, &self.read(offset, bytes.len())?, bytes)
    }
}

/// Whether what was read is what was expected.
///
/// # Errors
/// The first byte that differs.
pub fn same(offset: u64, found: &[u8], expected: &[u8]) -> anyhow::Result<()> {
    ensure!(found.len() == expected.len(), "bytes={} wanted={}", found.len(), expected.len());
    if found == expected {
        return Ok(());
    }
    match found.iter().zip(expected).position(|(found, expected)| found != expected) {
        None => Ok(()),
        Some(at) => anyhow::bail!(
            "differs: begin={offset} offset={} found={:#x} wanted={:#x}",
            offset + at as u64,
            found[at],
            expected[at]
        ),
    }
}

/// A request without its data.
fn brief(request: &Request) -> String {
    match request {
        Request::Write { offset, pieces } => {
            let lengths: Vec<usize> = pieces.iter().map(Vec::len).collect();
            format!("write at {offset} of {lengths:?}")
        }
        other => format!("{other:?}"),
    }
}
