//! The device as one front-end sees it: a state machine from vhost-user requests to replies and orders for workers.
//!
//! Called by `control`, made anew for each connection. Must not know: sockets, threads, which worker serves which queue.
//! `guest_cannot_crash_us`: what comes in the wrong order, or names what is not there, is refused and changes nothing.
//! `no_late_duplicate`: while workers still have requests of an abandoned connection, queues that are to be started are held.

pub mod queue;
pub mod refusal;

pub use refusal::Refusal;

use super::config::{self, ConfigSpace};
use super::inflight::{InflightRegion, QueueRecord};
use super::memory::{DirtyLog, GuestMemory, REGIONS_MAX};
use super::message::{Body, Header, InflightPlace, QueueAddresses, QueueNumber, Reply, Request};
use super::order::{Bell, Order};
use crate::export::Export;
use queue::{Phase, QueueState};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

/// How many queues, and how large.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shape {
    /// Queues.
    pub queues: u16,
    /// Most descriptors of each.
    pub queue_size_max: u16,
}

/// What a message comes to. The reply is sent when the workers have obeyed the orders.
#[derive(Debug, Default)]
pub struct Turn {
    /// What the front-end is told, if it waits for something.
    pub reply: Option<Reply>,
    /// What workers are to do, in this order.
    pub orders: Vec<Order>,
    /// Why the message changed nothing, if the reply says so.
    pub refused: Option<Refusal>,
}

/// The device.
#[derive(Debug)]
pub struct Device {
    shape: Shape,
    /// What may be accepted; does not change while a front-end is connected.
    offered: u64,
    space: ConfigSpace,
    /// The front-end has the space as it is.
    space_known: bool,
    features: u64,
    protocol: u64,
    memory: Arc<GuestMemory>,
    log: Option<Arc<DirtyLog>>,
    inflight: Option<Arc<InflightRegion>>,
    /// Where the front-end listens for us.
    channel: Option<OwnedFd>,
    queues: Vec<QueueState>,
    /// Workers still have requests of what was abandoned.
    held: bool,
}

impl Device {
    /// As a new front-end finds it. `held`: queues are not to be started before [`release`](Self::release).
    pub fn new(export: &Export, shape: Shape, held: bool) -> Self {
        Self {
            shape,
            offered: config::features(export),
            space: config::config_space(export, shape.queues),
            space_known: false,
            features: 0,
            protocol: 0,
            memory: Arc::default(),
            log: None,
            inflight: None,
            channel: None,
            queues: (0..shape.queues).map(|_| QueueState::default()).collect(),
            held,
        }
    }

    /// Acts upon a request, or refuses it with a reply that says so.
    ///
    /// # Errors
    /// It is refused and no reply can say so: the connection is to be closed.
    pub fn message(&mut self, header: &Header, request: Request) -> Result<Turn, Refusal> {
        // By what was agreed before this message.
        let told = self.refuse(header);
        match self.obey(header.request, request) {
            Ok(turn) if told.is_none() || turn.reply.is_some() => Ok(turn),
            Ok(turn) => Ok(Turn { reply: Some(Reply::acknowledge(header.request, true)), ..turn }),
            Err(refusal) => match told {
                Some(reply) => Ok(Turn { reply: Some(reply), orders: Vec::new(), refused: Some(refusal) }),
                None => Err(refusal),
            },
        }
    }

    /// The reply to a message that is refused, if the front-end waits for one (VHOST_USER_PROTOCOL_F_REPLY_ACK).
    pub fn refuse(&self, header: &Header) -> Option<Reply> {
        let waits = header.need_reply
            && self.protocol & config::PROTOCOL_REPLY_ACK != 0
            && !Request::has_reply(header.request);
        waits.then(|| Reply::acknowledge(header.request, false))
    }

    fn obey(&mut self, asked: u32, request: Request) -> Result<Turn, Refusal> {
        match request {
            Request::GetFeatures => Ok(number(asked, self.offered)),
            Request::SetFeatures(features) => self.set_features(features),
            Request::GetProtocolFeatures => Ok(number(asked, config::PROTOCOL_FEATURES)),
            Request::SetProtocolFeatures(features) => self.set_protocol_features(features),
            Request::SetOwner => Ok(self.begin()),
            Request::ResetOwner => Ok(self.reset()),
            Request::ResetDevice => {
                self.needs(config::PROTOCOL_RESET_DEVICE)?;
                Ok(self.reset())
            }
            Request::GetQueueNum => Ok(number(asked, self.shape.queues.into())),
            Request::SetMemTable(table) => self.remap(GuestMemory::map(table)?),
            Request::GetMaxMemSlots => {
                self.needs(config::PROTOCOL_CONFIGURE_MEM_SLOTS)?;
                Ok(number(asked, REGIONS_MAX as u64))
            }
            Request::AddMemReg(place, fd) => {
                self.needs(config::PROTOCOL_CONFIGURE_MEM_SLOTS)?;
                self.remap(self.memory.with_region(place, fd)?)
            }
            Request::RemMemReg(place) => {
                self.needs(config::PROTOCOL_CONFIGURE_MEM_SLOTS)?;
                self.remap(self.memory.without_region(place)?)
            }
            Request::SetLogBase { bytes, offset, fd } => self.set_log(bytes, offset, &fd),
            // We tell of no changes of the log: a front-end that wants them looks at it.
            Request::SetLogFd(_) => Ok(Turn::default()),
            Request::SetVringNum(size) => self.set_size(size),
            Request::SetVringAddr { queue, addresses } => self.set_addresses(queue, addresses),
            Request::SetVringBase(base) => self.set_base(base),
            Request::GetVringBase { queue } => self.stop(queue),
            Request::SetVringKick { queue, fd } => self.kick(queue, fd),
            Request::SetVringCall { queue, fd } => self.set_bell(queue, Bell::Call, fd),
            Request::SetVringErr { queue, fd } => self.set_bell(queue, Bell::Error, fd),
            Request::SetVringEnable { queue, enabled } => self.enable(queue, enabled),
            Request::SetBackendReqFd(fd) => {
                self.needs(config::PROTOCOL_BACKEND_REQ)?;
                self.channel = Some(fd);
                Ok(Turn::default())
            }
            Request::GetConfig { offset, bytes, flags } => self.config(offset, bytes, flags),
            Request::SetConfig => Err(Refusal::Config),
            Request::GetInflightFd(place) => self.create_inflight(place),
            Request::SetInflightFd(place, fd) => self.adopt_inflight(place, fd.as_fd()),
        }
    }

    fn needs(&self, protocol: u64) -> Result<(), Refusal> {
        if self.protocol & protocol == 0 { Err(Refusal::NotNegotiated(protocol)) } else { Ok(()) }
    }

    /// A front-end that begins anew on its connection, such as QEMU for another device, says everything again.
    fn begin(&mut self) -> Turn {
        if !self.is_serving() {
            (self.memory, self.log, self.inflight) = (Arc::default(), None, None);
        }
        Turn::default()
    }

    fn is_serving(&self) -> bool {
        self.queues.iter().any(|queue| queue.phase != Phase::Stopped)
    }

    fn set_features(&mut self, features: u64) -> Result<Turn, Refusal> {
        // ANY_LAYOUT is what QEMU offers to old drivers by itself; FLUSH is harmless, and a driver may have accepted it when
        // another gateway served the volume.
        let unknown = features & !(self.offered | config::ANY_LAYOUT | config::FLUSH);
        if unknown != 0 {
            return Err(Refusal::Features(unknown));
        }
        let changed = features ^ self.features;
        if changed & !config::LOG_ALL != 0 && self.is_serving() {
            return Err(Refusal::Serving("features"));
        }
        let before = std::mem::replace(&mut self.features, features);
        if changed & config::LOG_ALL == 0 {
            return Ok(Turn::default());
        }
        let turn = self.remap(GuestMemory::clone(&self.memory));
        if turn.is_err() {
            self.features = before;
        }
        turn
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<Turn, Refusal> {
        match features & !config::PROTOCOL_FEATURES {
            0 => {
                self.protocol = features;
                Ok(Turn::default())
            }
            unknown => Err(Refusal::ProtocolFeatures(unknown)),
        }
    }

    /// Takes over another memory, with the log if everything is to be logged. Queues that are served move to where their rings
    /// are now.
    fn remap(&mut self, memory: GuestMemory) -> Result<Turn, Refusal> {
        let log = self.log.clone().filter(|_| self.features & config::LOG_ALL != 0);
        if let Some(log) = &log
            && !log.covers(memory.guest_end())
        {
            return Err(Refusal::LogSize(memory.guest_end()));
        }
        let memory = Arc::new(memory.with_log(log));
        let mut moved = Vec::new();
        for (number, queue) in (0..).zip(&mut self.queues) {
            if queue.phase == Phase::Stopped {
                continue;
            }
            if let Ok(found) = queue.find(&memory) {
                queue.rings = Some(found);
            }
            if let Some(rings) = queue.rings.clone().filter(|_| queue.phase != Phase::Held) {
                moved.push((number, rings));
            }
        }
        self.memory = Arc::clone(&memory);
        let orders = if moved.is_empty() { Vec::new() } else { vec![Order::Memory { memory, rings: moved }] };
        Ok(Turn { orders, ..Turn::default() })
    }

    fn set_log(&mut self, bytes: u64, offset: u64, fd: &OwnedFd) -> Result<Turn, Refusal> {
        self.needs(config::PROTOCOL_LOG_SHMFD)?;
        let log = DirtyLog::map(fd.as_fd(), offset, bytes).map_err(Refusal::Log)?;
        if !log.covers(self.memory.guest_end()) {
            return Err(Refusal::LogSize(self.memory.guest_end()));
        }
        self.log = Some(Arc::new(log));
        let turn = self.remap(GuestMemory::clone(&self.memory))?;
        Ok(Turn { reply: Some(Reply::log(bytes, offset)), ..turn })
    }

    fn queue(&mut self, queue: u32) -> Result<(u16, &mut QueueState), Refusal> {
        let queues = self.shape.queues;
        let missing = Refusal::Queue { queue, queues };
        let Ok(number) = u16::try_from(queue) else { return Err(missing) };
        self.queues.get_mut(usize::from(number)).map(|state| (number, state)).ok_or(missing)
    }

    /// A queue that may be changed, because it is not served.
    fn stopped(&mut self, queue: u32, what: &'static str) -> Result<&mut QueueState, Refusal> {
        match self.queue(queue)? {
            (_, state) if state.phase == Phase::Stopped => Ok(state),
            _ => Err(Refusal::Serving(what)),
        }
    }

    fn set_size(&mut self, QueueNumber { queue, number }: QueueNumber) -> Result<Turn, Refusal> {
        let limit = self.shape.queue_size_max;
        let state = self.stopped(queue, "size")?;
        match u16::try_from(number) {
            Ok(size) if size.is_power_of_two() && size <= limit => state.size = Some(size),
            _ => return Err(Refusal::Size { size: number, limit }),
        }
        Ok(Turn::default())
    }

    fn set_base(&mut self, QueueNumber { queue, number }: QueueNumber) -> Result<Turn, Refusal> {
        let state = self.stopped(queue, "base")?;
        state.next_available = u16::try_from(number).map_err(|_| Refusal::Base(number))?;
        Ok(Turn::default())
    }

    fn set_addresses(&mut self, queue: u32, addresses: QueueAddresses) -> Result<Turn, Refusal> {
        let memory = Arc::clone(&self.memory);
        let (number, state) = self.queue(queue)?;
        if state.size.is_none() {
            return Err(Refusal::Early("size"));
        }
        let before = state.addresses.replace(addresses);
        if state.phase == Phase::Stopped {
            return Ok(Turn::default());
        }
        // While a queue is served this switches logging of its used ring.
        match state.find(&memory) {
            Ok(rings) => {
                state.rings = Some(rings.clone());
                let order = Order::Memory { memory, rings: vec![(number, rings)] };
                let orders = if state.phase == Phase::Held { Vec::new() } else { vec![order] };
                Ok(Turn { orders, ..Turn::default() })
            }
            Err(refusal) => {
                state.addresses = before;
                Err(refusal)
            }
        }
    }

    fn set_bell(&mut self, queue: u32, bell: Bell, fd: Option<OwnedFd>) -> Result<Turn, Refusal> {
        let (queue, state) = self.queue(queue)?;
        let ours = state.bell(bell);
        *ours = fd;
        if state.phase != Phase::Running {
            return Ok(Turn::default());
        }
        let ours = state.bell(bell);
        // A queue that stops needs a new kick to start.
        let fd = if bell == Bell::Kick { ours.take() } else { queue::duplicate(ours) };
        Ok(Turn { orders: vec![Order::Bell { queue, bell, fd }], ..Turn::default() })
    }

    /// The front-end's kick is what starts a queue.
    fn kick(&mut self, queue: u32, fd: Option<OwnedFd>) -> Result<Turn, Refusal> {
        let memory = Arc::clone(&self.memory);
        let (number, state) = self.queue(queue)?;
        if state.phase != Phase::Stopped {
            return self.set_bell(queue, Bell::Kick, fd);
        }
        let rings = state.find(&memory)?;
        self.record(number)?;
        let state = &mut self.queues[usize::from(number)];
        (state.kick, state.rings, state.phase) = (fd, Some(rings), Phase::Held);
        let orders = if self.held { Vec::new() } else { self.start_held()? };
        Ok(Turn { orders, ..Turn::default() })
    }

    /// What keeps a queue's unanswered heads, if the front-end has brought something for that.
    fn record(&self, queue: u16) -> Result<Option<QueueRecord>, Refusal> {
        let size = self.queues[usize::from(queue)].size.unwrap_or_default();
        let Some(region) = &self.inflight else { return Ok(None) };
        region.queue(queue, size).map(Some).ok_or(Refusal::InflightShape { queue, size })
    }

    fn start_held(&mut self) -> Result<Vec<Order>, Refusal> {
        let mut orders = Vec::new();
        for number in 0..self.shape.queues {
            let record = match self.queues[usize::from(number)].phase {
                Phase::Held => self.record(number)?,
                _ => continue,
            };
            let state = &mut self.queues[usize::from(number)];
            if let Some(rings) = state.rings.clone() {
                orders.push(state.start(number, (Arc::clone(&self.memory), rings), record, self.features));
            }
        }
        Ok(orders)
    }

    fn enable(&mut self, queue: u32, enabled: bool) -> Result<Turn, Refusal> {
        let (queue, state) = self.queue(queue)?;
        state.enabled = enabled;
        match state.phase {
            Phase::Running => Ok(Turn { orders: vec![Order::Enable { queue, enabled }], ..Turn::default() }),
            _ => Ok(Turn::default()),
        }
    }

    /// GET_VRING_BASE: answered at once, or with [`drained`](Self::drained).
    fn stop(&mut self, queue: u32) -> Result<Turn, Refusal> {
        let (number, state) = self.queue(queue)?;
        match state.phase {
            Phase::Running => {
                state.phase = Phase::Stopping;
                Ok(Turn { orders: vec![Order::Stop { queue: number }], ..Turn::default() })
            }
            Phase::Stopping => Err(Refusal::Serving("base")),
            Phase::Held | Phase::Stopped => {
                (state.phase, state.rings) = (Phase::Stopped, None);
                Ok(Turn { reply: Some(Reply::base(queue, state.next_available)), ..Turn::default() })
            }
        }
    }

    /// A worker has stopped a queue, and everything that it fetched is answered.
    pub fn drained(&mut self, queue: u16, next_available: u16) -> Option<Reply> {
        let state = self.queues.get_mut(usize::from(queue)).filter(|state| state.phase == Phase::Stopping)?;
        (state.phase, state.rings) = (Phase::Stopped, None);
        state.next_available = next_available;
        Some(Reply::base(queue.into(), next_available))
    }

    /// Back to the beginning, but for what belongs to the connection: memory, the log, protocol features and the channel.
    fn reset(&mut self) -> Turn {
        let serving = self.queues.iter().any(|queue| matches!(queue.phase, Phase::Running | Phase::Stopping));
        self.queues.iter_mut().for_each(|queue| *queue = QueueState::default());
        self.features = 0;
        self.inflight = None;
        self.memory = Arc::new(self.memory.with_log(None));
        self.held |= serving;
        Turn { orders: if serving { vec![Order::Abandon] } else { Vec::new() }, ..Turn::default() }
    }

    /// Workers have nothing left of what was abandoned: starts the queues that were held.
    ///
    /// # Errors
    /// If one of them can not be started any more: the connection is to be closed.
    pub fn release(&mut self) -> Result<Vec<Order>, Refusal> {
        self.held = false;
        self.start_held()
    }

    /// Ends every queue that is served once what it fetched is answered, because this process ends.
    pub fn wind_down(&mut self) -> Vec<Order> {
        let mut orders = Vec::new();
        for (queue, state) in (0..).zip(&mut self.queues) {
            match state.phase {
                Phase::Running => {
                    state.phase = Phase::Stopping;
                    orders.push(Order::Stop { queue });
                }
                Phase::Held => state.phase = Phase::Stopped,
                Phase::Stopped | Phase::Stopping => {}
            }
        }
        orders
    }

    fn config(&mut self, offset: u32, bytes: u32, flags: u32) -> Result<Turn, Refusal> {
        self.needs(config::PROTOCOL_CONFIG)?;
        // With the capacity, which is all that changes.
        self.space_known |= offset == 0 && bytes as usize >= size_of::<u64>();
        let end = u64::from(offset) + u64::from(bytes);
        let part = self.space.get(offset as usize..usize::try_from(end).unwrap_or(usize::MAX));
        // Without bytes the reply says that there are none.
        let part = part.unwrap_or_default().to_vec();
        Ok(Turn { reply: Some(Reply::config(offset, flags, part)), ..Turn::default() })
    }

    fn create_inflight(&mut self, wish: InflightPlace) -> Result<Turn, Refusal> {
        let InflightPlace { queues, queue_size, .. } = wish;
        self.needs(config::PROTOCOL_INFLIGHT_SHMFD)?;
        let (fd, bytes) = InflightRegion::create(queues, queue_size)?;
        let place = InflightPlace { bytes, offset: 0, queues, queue_size };
        // In use from here on, whether or not it comes back with SET_INFLIGHT_FD.
        self.adopt_inflight(place, fd.as_fd())?;
        Ok(Turn { reply: Some(Reply::inflight(place, fd)), ..Turn::default() })
    }

    fn adopt_inflight(&mut self, place: InflightPlace, fd: BorrowedFd<'_>) -> Result<Turn, Refusal> {
        self.needs(config::PROTOCOL_INFLIGHT_SHMFD)?;
        if self.is_serving() {
            return Err(Refusal::Serving("inflight_region"));
        }
        let InflightPlace { bytes, offset, queues, queue_size } = place;
        self.inflight = Some(Arc::new(InflightRegion::adopt(fd, (offset, bytes), queues, queue_size)?));
        Ok(Turn::default())
    }

    /// The volume has changed. Answers whether the config space did.
    pub fn update(&mut self, export: &Export) -> bool {
        let space = config::config_space(export, self.shape.queues);
        let changed = std::mem::replace(&mut self.space, space) != space;
        self.space_known &= !changed;
        changed
    }

    /// Whether queues are served and the front-end may not know the config space as it is. QEMU reads it when it makes its
    /// device and not when it connects again, and does not listen to changes while no queue is served.
    pub fn is_behind(&self) -> bool {
        self.is_serving() && !self.space_known
    }

    /// The front-end was told to read the space.
    pub fn told(&mut self) {
        self.space_known |= self.is_serving();
    }

    /// Where to tell the front-end of changes, if it wants to be told.
    pub fn channel(&self) -> Option<BorrowedFd<'_>> {
        let wanted = config::PROTOCOL_BACKEND_REQ | config::PROTOCOL_CONFIG;
        self.channel.as_ref().filter(|_| self.protocol & wanted == wanted).map(AsFd::as_fd)
    }

    /// The channel does not work.
    pub fn close_channel(&mut self) {
        self.channel = None;
    }
}

fn number(request: u32, number: u64) -> Turn {
    Turn { reply: Some(Reply { request, body: Body::Number(number) }), ..Turn::default() }
}

#[cfg(test)]
mod tests;
