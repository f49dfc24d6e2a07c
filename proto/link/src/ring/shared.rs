//! A ring in a memfd, with its two bells: what a link passes over its socket.
//!
//! Made by nebd ([`NebdRing::create`]), taken over by the gateway ([`GatewayRing::adopt`]), which refuses memory that could be
//! truncated under it. Both forward to the ends of [`ring`](super) and ring the other side's bell where that is needed.

use super::{Cells, GatewayEnd, NebdEnd, Piece, Places, Position, RingAnswer};
use crate::error::LinkError;
use crate::memory::{MemoryError, SharedMemory};
use rustix::event::EventfdFlags;
use spline_types::BlockRequest;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{Ordering, fence};
use thiserror::Error;

/// Why there is no ring.
#[derive(Debug, Error)]
pub enum RingError {
    /// The memory can not be had.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The other side could take it away.
    #[error("memory of a ring is not sealed against shrinking")]
    NotSealed,
    /// A bell is no eventfd.
    #[error("bell of a ring can not be used: error={0}")]
    Bell(#[from] io::Error),
    /// What lies in it is no ring of ours.
    #[error(transparent)]
    Contract(#[from] LinkError),
}

/// The descriptors of a ring, in the order in which they are passed.
#[derive(Debug)]
pub struct RingFds {
    /// The memory.
    pub memory: OwnedFd,
    /// The gateway's bell.
    pub to_gateway: OwnedFd,
    /// nebd's bell.
    pub to_nebd: OwnedFd,
}

/// How many they are.
pub const RING_FDS: usize = 3;

/// A ring's memory.
#[derive(Debug)]
struct MappedCells(SharedMemory);

impl Cells for MappedCells {
    fn load(&self, cell: usize, order: Ordering) -> u64 {
        self.0.cell(cell).load(order)
    }

    fn store(&self, cell: usize, value: u64, order: Ordering) {
        self.0.cell(cell).store(value, order);
    }

    fn fence(&self) {
        fence(Ordering::SeqCst);
    }
}

fn ring_bell(bell: &OwnedFd) {
    // Only a counter that is full refuses, and then the other side has been told often enough.
    let _ = rustix::io::write(bell, &1u64.to_ne_bytes());
}

/// nebd's end.
#[derive(Debug)]
pub struct NebdRing {
    end: NebdEnd<MappedCells>,
    to_gateway: OwnedFd,
    to_nebd: OwnedFd,
    bells: u64,
}

impl NebdRing {
    /// A new ring, and what the gateway gets of it.
    ///
    /// # Errors
    /// If there is no memory or descriptor left.
    pub fn create() -> Result<(Self, RingFds), RingError> {
        let bell = || rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let memory = SharedMemory::create("spline-ring", Places::REAL.bytes())?;
        let (to_gateway, to_nebd) = (bell().map_err(io::Error::from)?, bell().map_err(io::Error::from)?);
        let fds = RingFds {
            memory: memory.fd().try_clone_to_owned()?,
            to_gateway: to_gateway.try_clone()?,
            to_nebd: to_nebd.try_clone()?,
        };
        let end = NebdEnd::new(MappedCells(memory), Places::REAL);
        Ok((Self { end, to_gateway, to_nebd, bells: 0 }, fds))
    }

    /// Readable after the gateway has rung.
    pub fn bell(&self) -> BorrowedFd<'_> {
        self.to_nebd.as_fd()
    }

    /// Makes the bell unreadable again.
    pub fn silence(&self) {
        // EAGAIN: it was not rung.
        let _ = rustix::io::read(&self.to_nebd, &mut [0; 8]);
    }

    /// How often the gateway had to be woken.
    pub fn bells(&self) -> u64 {
        self.bells
    }

    /// [`NebdEnd::has_room`].
    ///
    /// # Errors
    /// As there.
    pub fn has_room(&mut self, pieces: usize) -> Result<bool, LinkError> {
        self.end.has_room(pieces)
    }

    /// [`NebdEnd::push`].
    pub fn push(&mut self, request: &BlockRequest, pieces: &[Piece]) {
        self.end.push(request, pieces);
    }

    /// [`NebdEnd::publish`], and wakes the gateway if it sleeps.
    pub fn publish(&mut self) {
        if self.end.publish() {
            self.bells += 1;
            ring_bell(&self.to_gateway);
        }
    }

    /// [`NebdEnd::unanswered`].
    pub fn unanswered(&self) -> u64 {
        self.end.unanswered()
    }

    /// [`NebdEnd::pop`].
    ///
    /// # Errors
    /// As there.
    pub fn pop(&mut self) -> Result<Option<RingAnswer>, LinkError> {
        self.end.pop()
    }

    /// [`NebdEnd::look`].
    ///
    /// # Errors
    /// As there.
    pub fn look(&mut self) -> Result<bool, LinkError> {
        self.end.look()
    }

    /// [`NebdEnd::sleep`].
    ///
    /// # Errors
    /// As there.
    pub fn sleep(&mut self) -> Result<bool, LinkError> {
        self.end.sleep()
    }

    /// [`NebdEnd::wake`].
    pub fn wake(&mut self) {
        self.end.wake();
    }
}

/// The gateway's end. Its bell is waited for by whoever holds the descriptor.
#[derive(Debug)]
pub struct GatewayRing {
    end: GatewayEnd<MappedCells>,
    to_nebd: OwnedFd,
    bells: u64,
}

impl GatewayRing {
    /// Goes on with a ring that nebd made. Answers the bell to wait for, non-blocking, too.
    ///
    /// # Errors
    /// If it is not one of ours, or could vanish.
    pub fn adopt(fds: RingFds, position: Position) -> Result<(Self, OwnedFd), RingError> {
        let memory = SharedMemory::map(fds.memory, 0, Places::REAL.bytes() as u64)?;
        if !memory.is_sealed() {
            return Err(RingError::NotSealed);
        }
        for bell in [&fds.to_gateway, &fds.to_nebd] {
            check_bell(bell)?;
        }
        let end = GatewayEnd::new(MappedCells(memory), Places::REAL, position)?;
        Ok((Self { end, to_nebd: fds.to_nebd, bells: 0 }, fds.to_gateway))
    }

    /// The descriptors again, for another gateway; `bell` is the one that [`adopt`](Self::adopt) answered.
    ///
    /// # Errors
    /// If there is no descriptor left.
    pub fn fds(&self, bell: BorrowedFd<'_>) -> io::Result<RingFds> {
        Ok(RingFds {
            memory: self.end.cells.0.fd().try_clone_to_owned()?,
            to_gateway: bell.try_clone_to_owned()?,
            to_nebd: self.to_nebd.try_clone()?,
        })
    }

    /// How often nebd had to be woken.
    pub fn bells(&self) -> u64 {
        self.bells
    }

    /// [`GatewayEnd::position`].
    pub fn position(&self) -> Position {
        self.end.position()
    }

    /// [`GatewayEnd::pop`].
    ///
    /// # Errors
    /// As there.
    pub fn pop(&mut self, pieces: &mut Vec<Piece>) -> Result<Option<BlockRequest>, LinkError> {
        self.end.pop(pieces)
    }

    /// [`GatewayEnd::push`].
    ///
    /// # Errors
    /// As there.
    pub fn push(&mut self, answer: &RingAnswer) -> Result<(), LinkError> {
        self.end.push(answer)
    }

    /// [`GatewayEnd::publish`], and wakes nebd if it sleeps.
    pub fn publish(&mut self) {
        if self.end.publish() {
            self.bells += 1;
            ring_bell(&self.to_nebd);
        }
    }

    /// [`GatewayEnd::look`].
    ///
    /// # Errors
    /// As there.
    pub fn look(&mut self) -> Result<bool, LinkError> {
        self.end.look()
    }

    /// [`GatewayEnd::sleep`].
    ///
    /// # Errors
    /// As there.
    pub fn sleep(&mut self) -> Result<bool, LinkError> {
        self.end.sleep()
    }

    /// [`GatewayEnd::wake`].
    pub fn wake(&mut self) {
        self.end.wake();
    }
}

/// Refuses what is no eventfd: ringing must neither block nor reach anything else.
fn check_bell(bell: &OwnedFd) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(bell)?;
    rustix::fs::fcntl_setfl(bell, flags | rustix::fs::OFlags::NONBLOCK)?;
    let link = rustix::fs::readlink(format!("/proc/self/fd/{}", bell.as_raw_fd()), Vec::new())?;
    match link.as_bytes() == b"anon_inode:[eventfd]" {
        true => Ok(()),
        false => Err(io::Error::new(io::ErrorKind::InvalidInput, "not an eventfd")),
    }
}
