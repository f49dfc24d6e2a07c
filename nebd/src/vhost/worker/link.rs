//! A worker's end of its link to the gateway.
//!
//! Part of the worker: takes answers, sends requests, and decides what a lost link means for what is open. Must not know: rings.

use super::{LINK, Worker};
use crate::inflight::Entry;
use crate::link::{LinkDown, Next};
use crate::vhost::order::Report;
use crate::vhost::stream::{Asked, Event, Stream};
use rustix::event::epoll::EventFlags;
use spline_types::Fault;
use std::sync::atomic::Ordering;

impl Worker {
    pub(super) fn link_ready(&mut self) -> anyhow::Result<()> {
        let Some(link) = &mut self.link else { return Ok(()) };
        if link.is_greeting() {
            match link.greet(self.now) {
                Ok(None) => return Ok(()),
                Ok(Some(accepted)) => {
                    self.setup.export.update(&accepted, link.is_read_only());
                    self.setup.size.fetch_max(accepted.geometry.size, Ordering::AcqRel);
                    self.known = true;
                    self.setup.metrics.link_up.set(1);
                    self.setup.metrics.link_connects.inc();
                    self.stream = Stream::new(link.left_over());
                    self.watching_out = false;
                    self.setup.reports.put(Report::Accepted(Box::new(accepted)));
                }
                Err(why) => return self.link_failed(&why),
            }
        }
        let (mut ended, mut resized) = (std::mem::take(&mut self.answers), None);
        let Self { link: Some(link), stream, table, scratch, .. } = self else { return Ok(()) };
        let received = stream.receive(link, table, scratch, self.now, |event| match event {
            Event::Ended(entry, result) => ended.push((entry, result)),
            Event::Resized(size) => resized = Some(size),
        });
        if let Some(size) = resized {
            self.setup.size.fetch_max(size, Ordering::AcqRel);
            self.setup.reports.put(Report::Resized { size });
        }
        for (entry, result) in ended.drain(..) {
            self.answer(entry, result);
        }
        self.answers = ended;
        received.or_else(|why| self.link_failed(&why))
    }

    pub(super) fn link_failed(&mut self, why: &LinkDown) -> anyhow::Result<()> {
        let Some(link) = &mut self.link else { return Ok(()) };
        if link.is_up() {
            self.stream = Stream::default();
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
        if let Err(why) = self.stream.flush(link, &mut self.table) {
            return self.link_failed(&why);
        }
        if self.stream.full != self.watching_out
            && let Some(socket) = link.socket()
        {
            let flags = if self.stream.full { EventFlags::IN | EventFlags::OUT } else { EventFlags::IN };
            self.poller.modify(socket, LINK, flags)?;
            self.watching_out = self.stream.full;
        }
        Ok(())
    }
}
