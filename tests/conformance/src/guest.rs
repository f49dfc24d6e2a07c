//! A guest of our own that can do everything wrong: memory, virtqueues written by hand, and a front-end, which is the `vhost`
//! crate's for what is well-formed and raw bytes for what is not.
//!
//! Called by the tests of bad guests and bad messages. Numbers and layouts are those of virtio 1.2 and of QEMU's vhost-user
//! page, written down a second time here so that the device's mistakes are not repeated. Modules: [`memory`] → [`ring`] →
//! [`message`] → [`stage`]. Must never know: the device's code.

pub mod memory;
pub mod message;
pub mod ring;
pub mod stage;

use anyhow::{Context, ensure};
use memory::Memory;
use message::{Raw, Verdict};
use ring::{Desc, Ring, WRITE};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Duration;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight};
use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VringConfigData};

/// Feature bits (virtio 1.2, 5.2.3 and 6; vhost-user, "Feature negotiation").
pub mod feature {
    /// VIRTIO_BLK_F_RO
    pub const READ_ONLY: u64 = 1 << 5;
    /// VIRTIO_BLK_F_FLUSH
    pub const FLUSH: u64 = 1 << 9;
    /// VIRTIO_BLK_F_MQ
    pub const MQ: u64 = 1 << 12;
    /// VIRTIO_BLK_F_DISCARD
    pub const DISCARD: u64 = 1 << 13;
    /// VIRTIO_BLK_F_WRITE_ZEROES
    pub const WRITE_ZEROES: u64 = 1 << 14;
    /// VHOST_F_LOG_ALL
    pub const LOG_ALL: u64 = 1 << 26;
    /// VIRTIO_F_INDIRECT_DESC
    pub const INDIRECT: u64 = 1 << 28;
    /// VIRTIO_F_EVENT_IDX
    pub const EVENT_INDEX: u64 = 1 << 29;
    /// VHOST_USER_F_PROTOCOL_FEATURES
    pub const PROTOCOL: u64 = 1 << 30;
    /// VIRTIO_F_VERSION_1
    pub const VERSION_1: u64 = 1 << 32;
}

/// Types of requests (virtio 1.2, 5.2.6).
pub mod kind {
    /// VIRTIO_BLK_T_IN
    pub const IN: u32 = 0;
    /// VIRTIO_BLK_T_OUT
    pub const OUT: u32 = 1;
    /// VIRTIO_BLK_T_FLUSH
    pub const FLUSH: u32 = 4;
    /// VIRTIO_BLK_T_GET_ID
    pub const GET_ID: u32 = 8;
    /// VIRTIO_BLK_T_DISCARD
    pub const DISCARD: u32 = 11;
    /// VIRTIO_BLK_T_WRITE_ZEROES
    pub const WRITE_ZEROES: u32 = 13;
}

/// VIRTIO_BLK_S_OK
pub const OK: u8 = 0;
/// VIRTIO_BLK_S_IOERR
pub const IOERR: u8 = 1;
/// VIRTIO_BLK_S_UNSUPP
pub const UNSUPP: u8 = 2;
/// What a status byte holds before the device has written it.
pub const UNANSWERED: u8 = 0xff;

/// Longest wait for an answer, however busy the machine is.
pub const PATIENCE: Duration = Duration::from_secs(40);

/// What a guest is like.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// Virtqueues.
    pub queues: u16,
    /// Descriptors of each.
    pub size: u16,
    /// Features beside VERSION_1 and PROTOCOL that are accepted if they are offered.
    pub features: u64,
    /// What is in flight is kept in shared memory.
    pub inflight: bool,
}

impl Default for Setup {
    fn default() -> Self {
        let features = feature::FLUSH | feature::DISCARD | feature::WRITE_ZEROES | feature::MQ;
        Self { queues: 1, size: 128, features, inflight: false }
    }
}

/// A piece of a request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Piece {
    /// Bytes that the device reads.
    Out(Vec<u8>),
    /// Bytes that it writes.
    In(u32),
}

/// A request in a queue.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Chain {
    /// Its first descriptor.
    pub head: u16,
    /// Guest address and length of each piece.
    pub pieces: Vec<(u64, u32)>,
}

impl Chain {
    /// Guest address of its last byte: the status.
    pub fn status(&self) -> u64 {
        self.pieces.last().map_or(0, |(address, length)| address + u64::from(*length) - 1)
    }
}

/// A request's header.
pub fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

/// The range of a discard or of zeroes.
pub fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

/// The guest. Dropping it closes its connection without a word.
pub struct Guest {
    /// Its memory.
    pub memory: Memory,
    /// Its queues.
    pub rings: Vec<Ring>,
    /// The well-formed side of its connection.
    pub frontend: Frontend,
    /// The same connection, byte by byte.
    pub raw: Raw,
    /// What is in flight, and how it is laid out.
    pub inflight: Option<(VhostUserInflight, File)>,
    setup: Setup,
    /// Features that were accepted.
    pub features: u64,
}

impl std::fmt::Debug for Guest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Guest").field("setup", &self.setup).finish_non_exhaustive()
    }
}

impl Guest {
    /// Connects and says nothing.
    ///
    /// # Errors
    /// If nobody listens.
    pub fn silent(socket: &Path, setup: Setup) -> anyhow::Result<Self> {
        let raw = Raw::connect(socket)?;
        let frontend = Frontend::from_stream(raw.stream()?, u64::from(setup.queues));
        let rings = (0..setup.queues).map(|queue| Ring::new(queue, setup.size)).collect::<Result<_, _>>()?;
        Ok(Self { memory: Memory::new()?, rings, frontend, raw, inflight: None, setup, features: 0 })
    }

    /// Connects and negotiates features.
    ///
    /// # Errors
    /// If the device refuses.
    pub fn greeted(socket: &Path, setup: Setup) -> anyhow::Result<Self> {
        let mut guest = Self::silent(socket, setup)?;
        guest.greet()?;
        Ok(guest)
    }

    /// Connects, negotiates, shares its memory and starts its queues.
    ///
    /// # Errors
    /// If the device refuses.
    pub fn started(socket: &Path, setup: Setup) -> anyhow::Result<Self> {
        let mut guest = Self::greeted(socket, setup)?;
        guest.start()?;
        Ok(guest)
    }

    /// As [`Guest::started`], with one queue.
    ///
    /// # Errors
    /// If the device refuses.
    pub fn usual(socket: &Path) -> anyhow::Result<Self> {
        Self::started(socket, Setup::default())
    }

    /// Connects anew, as QEMU does when its device has gone: memory and rings stay, and so does what was in flight.
    ///
    /// # Errors
    /// If the device refuses.
    pub fn reconnect(&mut self, socket: &Path) -> anyhow::Result<()> {
        self.raw = Raw::connect(socket)?;
        self.frontend = Frontend::from_stream(self.raw.stream()?, u64::from(self.setup.queues));
        self.greet()?;
        self.start()
    }

    /// Negotiates features.
    ///
    /// # Errors
    /// If the device refuses.
    pub fn greet(&mut self) -> anyhow::Result<()> {
        let frontend = &mut self.frontend;
        frontend.set_owner().context("SET_OWNER")?;
        let offered = frontend.get_features().context("GET_FEATURES")?;
        let basic = feature::VERSION_1 | feature::PROTOCOL;
        ensure!(offered & basic == basic, "features={offered:#x}");
        let protocol = frontend.get_protocol_features().context("GET_PROTOCOL_FEATURES")?;
        frontend.set_protocol_features(protocol & wanted_protocol()).context("SET_PROTOCOL_FEATURES")?;
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        self.features = offered & (basic | self.setup.features);
        frontend.set_features(self.features).context("SET_FEATURES")?;
        Ok(())
    }

    /// Shares memory and starts all queues.
    ///
    /// # Errors
    /// If the device refuses.
    pub fn start(&mut self) -> anyhow::Result<()> {
        // Again, since a reset has taken them away: QEMU does so at every start.
        self.frontend.set_features(self.features).context("SET_FEATURES")?;
        self.record()?;
        self.frontend.set_mem_table(&[self.memory.region()]).context("SET_MEM_TABLE")?;
        (0..self.rings.len()).try_for_each(|queue| self.start_queue(queue))
    }

    /// Has what is in flight recorded: in the record that there is, or in a new one.
    fn record(&mut self) -> anyhow::Result<()> {
        if self.setup.inflight {
            let (queues, size) = (self.setup.queues, self.setup.size);
            if self.inflight.is_none() {
                let wish = VhostUserInflight::new(0, 0, queues, size);
                self.inflight = Some(self.frontend.get_inflight_fd(&wish).context("GET_INFLIGHT_FD")?);
            }
            if let Some((area, file)) = &self.inflight {
                self.frontend.set_inflight_fd(area, file.as_raw_fd()).context("SET_INFLIGHT_FD")?;
            }
        }
        Ok(())
    }

    /// Starts a queue where the guest has got to in it.
    ///
    /// # Errors
    /// If the device refuses.
    pub fn start_queue(&mut self, queue: usize) -> anyhow::Result<()> {
        let ring = &self.rings[queue];
        self.frontend.set_vring_num(queue, ring.size).context("SET_VRING_NUM")?;
        let base = self.memory.u16(ring.used + 2)?;
        self.frontend.set_vring_base(queue, base).context("SET_VRING_BASE")?;
        self.frontend.set_vring_addr(queue, &self.addresses(queue)).context("SET_VRING_ADDR")?;
        self.frontend.set_vring_kick(queue, &ring.kick.shared()?).context("SET_VRING_KICK")?;
        self.frontend.set_vring_call(queue, &ring.call.shared()?).context("SET_VRING_CALL")?;
        self.frontend.set_vring_err(queue, &ring.error.shared()?).context("SET_VRING_ERR")?;
        self.frontend.set_vring_enable(queue, true).context("SET_VRING_ENABLE")
    }

    /// Where a queue lies, in the front-end's addresses.
    pub fn addresses(&self, queue: usize) -> VringConfigData {
        let ring = &self.rings[queue];
        VringConfigData {
            queue_max_size: ring.size,
            queue_size: ring.size,
            flags: 0,
            desc_table_addr: self.memory.user(ring.descriptors),
            used_ring_addr: self.memory.user(ring.used),
            avail_ring_addr: self.memory.user(ring.available),
            log_addr: None,
        }
    }

    /// Puts pieces into memory and describes them as one chain; nobody is told.
    ///
    /// # Errors
    /// If memory ends.
    pub fn describe(&mut self, queue: usize, pieces: &[Piece]) -> anyhow::Result<Chain> {
        let places = self.place(pieces)?;
        let writes = |at: usize| if matches!(pieces[at], Piece::In(_)) { WRITE } else { 0 };
        let parts: Vec<Desc> = (places.iter().enumerate())
            .map(|(at, (address, length))| Desc {
                address: *address,
                length: *length,
                flags: writes(at),
                next: 0,
            })
            .collect();
        let head = self.rings[queue].chain(&self.memory, &parts)?;
        Ok(Chain { head, pieces: places })
    }

    /// Puts pieces into memory, each in a place of its own; the last byte of what the device writes is [`UNANSWERED`].
    ///
    /// # Errors
    /// If memory ends.
    pub fn place(&mut self, pieces: &[Piece]) -> anyhow::Result<Vec<(u64, u32)>> {
        let mut places = Vec::new();
        for piece in pieces {
            let bytes = match piece {
                Piece::Out(bytes) => bytes.clone(),
                Piece::In(length) => vec![UNANSWERED; *length as usize],
            };
            let address = self.memory.take(bytes.len() as u64)?;
            self.memory.write(address, &bytes)?;
            places.push((address, bytes.len() as u32));
        }
        Ok(places)
    }

    /// Offers a chain to the device and tells it.
    ///
    /// # Errors
    /// Those of the system.
    pub fn offer(&mut self, queue: usize, head: u16) -> anyhow::Result<()> {
        self.rings[queue].offer(&self.memory, head)?;
        self.rings[queue].kick.ring()
    }

    /// Describes and offers pieces as one request.
    ///
    /// # Errors
    /// If memory ends.
    pub fn ask(&mut self, queue: usize, pieces: &[Piece]) -> anyhow::Result<Chain> {
        let chain = self.describe(queue, pieces)?;
        self.offer(queue, chain.head)?;
        Ok(chain)
    }

    /// The next answer of a queue: which head, and how many bytes the device says to have written.
    ///
    /// # Errors
    /// If none comes.
    pub fn used(&mut self, queue: usize) -> anyhow::Result<(u32, u32)> {
        self.rings[queue].used(&self.memory)
    }

    /// Asks, waits, and answers the status.
    ///
    /// # Errors
    /// If no answer comes, or another's.
    pub fn status(&mut self, queue: usize, pieces: &[Piece]) -> anyhow::Result<u8> {
        let chain = self.ask(queue, pieces)?;
        self.finish(queue, &chain)
    }

    /// Waits for a request, the only one in flight, and answers its status.
    ///
    /// # Errors
    /// If no answer comes, or another's.
    pub fn finish(&mut self, queue: usize, chain: &Chain) -> anyhow::Result<u8> {
        let (head, _) = self.used(queue)?;
        ensure!(head == u32::from(chain.head), "answered another: head={head} wanted={}", chain.head);
        Ok(self.memory.read(chain.status(), 1)?[0])
    }

    /// Pieces that give a status, in one chain, must end like this.
    ///
    /// # Errors
    /// If they do not.
    pub fn expect(&mut self, pieces: &[Piece], wanted: u8) -> anyhow::Result<()> {
        let status = self.status(0, pieces)?;
        ensure!(status == wanted, "status={status} wanted={wanted} pieces={pieces:?}");
        Ok(())
    }

    /// Writes; must succeed.
    ///
    /// # Errors
    /// If it does not.
    pub fn write(&mut self, sector: u64, data: &[u8]) -> anyhow::Result<()> {
        self.expect(&[Piece::Out(header(kind::OUT, sector)), Piece::Out(data.to_vec()), Piece::In(1)], OK)
    }

    /// Reads; must succeed.
    ///
    /// # Errors
    /// If it does not.
    pub fn read(&mut self, sector: u64, bytes: u32) -> anyhow::Result<Vec<u8>> {
        let chain = self.ask(0, &[Piece::Out(header(kind::IN, sector)), Piece::In(bytes), Piece::In(1)])?;
        let (_, written) = self.used(0)?;
        let status = self.memory.read(chain.status(), 1)?[0];
        ensure!(status == OK, "read failed: sector={sector} bytes={bytes} status={status}");
        ensure!(written == bytes + 1, "says to have written {written} of {}", bytes + 1);
        self.memory.read(chain.pieces[1].0, bytes as usize)
    }

    /// The device says that a queue is broken.
    ///
    /// # Errors
    /// If it does not.
    pub fn broken(&self, queue: usize) -> anyhow::Result<()> {
        self.rings[queue].error.wait(PATIENCE).context("no error of the queue was signalled")
    }

    /// A queue is either broken or its request is answered with an error.
    ///
    /// # Errors
    /// If neither happens, or the request succeeds.
    pub fn broken_or_refused(&mut self, queue: usize, status: u64) -> anyhow::Result<()> {
        spline_harness::wait_until("an error", PATIENCE, || {
            if self.rings[queue].error.is_rung()? {
                return Ok(Some(()));
            }
            let found = self.memory.read(status, 1)?[0];
            ensure!(found != OK, "should not have succeeded");
            Ok((found != UNANSWERED).then_some(()))
        })
    }

    /// A queue that was broken is made anew and serves.
    ///
    /// # Errors
    /// If it does not.
    pub fn mend(&mut self, queue: usize) -> anyhow::Result<()> {
        self.frontend.get_vring_base(queue).context("GET_VRING_BASE")?;
        self.rings[queue] = Ring::new(self.rings[queue].queue, self.rings[queue].size)?;
        self.rings[queue].clear(&self.memory)?;
        // A driver that begins anew has nothing in flight.
        self.inflight = None;
        self.record()?;
        self.start_queue(queue)?;
        let pieces = [Piece::Out(header(kind::IN, 0)), Piece::In(512), Piece::In(1)];
        let status = self.status(queue, &pieces)?;
        ensure!(status == OK, "a queue that was made anew does not serve: status={status}");
        Ok(())
    }

    /// Bytes of the device's configuration.
    ///
    /// # Errors
    /// If it does not answer.
    pub fn config(&mut self, offset: u32, bytes: u32) -> anyhow::Result<Vec<u8>> {
        let room = vec![0; bytes as usize];
        let (_, config) = self.frontend.get_config(offset, bytes, VhostUserConfigFlags::empty(), &room)?;
        Ok(config)
    }

    /// Requests that the device has recorded as fetched and not answered, of a queue with that record.
    ///
    /// # Errors
    /// If there is no record.
    pub fn recorded(&self, queue: usize) -> anyhow::Result<Vec<u16>> {
        let (area, file) = self.inflight.as_ref().context("nothing is recorded")?;
        let each = area.mmap_size / u64::from(area.num_queues);
        let mut bytes = vec![0; each as usize];
        std::os::unix::fs::FileExt::read_exact_at(file, &mut bytes, area.mmap_offset + queue as u64 * each)?;
        // struct QueueRegionSplit: 16 bytes, then 16 of each descriptor, whose first is its flag.
        let flags = bytes[16..].chunks_exact(16).take(usize::from(area.queue_size));
        Ok((0..).zip(flags).filter(|(_, state)| state[0] == 1).map(|(head, _)| head).collect())
    }

    /// Says something that must be turned down: by an error, or by the end of the connection.
    ///
    /// # Errors
    /// If it is accepted.
    pub fn turned_down(
        &self,
        request: u32,
        body: &[u8],
        fds: &[std::os::fd::BorrowedFd<'_>],
    ) -> anyhow::Result<Verdict> {
        let verdict = self.raw.verdict(request, body, fds)?;
        ensure!(
            verdict != Verdict::Accepted,
            "should have been turned down: request={request} body={body:x?}"
        );
        Ok(verdict)
    }
}

/// What this front-end can do.
fn wanted_protocol() -> VhostUserProtocolFeatures {
    type P = VhostUserProtocolFeatures;
    P::MQ
        | P::CONFIG
        | P::REPLY_ACK
        | P::CONFIGURE_MEM_SLOTS
        | P::INFLIGHT_SHMFD
        | P::BACKEND_REQ
        | P::LOG_SHMFD
        | P::RESET_DEVICE
}
