//! The NBD server without a link: nebd's NBD connections and the gateway's file engine in one process.
//!
//! Called by the binary `spline-bench-direct`. One thread, which sleeps for clients and for the disk at once; as in nebd's event
//! loop, each turn takes what is ready and then sends what has come of it. Reads, writes and flushes are served: nobody measures
//! the rest. Must not know: NBD's bytes.

use super::{accepted, watched};
use prometheus_client::registry::Registry;
use rustix::event::epoll::EventFlags;
use spline_gateway::local::LocalFile;
use spline_link::VolumeTraits;
use spline_link::memory::SharedMemory;
use spline_link::ring::Piece;
use spline_nebd::budget::Budget;
use spline_nebd::export::Export;
use spline_nebd::inflight::{Inflight, Limits, PLACES_MAX};
use spline_nebd::listener::Listener;
use spline_nebd::metrics::Families;
use spline_nebd::nbd::connection::{Connection, ConnectionId, Cut};
use spline_nebd::receive::{READS_PER_TURN, SCRATCH_BYTES};
use spline_nebd::send_queue::widen;
use spline_nebd::volume::{Volume, area_for};
use spline_types::limits::VOLUME_INFLIGHT_REQUESTS;
use spline_types::{BlockOp, Completion, Fault, RequestId};
use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use tokio::io::unix::AsyncFd;

/// Turns before the runtime gets its own.
const TURNS_MAX: usize = 16;
/// Clients that there is room for.
const CLIENTS_MAX: usize = 16;
/// Time for a handshake.
const PATIENCE: Duration = Duration::from_secs(10);
/// What may be under way in the engine.
const WINDOW: Limits = Limits { requests: VOLUME_INFLIGHT_REQUESTS, bytes: u64::MAX };
/// A client that holds less than one turn reads has nothing left in its socket after it.
const LARGE: u64 = (READS_PER_TURN * SCRATCH_BYTES / 4) as u64;

/// A client; its socket is watched twice for as long as it is there.
struct Client {
    connection: Connection,
    socket: AsyncFd<OwnedFd>,
    /// There may be something to read.
    readable: bool,
    /// Its socket was full.
    full: bool,
}

/// Serves one file.
struct Server {
    file: LocalFile,
    volume: Volume,
    listener: Listener,
    bell: AsyncFd<OwnedFd>,
    clients: BTreeMap<ConnectionId, Client>,
    next_client: u64,
    scratch: Vec<u8>,
    /// By ticket.
    ids: Vec<RequestId>,
    /// What the lane did not take yet: something is in its place.
    deferred: VecDeque<RequestId>,
    ended: Vec<(u32, Result<(), Fault>)>,
    pieces: Vec<Piece>,
}

/// Serves `file` to NBD clients at `socket`, until the process is killed.
///
/// # Errors
/// If the file can not be served, or the socket not be listened on.
pub fn serve(file: &Path, socket: &Path) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let listener = Listener::unix(socket)?;
        let mut server = Server::new(LocalFile::open(file)?, listener)?;
        std::future::poll_fn(|cx| server.poll(cx)).await
    })
}

impl Server {
    fn new(mut file: LocalFile, listener: Listener) -> anyhow::Result<Self> {
        let area = area_for(CLIENTS_MAX)?;
        let memory = area.memory();
        let theirs =
            SharedMemory::map(memory.fd().try_clone_to_owned()?, memory.offset(), memory.length() as u64)?;
        anyhow::ensure!(file.share(std::iter::once(theirs)), "one region is not too many");
        let mut export = Export {
            name: String::new(),
            description: String::new(),
            geometry: file.geometry(),
            traits: VolumeTraits::default(),
            read_only: false,
        };
        export.update(&accepted(&file), false);
        let volume = Volume {
            export,
            inflight: Inflight::new(WINDOW),
            budget: Budget::default(),
            area,
            lost: false,
            metrics: Families::new(&mut Registry::default()).of("direct", "nbd"),
            now: Instant::now(),
        };
        listener.open()?;
        let bell = watched(listener.socket().try_clone_to_owned()?)?;
        Ok(Self {
            file,
            volume,
            listener,
            bell,
            clients: BTreeMap::new(),
            next_client: 0,
            scratch: vec![0; SCRATCH_BYTES],
            ids: vec![RequestId::new(0); PLACES_MAX],
            deferred: VecDeque::new(),
            ended: Vec::new(),
            pieces: Vec::new(),
        })
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<anyhow::Result<()>> {
        for _ in 0..TURNS_MAX {
            self.volume.now = Instant::now();
            while let Poll::Ready(ready) = self.bell.poll_read_ready(cx) {
                ready?.clear_ready();
                self.accept()?;
            }
            let mut moved = self.receive(cx);
            moved |= self.go_on();
            while let Some(entry) = self.volume.inflight.next_to_send(WINDOW) {
                let id = entry.request.id;
                self.begin(id)?;
            }
            moved |= self.take_answers(cx)?;
            moved |= self.send(cx);
            if !moved {
                return Poll::Pending;
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    fn accept(&mut self) -> anyhow::Result<()> {
        while let Some(socket) = self.listener.accept()? {
            if self.clients.len() == CLIENTS_MAX {
                continue;
            }
            widen(socket.as_fd());
            let id = ConnectionId(self.next_client);
            self.next_client += 1;
            // SAFETY: it is owned, so that the number stays its own until it is dropped.
            let watched = unsafe { AsyncFd::register(socket.try_clone()?) }?;
            let connection = Connection::new(id, socket, self.volume.now, PATIENCE);
            self.clients.insert(id, Client { connection, socket: watched, readable: false, full: false });
        }
        Ok(())
    }

    /// Reads what has come; whether anything has.
    fn receive(&mut self, cx: &mut Context<'_>) -> bool {
        let (mut moved, mut over) = (false, Vec::new());
        for (id, client) in &mut self.clients {
            if client.connection.is_abandoned() {
                continue;
            }
            let received = client.receive(cx, &mut self.volume, &mut self.scratch);
            moved |= !matches!(received, Ok(false));
            over.extend(received.is_err().then_some(*id));
        }
        self.leave(&over);
        moved
    }

    /// Lets those go on that wait for room; whether one does.
    fn go_on(&mut self) -> bool {
        let Self { clients, volume, .. } = self;
        volume.budget.settle(clients.values().map(|client| client.connection.held()));
        let mut moved = false;
        for client in clients.values_mut().filter(|client| client.connection.is_stalled()) {
            // One that breaks the protocol ends with its next read.
            moved |= client.connection.resume(volume).is_err() || !client.connection.is_stalled();
        }
        moved
    }

    /// Gives a request to the lane, or tries it again when something has ended.
    fn begin(&mut self, id: RequestId) -> anyhow::Result<()> {
        let Some(entry) = self.volume.inflight.sent(id) else { return Ok(()) };
        let request = entry.request;
        self.pieces.clear();
        if let Some(data) = &entry.context.data {
            data.pieces(0, &mut self.pieces);
        }
        let ticket = (id.get() % PLACES_MAX as u64) as u32;
        self.ids[ticket as usize] = id;
        let is_served = matches!(request.op, BlockOp::Read | BlockOp::Write | BlockOp::Flush);
        if is_served && self.file.begin(ticket, &request, &self.pieces) {
            return Ok(());
        }
        match is_served && !self.file.is_idle() {
            true => self.deferred.push_back(id),
            // Nothing is in its place: it will never be taken.
            false => self.answer(ticket, Err(Fault::Unsupported))?,
        }
        Ok(())
    }

    /// Hands the disk what was begun, and answers what has ended; whether anything has.
    fn take_answers(&mut self, cx: &mut Context<'_>) -> anyhow::Result<bool> {
        let moved = self.file.poll(cx, &mut self.ended).is_ready();
        if moved {
            self.volume.now = Instant::now();
            let mut ended = std::mem::take(&mut self.ended);
            ended.drain(..).try_for_each(|(ticket, result)| self.answer(ticket, result))?;
            self.ended = ended;
            for id in std::mem::take(&mut self.deferred) {
                self.begin(id)?;
            }
        }
        Ok(moved)
    }

    fn answer(&mut self, ticket: u32, result: Result<(), Fault>) -> anyhow::Result<()> {
        let completion = result.map_or_else(Completion::Failed, Completion::Done);
        let ended = self.volume.complete(self.ids[ticket as usize], completion, 0)?;
        if let Some((origin, result)) = ended {
            match self.clients.get_mut(&origin.connection) {
                Some(client) => client.connection.answer(&origin.ticket, result, self.volume.now),
                None => self.volume.budget.buried(origin.ticket.holds()),
            }
        }
        Ok(())
    }

    /// Sends what sockets take; whether a client may go on because of it, or is gone.
    fn send(&mut self, cx: &mut Context<'_>) -> bool {
        let (mut moved, mut over) = (false, Vec::new());
        for (id, client) in &mut self.clients {
            let sent = client.send(cx, self.volume.now);
            moved |= !matches!(sent, Ok(false));
            over.extend((sent.is_err() || client.connection.is_finished()).then_some(*id));
        }
        self.leave(&over);
        moved
    }

    /// They are gone: what they have open is answered to nobody.
    fn leave(&mut self, over: &[ConnectionId]) {
        for id in over {
            if let Some(client) = self.clients.remove(id) {
                self.volume.budget.abandon(*id, client.connection.abandon());
            }
        }
    }
}

impl Client {
    fn receive(
        &mut self,
        cx: &mut Context<'_>,
        volume: &mut Volume,
        scratch: &mut [u8],
    ) -> Result<bool, Cut> {
        if let Poll::Ready(ready) = self.socket.poll_read_ready(cx) {
            // Before reading: what comes meanwhile makes it ready anew.
            ready?.clear_ready();
            self.readable = true;
        }
        if !self.readable {
            return Ok(false);
        }
        self.connection.receive(volume, scratch)?;
        let may_have_more = self.connection.is_stalled() || self.connection.held() >= LARGE;
        self.readable = may_have_more
            && rustix::io::ioctl_fionread(self.socket.get_ref()).map_err(std::io::Error::from)? > 0;
        Ok(true)
    }

    /// Answers whether the client has read so much that what waited for it may go on.
    fn send(&mut self, cx: &mut Context<'_>, now: Instant) -> Result<bool, Cut> {
        let mut caught_up = self.connection.flush(false, now)?;
        self.look_at_room();
        while self.full
            && let Poll::Ready(ready) = self.socket.poll_write_ready(cx)
        {
            ready?.clear_ready();
            caught_up |= self.connection.flush(true, now)?;
            self.look_at_room();
        }
        Ok(caught_up)
    }

    fn look_at_room(&mut self) {
        if let Some(wanted) = self.connection.watch() {
            self.full = wanted.contains(EventFlags::OUT);
        }
    }
}

#[cfg(test)]
mod tests {
    use spline_harness::nbd::{Connection, Kind};
    use spline_harness::wait_until;
    use std::time::Duration;

    #[test]
    fn what_is_written_is_read() {
        let dir = tempfile::tempdir().expect("a directory");
        let (file, socket) = (dir.path().join("disk"), dir.path().join("socket"));
        std::fs::File::create(&file).and_then(|disk| disk.set_len(16 << 20)).expect("a file");
        let theirs = (file.clone(), socket.clone());
        std::thread::spawn(move || super::serve(&theirs.0, &theirs.1).expect("serves"));
        let limit = Duration::from_secs(20);
        let mut client = wait_until("the server", limit, || Connection::open(&socket, "", limit).map(Some))
            .expect("listens");
        assert_eq!(client.size(), 16 << 20);
        for (length, seed) in [(4096u32, 3u8), (1 << 20, 5), (8 << 20, 7)] {
            let data: Vec<u8> = (0..length).map(|at| (at >> 8) as u8 ^ at as u8 ^ seed).collect();
            client.succeed(Kind::Write, 4096, length, &data).expect("writes");
            let read = client.succeed(Kind::Read, 4096, length, &[]).expect("reads");
            assert!(read == data, "length={length}");
            assert!(
                std::fs::read(&file).expect("reads")[4096..][..length as usize] == data,
                "length={length}"
            );
        }
        client.succeed(Kind::Flush, 0, 0, &[]).expect("flushes");
        assert!(client.succeed(Kind::Read, 16 << 20, 4096, &[]).is_err(), "past the end");
        client.close().expect("leaves");
    }
}
