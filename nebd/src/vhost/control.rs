//! Control: the thread of one vhost-user-blk export that speaks with its front-end.
//!
//! Started by `vhost`. It listens, takes one front-end at a time, has `device` judge each message, hands orders to workers and sends
//! replies when they have obeyed. Shares nothing with workers but mailboxes. Must not know: virtqueues, requests.
//!
//! `guest_cannot_crash_us`: a front-end that breaks the protocol loses its connection, and the next one is served.
//! `bounded`: one connection, one message and one reply of it at a time; others wait in the socket's backlog. Without messages the
//! thread sleeps.

pub mod crew;
pub mod front;

use crate::config::CheckedVhost;
use crate::doors::VhostDoors;
use crate::event_loop::{ACCEPT_PAUSE, STOP_LIMIT, Serving};
use crate::export::Export;
use crate::metrics::Metrics;
use crate::poller::Poller;
use crate::status_file::{Kind, Status};
use crate::vhost::connection::Closed;
use crate::vhost::device::Shape;
use crate::vhost::order::{Done, Mailbox, Order, Report};
use anyhow::Context;
use crew::Crew;
use front::{Ended, Front};
use rustix::event::epoll::EventFlags;
use spline_link::{Accepted, Hello};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

const STOP: u64 = 0;
const REPORTS: u64 = 1;
const LISTENER: u64 = 2;
const FRONT: u64 = 3;
/// Wait of a front-end after which the log says so: workers need milliseconds unless the gateway is away.
const SLOW_AFTER: Duration = Duration::from_secs(5);
/// Messages taken before reports get their turn.
const MESSAGES_PER_TURN: usize = 64;
/// Time between two lines in the log that a front-end may cause.
const LINE_EVERY: Duration = Duration::from_secs(1);

/// What control is made of.
#[derive(Debug)]
pub struct Setup {
    /// What the guest is told; size and traits are known from the first [`Report::Accepted`] on.
    pub export: Export,
    /// How it is served.
    pub device: CheckedVhost,
    /// Where the front-end connects.
    pub doors: VhostDoors,
    /// What the first worker opens the volume with.
    pub hello: Hello,
    /// Where each worker takes its orders.
    pub workers: Vec<Arc<Mailbox<Order>>>,
    /// What they tell.
    pub reports: Arc<Mailbox<Report>>,
    /// Counters.
    pub metrics: Metrics,
    /// Becomes readable when the thread is to end.
    pub stop: OwnedFd,
    /// Told once, when front-ends may come.
    pub serving: Sender<Serving>,
}

/// Serves front-ends until it is told to stop. Workers go on: whoever started them ends them.
///
/// # Errors
/// If a worker has ended, such as when the gateway refuses the volume, if nobody can be listened for, or if epoll fails.
pub fn run(setup: Setup) -> anyhow::Result<()> {
    Control::new(setup)?.run()
}

struct Control {
    export: Export,
    /// Our config refuses writes, whatever the volume allows.
    read_only: bool,
    device: CheckedVhost,
    doors: VhostDoors,
    crew: Crew,
    reports: Arc<Mailbox<Report>>,
    metrics: Metrics,
    stop: OwnedFd,
    serving: Sender<Serving>,
    volume: String,
    poller: Poller,
    open: bool,
    front: Option<Front>,
    /// A newer session has the volume; the next front-end wants it back.
    lost: bool,
    accept_paused: Option<Instant>,
    /// The front-end is not read: what its last message asked for is not done.
    waits: bool,
    /// Since when, until that was said.
    waiting_since: Option<Instant>,
    stopping: Option<Instant>,
    /// Lines of what front-ends do wrong.
    lines: Lines,
    /// Lines of their coming.
    arrivals: Lines,
}

/// Keeps a front-end from filling the log.
#[derive(Debug, Default)]
struct Lines {
    last: Option<Instant>,
    left_out: u64,
}

impl Lines {
    /// Whether a line may be written at `now`; answers how many were left out since the last.
    fn allow(&mut self, now: Instant) -> Option<u64> {
        if self.last.is_some_and(|last| now.saturating_duration_since(last) < LINE_EVERY) {
            self.left_out += 1;
            return None;
        }
        self.last = Some(now);
        Some(std::mem::take(&mut self.left_out))
    }
}

impl Control {
    fn new(setup: Setup) -> anyhow::Result<Self> {
        let poller = Poller::new().context("create an epoll instance")?;
        poller.add(setup.stop.as_fd(), STOP, EventFlags::IN)?;
        poller.add(setup.reports.bell(), REPORTS, EventFlags::IN)?;
        Ok(Self {
            read_only: setup.export.read_only,
            export: setup.export,
            device: setup.device,
            doors: setup.doors,
            volume: setup.hello.volume.to_string(),
            crew: Crew::new(setup.workers, setup.hello),
            reports: setup.reports,
            metrics: setup.metrics,
            stop: setup.stop,
            serving: setup.serving,
            poller,
            open: false,
            front: None,
            lost: false,
            accept_paused: None,
            waits: false,
            waiting_since: None,
            stopping: None,
            lines: Lines::default(),
            arrivals: Lines::default(),
        })
    }

    fn run(mut self) -> anyhow::Result<()> {
        let mut ready = Vec::new();
        while !self.is_done() {
            let slow = self.waiting_since.map(|since| since + SLOW_AFTER);
            let deadline = [self.accept_paused, self.stopping, slow].into_iter().flatten().min();
            let timeout = deadline.map(|at| at.saturating_duration_since(Instant::now()));
            self.poller.wait(&mut ready, timeout).context("wait for events")?;
            if self.accept_paused.is_some_and(|until| until <= Instant::now()) {
                self.accept_paused = None;
                self.watch_listener()?;
            }
            if slow.is_some_and(|at| at <= Instant::now()) {
                self.waiting_since = None;
                tracing::warn!(
                    "front-end waits, its machine with it, until what its guest has asked for is answered; look at the gateway"
                );
            }
            for (token, flags) in &ready {
                match *token {
                    STOP => self.begin_stop()?,
                    REPORTS => self.reports()?,
                    LISTENER => self.accept()?,
                    _ => self.front_ready(*flags)?,
                }
            }
        }
        Ok(())
    }

    fn is_done(&self) -> bool {
        self.stopping.is_some_and(|limit| self.crew.is_quiet() || Instant::now() >= limit)
    }

    fn begin_stop(&mut self) -> anyhow::Result<()> {
        if self.stopping.is_some() {
            return Ok(());
        }
        self.stopping = Some(Instant::now() + STOP_LIMIT);
        // Level-triggered: without this every wait would end at once.
        self.poller.modify(self.stop.as_fd(), STOP, EventFlags::empty())?;
        if let Some(front) = &mut self.front {
            tracing::info!("stopping, requests that are open are answered first");
            self.crew.order(front.device.wind_down());
        }
        self.watch_listener()?;
        self.watch()
    }

    fn reports(&mut self) -> anyhow::Result<()> {
        for report in self.reports.take() {
            match report {
                Report::Accepted(accepted) => self.accepted(&accepted)?,
                Report::Resized { size } => {
                    self.grown(size);
                    self.announce();
                }
                Report::Obeyed { worker, done } => self.obeyed(worker, done)?,
                Report::Broken { queue, why } => {
                    if let Some(left_out) = self.lines.allow(Instant::now()) {
                        tracing::warn!(
                            queue, reason = %why, left_out, "guest broke its queue, it is not served until it is reset"
                        );
                    }
                }
                Report::Lost { worker } => {
                    self.lost = true;
                    self.crew.lost(worker);
                }
                Report::Ended(result) => result?,
            }
        }
        self.proceed()
    }

    /// A gateway serves the volume: for the first time, or again.
    fn accepted(&mut self, accepted: &Accepted) -> anyhow::Result<()> {
        let known = self.export.geometry.size;
        self.export.update(accepted, self.read_only);
        self.grown(known);
        self.crew.accepted(accepted.identity);
        if !self.open && self.stopping.is_none() {
            self.open_doors()?;
        }
        self.announce();
        Ok(())
    }

    /// A volume never shrinks: what says so was under way while another worker heard of more.
    fn grown(&mut self, size: u64) {
        self.export.geometry.size = self.export.geometry.size.max(size);
    }

    fn open_doors(&mut self) -> anyhow::Result<()> {
        self.doors.listener.open()?;
        self.poller.add(self.doors.listener.socket(), LISTENER, EventFlags::empty())?;
        self.open = true;
        let path = self.device.socket.display().to_string();
        let status = Status {
            kind: Kind::Vhost,
            pid: std::process::id(),
            volume: self.volume.clone(),
            export: self.export.name.clone(),
            sockets: vec![path.clone()],
            queues: Some(self.device.queues),
            serial: Some(self.device.serial.clone()),
            version: spline_process::VERSION.to_owned(),
        };
        self.doors.status.publish(&status).context("write the status file, check runtime_dir")?;
        // Nobody listening for it is the starter's choice.
        let _ = self.serving.send(Serving { uris: vec![path] });
        self.watch_listener()
    }

    /// The volume may have changed: the guest is told, if its front-end wants to know.
    fn announce(&mut self) {
        if let Some(front) = &mut self.front
            && front.device.update(&self.export)
            && front.announce()
        {
            tracing::info!(bytes = self.export.geometry.size, "guest is told of the volume's size");
        }
    }

    fn obeyed(&mut self, worker: usize, done: Done) -> anyhow::Result<()> {
        self.crew.obeyed(worker, done);
        let Some(front) = &mut self.front else { return Ok(()) };
        if let Done::Stopped { queue, next_available } = done
            && self.stopping.is_none()
        {
            let reply = front.device.drained(queue, next_available);
            front.hold(reply);
        }
        if matches!(done, Done::Abandoned) && self.crew.has_abandoned() && self.stopping.is_none() {
            match front.device.release() {
                Ok(orders) => {
                    self.crew.order(orders);
                    front.catch_up();
                }
                Err(refusal) => return self.part(&Ended::Refused(refusal)),
            }
        }
        Ok(())
    }

    fn watch_listener(&self) -> anyhow::Result<()> {
        if !self.open {
            return Ok(());
        }
        let wanted = self.front.is_none() && self.accept_paused.is_none() && self.stopping.is_none();
        let flags = if wanted { EventFlags::IN } else { EventFlags::empty() };
        self.poller.modify(self.doors.listener.socket(), LISTENER, flags).context("watch the listener")
    }

    fn accept(&mut self) -> anyhow::Result<()> {
        if self.front.is_some() {
            return Ok(());
        }
        match self.doors.listener.accept() {
            Ok(None) => Ok(()),
            Ok(Some(socket)) => self.greet(socket),
            Err(error) => {
                tracing::error!(%error, "accepting front-ends pauses, check the limit of open files");
                self.accept_paused = Some(Instant::now() + ACCEPT_PAUSE);
                self.watch_listener()
            }
        }
    }

    fn greet(&mut self, socket: OwnedFd) -> anyhow::Result<()> {
        let shape = Shape { queues: self.device.queues, queue_size_max: self.device.queue_size_max };
        if let Err(error) = self.poller.add(socket.as_fd(), FRONT, EventFlags::IN) {
            tracing::error!(%error, "front-end can not be watched");
            return Ok(());
        }
        self.front = Some(Front::new(socket, &self.export, shape, !self.crew.has_abandoned()));
        self.metrics.connects.inc();
        self.metrics.connections.set(1);
        if let Some(left_out) = self.arrivals.allow(Instant::now()) {
            tracing::info!(held = !self.crew.has_abandoned(), left_out, "front-end connected");
        }
        if std::mem::take(&mut self.lost) {
            // It came after the volume was lost: nothing that it knows is older than the other session's writes.
            self.crew.reopen();
        }
        self.watch_listener()
    }

    fn front_ready(&mut self, flags: EventFlags) -> anyhow::Result<()> {
        let gone = flags.intersects(EventFlags::HUP | EventFlags::RDHUP | EventFlags::ERR);
        let Some(front) = &self.front else { return Ok(()) };
        // While it is not read its messages can not say that it is gone.
        if gone && (self.stopping.is_some() || !front.reads(&self.crew)) {
            return self.part(&Ended::Closed(Closed::Gone));
        }
        self.proceed()
    }

    /// Takes messages and sends replies, as far as they go now.
    fn proceed(&mut self) -> anyhow::Result<()> {
        for _ in 0..MESSAGES_PER_TURN {
            let Some(front) = &mut self.front else { return Ok(()) };
            match front.step(&mut self.crew, self.stopping.is_some()) {
                Ok(front::Step::Idle) => break,
                Ok(front::Step::Message) => {}
                Ok(front::Step::Refused(reason)) => {
                    self.metrics.refused_messages.inc();
                    if let Some(left_out) = self.lines.allow(Instant::now()) {
                        tracing::warn!(%reason, left_out, "message of the front-end refused");
                    }
                }
                Err(ended) => return self.part(&ended),
            }
        }
        // The turn may have ended with a message: while its reply is held, no more of them would be looked for.
        if let Some(front) = &mut self.front
            && let Err(ended) = front.send(&self.crew)
        {
            return self.part(&ended);
        }
        self.watch()
    }

    /// Watches the front-end for what can be done next; its end is always seen.
    fn watch(&mut self) -> anyhow::Result<()> {
        let Some(front) = &mut self.front else { return Ok(()) };
        let reads = front.reads(&self.crew) && self.stopping.is_none();
        self.waiting_since = match (reads, self.waits) {
            (false, false) => Some(Instant::now()),
            (false, true) => self.waiting_since,
            (true, _) => None,
        };
        self.waits = !reads;
        if let Some(flags) = front.watch(reads) {
            self.poller.modify(front.socket(), FRONT, flags).context("watch the front-end")?;
        }
        Ok(())
    }

    /// The front-end is gone, or broke the protocol. What it started ends before the next one is served.
    fn part(&mut self, ended: &Ended) -> anyhow::Result<()> {
        match ended {
            Ended::Closed(Closed::Gone) => tracing::debug!("front-end gone"),
            Ended::Closed(Closed::Io(error)) => tracing::debug!(%error, "front-end gone"),
            _ => {
                self.metrics.protocol_errors.inc();
                if let Some(left_out) = self.lines.allow(Instant::now()) {
                    tracing::warn!(reason = %ended, left_out, "connection of the front-end closed, it may connect again");
                }
            }
        }
        self.front = None;
        (self.waits, self.waiting_since) = (false, None);
        self.metrics.connections.set(0);
        self.crew.abandon();
        self.watch_listener()
    }
}

#[cfg(test)]
mod tests;
