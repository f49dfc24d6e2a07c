//! A worker's end of its link to the gateway.
//!
//! Part of the worker: takes answers, sends requests, and decides what a lost link means for what is open. Must not know: rings.

use super::{BELL, Carrier, LINK, Worker};
use crate::inflight::Entry;
use crate::link::{LinkDown, Next};
use crate::vhost::order::Report;
use crate::vhost::ringed::RingStream;
use crate::vhost::stream::{Asked, Event, Stream};
use anyhow::Context;
use rustix::event::epoll::EventFlags;
use spline_link::Accepted;
use spline_types::Fault;
use std::sync::atomic::Ordering;
use std::time::Instant;

/// What came in one go.
#[derive(Default)]
struct Heard {
    ended: Vec<(Entry<Asked>, Result<(), Fault>)>,
    resized: Option<u64>,
    renewed: bool,
}

impl Heard {
    fn note(&mut self, event: Event) {
        match event {
            Event::Ended(entry, result) => self.ended.push((entry, result)),
            Event::Resized(size) => self.resized = Some(size),
            Event::Renewed => self.renewed = true,
        }
    }
}

impl Worker {
    pub(super) fn link_ready(&mut self) -> anyhow::Result<()> {
        let Some(link) = &mut self.link else { return Ok(()) };
        if link.is_greeting() {
            match link.greet(self.now) {
                Ok(None) => return Ok(()),
                Ok(Some(accepted)) => self.welcomed(accepted)?,
                Err(why) => return self.link_failed(&why),
            }
        }
        let mut heard = Heard { ended: std::mem::take(&mut self.answers), ..Heard::default() };
        let Self { link: Some(link), carrier, table, scratch, .. } = self else { return Ok(()) };
        let received = match carrier {
            Carrier::None => Ok(()),
            Carrier::Socket(stream) => {
                stream.receive(link, table, scratch, self.now, |event| heard.note(event))
            }
            Carrier::Ring(ring) => {
                ring.receive_frames(link, table, scratch, self.now, |event| heard.note(event))
            }
        };
        self.act_upon(heard);
        received.or_else(|why| self.link_failed(&why))
    }

    fn welcomed(&mut self, accepted: Accepted) -> anyhow::Result<()> {
        let Some(link) = &mut self.link else { return Ok(()) };
        self.setup.export.update(&accepted, link.is_read_only());
        self.setup.size.fetch_max(accepted.geometry.size, Ordering::AcqRel);
        self.known = true;
        self.setup.metrics.link_up.set(1);
        self.setup.metrics.link_connects.inc();
        let left_over = link.left_over();
        self.carrier = match link.take_ring() {
            Some(ring) => Carrier::Ring(
                RingStream::new(ring, left_over, &self.poller, BELL).context("watch the bell of a link")?,
            ),
            None => Carrier::Socket(Stream::new(left_over)),
        };
        self.watching_out = false;
        self.setup.reports.put(Report::Accepted(Box::new(accepted)));
        Ok(())
    }

    /// Takes completions out of the ring, if the link has one.
    pub(super) fn take_answers(&mut self) -> anyhow::Result<()> {
        let Self { carrier: Carrier::Ring(ring), table, .. } = self else { return Ok(()) };
        ring.link().ring.wake();
        let mut heard = Heard { ended: std::mem::take(&mut self.answers), ..Heard::default() };
        let received = ring.receive(table, |event| heard.note(event));
        self.act_upon(heard);
        received.or_else(|why| self.link_failed(&why))
    }

    fn act_upon(&mut self, mut heard: Heard) {
        if !heard.ended.is_empty() {
            self.now = Instant::now();
        }
        if let Some(size) = heard.resized {
            self.setup.size.fetch_max(size, Ordering::AcqRel);
            self.setup.reports.put(Report::Resized { size });
        }
        for (entry, result) in heard.ended.drain(..) {
            self.answer(entry, result);
        }
        self.answers = heard.ended;
        if heard.renewed {
            let replays = self.table.renew();
            self.setup.metrics.replays.inc_by(replays as u64);
            self.drop_abandoned();
        }
    }

    pub(super) fn link_failed(&mut self, why: &LinkDown) -> anyhow::Result<()> {
        let Some(link) = &mut self.link else { return Ok(()) };
        if link.is_up() {
            if let Carrier::Ring(mut ring) = std::mem::replace(&mut self.carrier, Carrier::None) {
                ring.link().close(&self.poller);
            }
            self.setup.metrics.link_up.set(0);
            self.setup.metrics.replays.inc_by(self.table.link_lost() as u64);
        }
        match link.fail(why, self.table.len(), self.now) {
            Next::Retry => self.drop_abandoned(),
            Next::GiveUp(reason) => anyhow::bail!(reason),
            Next::Fenced => {
                (self.lost, self.was_lost) = (true, true);
                self.setup.reports.put(Report::Lost { worker: self.setup.number });
                for entry in self.table.drain() {
                    self.answer(entry, Err(Fault::Fenced));
                }
            }
        }
        Ok(())
    }

    /// What an abandoned connection had sent over a link that is gone must not be sent again: its memory may hold anything
    /// by now. That it has ended is proven by a probe.
    pub(super) fn drop_abandoned(&mut self) {
        let is_abandoned =
            |entry: &Entry<Asked>| matches!(&entry.context, Asked::Guest(guest) if guest.abandoned);
        let unsent = self.table.unsent();
        let abandoned: Vec<_> = unsent.filter(|id| self.table.get(*id).is_some_and(is_abandoned)).collect();
        if !abandoned.is_empty() {
            abandoned.into_iter().for_each(|id| drop(self.table.forget(id)));
            self.probe();
        }
    }

    pub(super) fn flush(&mut self) -> anyhow::Result<()> {
        let Some(link) = &self.link else { return Ok(()) };
        let flushed = match &mut self.carrier {
            Carrier::None => Ok(()),
            Carrier::Socket(stream) => stream.flush(link, &mut self.table),
            Carrier::Ring(ring) => ring.flush(link, &mut self.table),
        };
        if let Err(why) = flushed {
            return self.link_failed(&why);
        }
        let full = self.carrier.is_full();
        if full != self.watching_out
            && let Some(socket) = link.socket()
        {
            let flags = if full { EventFlags::IN | EventFlags::OUT } else { EventFlags::IN };
            self.poller.modify(socket, LINK, flags)?;
            self.watching_out = full;
        }
        Ok(())
    }
}
