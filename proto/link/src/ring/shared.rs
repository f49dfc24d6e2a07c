//! A ring in a memfd, with its two bells: what a link passes over its socket.
//!
//! Made by nebd ([`NebdRing::create`]), taken over by the gateway ([`GatewayRing::adopt`]), which refuses memory that could be
//! truncated under it. Both forward to the ends of [`ring`](super) and ring the other side's bell where that is needed.
//!
//! `guest_cannot_crash_us`: the gateway's bell is an eventfd, which the gateway only watches for edges: it neither reads nor
//! writes what nebd can fill or set to block. nebd's bell is a pair of sockets: the gateway sends to one of them, and each such
//! call says itself that it must not wait, whatever nebd does to the descriptor; nebd watches it for edges, too. The gateway does
//! not read a socket of nebd's: a reader in nebd could hold the lock of the kernel that a second one waits for.

use super::{Cells, GatewayEnd, NebdEnd, Piece, Places, Position, RingAnswer};
use crate::error::LinkError;
use crate::memory::{MemoryError, SharedMemory};
use rustix::event::EventfdFlags;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
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
    /// A bell is not of its kind.
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
    /// The gateway's bell: an eventfd.
    pub to_gateway: OwnedFd,
    /// The gateway's end of nebd's bell: a unix stream socket.
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

/// What a ring of nebd's bell sends.
const RUNG: u8 = b'!';
/// So often nebd goes to sleep before it empties its bell: the gateway rings at most once for each time, and the smallest socket
/// that Linux makes has room for as many.
const SLEEPS_UNTIL_EMPTIED: usize = 4;

/// nebd's end.
#[derive(Debug)]
pub struct NebdRing {
    end: NebdEnd<MappedCells>,
    to_gateway: OwnedFd,
    bell: OwnedFd,
    /// How often nebd went to sleep since it last emptied its bell.
    sleeps: usize,
    bells: u64,
    processor: Option<u32>,
}

impl NebdRing {
    /// A new ring, and what the gateway gets of it.
    ///
    /// # Errors
    /// If there is no memory or descriptor left.
    pub fn create() -> Result<(Self, RingFds), RingError> {
        let memory = SharedMemory::create("spline-ring", Places::REAL.bytes())?;
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let to_gateway = rustix::event::eventfd(0, flags).map_err(io::Error::from)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let pair = rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None);
        let (bell, to_nebd) = pair.map_err(io::Error::from)?;
        let fds = RingFds {
            memory: memory.fd().try_clone_to_owned()?,
            to_gateway: to_gateway.try_clone()?,
            to_nebd,
        };
        let end = NebdEnd::new(MappedCells(memory), Places::REAL);
        Ok((Self { end, to_gateway, bell, sleeps: 0, bells: 0, processor: None }, fds))
    }

    /// The gateway has sent to it when it has rung: to be watched for edges, because it is rarely emptied.
    pub fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
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

    /// [`NebdEnd::gateway_processor`], as it was when a request was last shown.
    pub fn gateway_processor(&self) -> Option<u32> {
        self.processor
    }

    /// [`NebdEnd::publish`], and wakes the gateway if it sleeps.
    pub fn publish(&mut self) {
        if self.end.has_to_publish() {
            // In the line that publishing reads.
            self.processor = self.end.gateway_processor();
        }
        if self.end.publish() {
            self.bells += 1;
            // Nobody reads the counter: it is never full.
            let _ = rustix::io::write(&self.to_gateway, &1u64.to_ne_bytes());
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

    /// [`NebdEnd::sleep`], before which the bell is emptied now and then.
    ///
    /// # Errors
    /// As there.
    pub fn sleep(&mut self) -> Result<bool, LinkError> {
        if self.sleeps == SLEEPS_UNTIL_EMPTIED {
            self.sleeps = 0;
            // Before nebd says that it sleeps: a ring after that is an event. EAGAIN: it was not rung.
            let _ = rustix::net::recv(&self.bell, &mut [0; SLEEPS_UNTIL_EMPTIED], RecvFlags::DONTWAIT);
        }
        self.sleeps += 1;
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
}

impl GatewayRing {
    /// Goes on with a ring that nebd made. Answers the bell to wait for, too: it is to be watched for edges and not read.
    ///
    /// # Errors
    /// If it is not one of ours, or could vanish.
    pub fn adopt(fds: RingFds, position: Position) -> Result<(Self, OwnedFd), RingError> {
        let memory = SharedMemory::map(fds.memory, 0, Places::REAL.bytes() as u64)?;
        if !memory.is_sealed() {
            return Err(RingError::NotSealed);
        }
        check_eventfd(&fds.to_gateway)?;
        check_socket(&fds.to_nebd)?;
        let end = GatewayEnd::new(MappedCells(memory), Places::REAL, position)?;
        Ok((Self { end, to_nebd: fds.to_nebd }, fds.to_gateway))
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

    /// [`GatewayEnd::publish`], and wakes nebd if it sleeps; true if it did.
    pub fn publish(&mut self) -> bool {
        let sleeps = self.end.publish();
        if sleeps {
            // EAGAIN: nebd has filled it itself. Another error is that of a nebd that is gone.
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            let _ = rustix::net::send(&self.to_nebd, &[RUNG], flags);
        }
        sleeps
    }

    /// [`GatewayEnd::look`].
    ///
    /// # Errors
    /// As there.
    pub fn look(&mut self) -> Result<bool, LinkError> {
        self.end.look()
    }

    /// [`GatewayEnd::tell_processor`].
    pub fn tell_processor(&mut self, processor: Option<u32>) {
        self.end.tell_processor(processor);
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

/// Refuses a bell whose waiting could do anything else than wait.
fn check_eventfd(bell: &OwnedFd) -> io::Result<()> {
    let link = rustix::fs::readlink(format!("/proc/self/fd/{}", bell.as_raw_fd()), Vec::new())?;
    match link.as_bytes() == b"anon_inode:[eventfd]" {
        true => Ok(()),
        false => Err(io::Error::new(io::ErrorKind::InvalidInput, "not an eventfd")),
    }
}

/// Refuses a bell whose ringing could block, or reach anything but another process of this host.
fn check_socket(bell: &OwnedFd) -> io::Result<()> {
    use rustix::net::sockopt::{socket_domain, socket_type};
    match (socket_domain(bell)?, socket_type(bell)?) {
        (AddressFamily::UNIX, SocketType::STREAM) => Ok(()),
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "not a unix stream socket")),
    }
}
