//! The queue's side of the server without a link: chains become requests of the lane, and are answered.
//!
//! Polled by the thread of the queues. Obeys the same orders as nebd's worker, looks before it sleeps as that does
//! ([`Polling`]), but keeps no table for a replay and knows no gateway. Must not know: vhost-user messages.

use super::watched;
use spline_gateway::local::LocalFile;
use spline_link::memory::SharedMemory;
use spline_link::ring::Piece;
use spline_nebd::export::Export;
use spline_nebd::vhost::config::FLUSH;
use spline_nebd::vhost::memory::{GuestMemory, Segment};
use spline_nebd::vhost::order::{Bell, Done, Mailbox, Order, QueueStart, Report};
use spline_nebd::vhost::queue::{Chain, Queue};
use spline_nebd::vhost::request::{self, Wish, understand};
use spline_nebd::vhost::status::{BlkStatus, blk_status};
use spline_nebd::vhost::worker::polling::Polling;
use spline_types::{BlockOp, BlockRequest, Fault, RequestId};
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;
use tokio::io::unix::AsyncFd;

/// Chains fetched from a queue before the others get their turn, as nebd's worker does.
const FETCHES_PER_TURN: usize = 64;
/// Turns before the runtime gets its own.
const TURNS_MAX: usize = 16;

/// A queue and its descriptors.
struct Served {
    queue: Queue,
    enabled: bool,
    stopping: bool,
    broken: bool,
    writethrough: bool,
    kick: Option<AsyncFd<OwnedFd>>,
    call: Option<OwnedFd>,
}

/// A chain that was fetched and is not answered.
struct Open {
    queue: u16,
    head: u16,
    request: BlockRequest,
    data: Vec<Segment>,
    status: Segment,
    memory: Arc<GuestMemory>,
    abandoned: bool,
}

/// Serves all queues of the device.
pub struct Worker {
    file: LocalFile,
    export: Export,
    orders: Arc<Mailbox<Order>>,
    bell: AsyncFd<OwnedFd>,
    reports: Arc<Mailbox<Report>>,
    queues: BTreeMap<u16, Served>,
    /// By ticket.
    open: Vec<Option<Open>>,
    free: Vec<u32>,
    /// Tickets that the lane did not take yet: something is in their place.
    deferred: VecDeque<u32>,
    /// What the lane knows.
    shared: Option<Arc<GuestMemory>>,
    ended: Vec<(u32, Result<(), Fault>)>,
    chain: Chain,
    pieces: Vec<Piece>,
    abandoning: bool,
    over: bool,
    polling: Polling,
    answered: Option<Instant>,
}

impl Served {
    fn new(mut start: QueueStart) -> anyhow::Result<Self> {
        let mut served = Self {
            queue: Queue::start(&mut start)?,
            enabled: start.enabled,
            stopping: false,
            broken: false,
            writethrough: start.features & FLUSH == 0,
            kick: None,
            call: start.call,
        };
        served.set_kick(start.kick)?;
        served.call();
        Ok(served)
    }

    fn set_kick(&mut self, fd: Option<OwnedFd>) -> io::Result<()> {
        self.kick = fd.map(watched).transpose()?;
        Ok(())
    }

    fn is_open(&self) -> bool {
        self.enabled && !self.stopping && !self.broken
    }

    fn call(&self) {
        if let Some(call) = &self.call {
            let _ = rustix::io::write(call, &1u64.to_ne_bytes());
        }
    }
}

impl Worker {
    /// A worker without queues.
    ///
    /// # Errors
    /// If there is no descriptor left.
    pub fn new(
        file: LocalFile,
        export: Export,
        orders: Arc<Mailbox<Order>>,
        reports: Arc<Mailbox<Report>>,
    ) -> io::Result<Self> {
        let bell = watched(orders.bell().try_clone_to_owned()?)?;
        Ok(Self {
            file,
            export,
            orders,
            bell,
            reports,
            queues: BTreeMap::new(),
            open: Vec::new(),
            free: Vec::new(),
            deferred: VecDeque::new(),
            shared: None,
            ended: Vec::new(),
            chain: Chain::default(),
            pieces: Vec::new(),
            abandoning: false,
            over: false,
            polling: Polling::default(),
            answered: None,
        })
    }

    /// Gives the file back.
    pub async fn close(self) {
        self.file.close().await;
    }

    fn has_nothing_open(&self) -> bool {
        self.free.len() == self.open.len()
    }

    /// Ready when it was told to end.
    ///
    /// # Errors
    /// If descriptors can not be waited for.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<anyhow::Result<()>> {
        for _ in 0..TURNS_MAX {
            // Until it answers that nothing has come, a descriptor does not tell the waker of what comes.
            while let Poll::Ready(rung) = self.bell.poll_read_ready(cx) {
                rung?.clear_ready();
                self.obey_all()?;
            }
            for kick in self.queues.values().filter_map(|served| served.kick.as_ref()) {
                // Each notification makes the descriptor ready anew, so that it need not be read.
                while let Poll::Ready(kicked) = kick.poll_read_ready(cx) {
                    kicked?.clear_ready();
                }
            }
            if self.over {
                return Poll::Ready(Ok(()));
            }
            let moved = self.turn(cx)?;
            if !moved && !self.look() && !self.listen() {
                return Poll::Pending;
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Takes answers, fetches, shows; whether anything has ended.
    fn turn(&mut self, cx: &mut Context<'_>) -> anyhow::Result<bool> {
        self.fetch_all()?;
        let moved = self.file.poll(cx, &mut self.ended).is_ready();
        let mut ended = std::mem::take(&mut self.ended);
        for (ticket, result) in ended.drain(..) {
            self.answer(ticket, result);
        }
        self.ended = ended;
        if moved {
            for ticket in std::mem::take(&mut self.deferred) {
                self.begin(ticket);
            }
        }
        for served in self.queues.values_mut() {
            if served.queue.publish() {
                served.call();
            }
        }
        self.finish();
        Ok(moved)
    }

    fn look(&mut self) -> bool {
        if !self.has_nothing_open() {
            return false;
        }
        let answered = *self.answered.get_or_insert_with(Instant::now);
        let mut now = answered;
        while now - answered < self.polling.window() {
            now = Instant::now();
            if self.queues.values().any(|served| served.is_open() && served.queue.has_work()) {
                return true;
            }
            std::hint::spin_loop();
        }
        false
    }

    fn listen(&mut self) -> bool {
        let open = self.queues.values_mut().filter(|served| served.is_open());
        open.filter_map(|served| served.queue.listen().then_some(())).count() > 0
    }

    fn fetch_all(&mut self) -> anyhow::Result<()> {
        let mut chain = std::mem::take(&mut self.chain);
        let mut queues = std::mem::take(&mut self.queues);
        for (number, served) in &mut queues {
            for _ in 0..FETCHES_PER_TURN {
                if !served.is_open() {
                    break;
                }
                served.queue.ignore();
                match served.queue.fetch(&mut chain) {
                    Ok(false) => break,
                    Ok(true) => self.take(*number, served, &mut chain),
                    Err(why) => {
                        served.broken = true;
                        self.reports.put(Report::Broken { queue: *number, why });
                    }
                }
            }
        }
        (self.chain, self.queues) = (chain, queues);
        Ok(())
    }

    fn take(&mut self, number: u16, served: &mut Served, chain: &mut Chain) {
        let memory = Arc::clone(served.queue.memory());
        let (wish, status) = match understand(chain, &memory, &self.export, served.writethrough) {
            Ok(understood) => understood,
            Err(why) => {
                served.queue.forget(chain.head);
                served.broken = true;
                return self.reports.put(Report::Broken { queue: number, why });
            }
        };
        let (written, status_byte) = match wish {
            Wish::Block { op: op @ (BlockOp::Read | BlockOp::Write | BlockOp::Flush), range, fua } => {
                let data = match op {
                    BlockOp::Read => std::mem::take(&mut chain.writable),
                    _ => std::mem::take(&mut chain.readable),
                };
                let request = BlockRequest { id: RequestId::new(0), op, range, fua };
                let (queue, head) = (number, chain.head);
                let open = Open { queue, head, request, data, status, memory, abandoned: false };
                let ticket = self.admit(open);
                if let Some(answered) = self.answered.take() {
                    self.polling.learn(answered.elapsed());
                }
                return self.begin(ticket);
            }
            // Nobody measures the rest.
            Wish::Block { .. } => (0, BlkStatus::Unsupported),
            Wish::Serial => (request::write_serial(&memory, &chain.writable, "direct"), BlkStatus::Ok),
            Wish::Nothing => (0, BlkStatus::Ok),
            Wish::Refused(fault) => (0, blk_status(fault)),
        };
        request::answer(&memory, status, status_byte);
        served.queue.add_used(chain.head, written + 1);
    }

    fn admit(&mut self, open: Open) -> u32 {
        match self.free.pop() {
            Some(ticket) => {
                self.open[ticket as usize] = Some(open);
                ticket
            }
            None => {
                self.open.push(Some(open));
                self.open.len() as u32 - 1
            }
        }
    }

    /// Gives a request to the lane, or tries it again when something has ended.
    fn begin(&mut self, ticket: u32) {
        let Some(open) = &self.open[ticket as usize] else { return };
        if self.shared.as_ref().is_none_or(|shared| !Arc::ptr_eq(shared, &open.memory)) {
            let regions = open.memory.regions().map(|region| {
                let (fd, place) = (region.file().try_clone_to_owned()?, region.place());
                SharedMemory::map(fd, place.offset, place.length).map_err(io::Error::other)
            });
            let Ok(regions) = regions.collect::<io::Result<Vec<_>>>() else {
                return self.answer(ticket, Err(Fault::Internal));
            };
            self.file.share(regions.into_iter());
            self.shared = Some(Arc::clone(&open.memory));
        }
        self.pieces.clear();
        self.pieces.extend(open.data.iter().map(|segment| Piece {
            region: segment.region,
            length: segment.length,
            offset: segment.offset,
        }));
        if !self.file.begin(ticket, &open.request, &self.pieces) {
            match self.file.is_idle() {
                // Nothing is in its place: it will never be taken.
                true => self.answer(ticket, Err(Fault::Unsupported)),
                false => self.deferred.push_back(ticket),
            }
        }
    }

    fn answer(&mut self, ticket: u32, result: Result<(), Fault>) {
        let Some(open) = self.open[ticket as usize].take() else { return };
        self.free.push(ticket);
        let Some(served) = self.queues.get_mut(&open.queue).filter(|_| !open.abandoned) else { return };
        let read = match open.request.op {
            BlockOp::Read if result.is_ok() => open.request.range.length() as u32,
            _ => 0,
        };
        request::answer(&open.memory, open.status, result.map_or_else(blk_status, |()| BlkStatus::Ok));
        served.queue.add_used(open.head, read + 1);
    }

    fn obey_all(&mut self) -> anyhow::Result<()> {
        for order in self.orders.take() {
            let done = match order {
                Order::Start(start) => {
                    let queue = start.queue;
                    self.queues.insert(queue, Served::new(*start)?);
                    Done::Started { queue }
                }
                Order::Stop { queue } => match self.queues.get_mut(&queue) {
                    Some(served) => {
                        served.stopping = true;
                        continue;
                    }
                    None => Done::Stopped { queue, next_available: 0 },
                },
                Order::Abandon => {
                    self.queues.clear();
                    self.open.iter_mut().flatten().for_each(|open| open.abandoned = true);
                    self.abandoning = true;
                    continue;
                }
                Order::End => {
                    self.over = true;
                    return Ok(());
                }
                other => {
                    self.change(other)?;
                    Done::Other
                }
            };
            self.reports.put(Report::Obeyed { worker: 0, done });
        }
        Ok(())
    }

    fn change(&mut self, order: Order) -> anyhow::Result<()> {
        match order {
            Order::Bell { queue, bell, fd } => {
                if let Some(served) = self.queues.get_mut(&queue) {
                    match bell {
                        Bell::Kick => served.set_kick(fd)?,
                        Bell::Call => {
                            served.call = fd;
                            served.call();
                        }
                        Bell::Error => {}
                    }
                }
            }
            Order::Enable { queue, enabled } => {
                if let Some(served) = self.queues.get_mut(&queue) {
                    served.enabled = enabled;
                }
            }
            Order::Memory { memory, rings } => {
                for (queue, rings) in rings {
                    if let Some(served) = self.queues.get_mut(&queue) {
                        served.queue.remap(&memory, rings);
                    }
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Reports what has come to its end.
    fn finish(&mut self) {
        let stopped = self.queues.iter().filter(|(_, served)| served.stopping && served.queue.open() == 0);
        let stopped: Vec<u16> = stopped.map(|(queue, _)| *queue).collect();
        for queue in stopped {
            if let Some(served) = self.queues.remove(&queue) {
                let next_available = served.queue.next_available();
                self.reports.put(Report::Obeyed { worker: 0, done: Done::Stopped { queue, next_available } });
            }
        }
        if self.abandoning && self.has_nothing_open() {
            self.abandoning = false;
            self.reports.put(Report::Obeyed { worker: 0, done: Done::Abandoned });
        }
    }
}
