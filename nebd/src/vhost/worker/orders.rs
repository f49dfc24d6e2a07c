//! What control wants of a worker, carried out.
//!
//! Part of the worker: queues begin and end here, and what an abandoned connection leaves is seen off. Must not know: rings,
//! frames.

use super::served::Served;
use super::{Carrier, QUEUES, Worker};
use crate::link::{Link, LinkDown};
use crate::vhost::order::{Done, Order, QueueStart, Report};
use crate::vhost::queue::QueueError;
use crate::vhost::stream::Asked;
use spline_types::{BlockOp, ByteRange};

impl Worker {
    pub(super) fn report(&self, done: Done) {
        self.setup.reports.put(Report::Obeyed { worker: self.setup.number, done });
    }

    pub(super) fn obey_all(&mut self) {
        for order in self.setup.orders.take() {
            self.obey(order);
        }
    }

    pub(super) fn obey(&mut self, order: Order) {
        match order {
            Order::Start(start) => return self.start(*start),
            Order::Stop { queue } => {
                return match self.queues.get_mut(&queue) {
                    Some(served) => served.stopping = true,
                    None => {
                        let next_available = self.not_started.remove(&queue).unwrap_or_default();
                        self.report(Done::Stopped { queue, next_available });
                    }
                };
            }
            Order::Bell { queue, bell, fd } => {
                if let Some(served) = self.queues.get_mut(&queue)
                    && let Err(why) = served.set(bell, fd, &self.poller, QUEUES + u64::from(queue))
                {
                    self.break_down(queue, why);
                }
            }
            Order::Enable { queue, enabled } => {
                if let Some(served) = self.queues.get_mut(&queue) {
                    served.enable(enabled);
                }
            }
            Order::Memory { memory, rings } => {
                for (queue, rings) in rings {
                    if let Some(served) = self.queues.get_mut(&queue) {
                        served.queue.remap(&memory, rings);
                    }
                }
            }
            // Reported when nothing is left of it.
            Order::Abandon => return self.abandon(),
            Order::Join(hello) => {
                let gateway = self.setup.gateway.clone();
                self.link.get_or_insert_with(|| Link::new(gateway, *hello, self.now));
            }
            Order::Reopen => {
                if std::mem::take(&mut self.lost)
                    && let Some(link) = &mut self.link
                {
                    link.reopen(self.now);
                }
            }
            Order::End => {
                self.ended = true;
                return;
            }
        }
        self.report(Done::Other);
    }

    pub(super) fn start(&mut self, start: QueueStart) {
        let (queue, next_available) = (start.queue, start.next_available);
        match Served::new(start, &self.poller, QUEUES + u64::from(queue)) {
            Ok(mut served) => {
                self.setup.metrics.resubmitted.inc_by(served.queue.orphans() as u64);
                if self.was_lost {
                    served.fenced = served.queue.orphans();
                }
                if let Some(old) = self.queues.insert(queue, served) {
                    old.end(&self.poller);
                }
            }
            Err(why) => {
                self.not_started.insert(queue, next_available);
                self.setup.metrics.broken_queues.inc();
                self.setup.reports.put(Report::Broken { queue, why });
            }
        }
        self.report(Done::Started { queue });
    }

    /// The connection is gone. Its memory is not touched any more: what was not sent is forgotten, what was is waited for.
    pub(super) fn abandon(&mut self) {
        for (_, served) in std::mem::take(&mut self.queues) {
            served.end(&self.poller);
        }
        let nothing_open = self.table.is_empty();
        if self.carrier.is_within_a_frame() {
            // Half of a frame can be neither taken back nor finished. It never fails to be tried again.
            let _ = self.link_failed(&LinkDown::Abandoned);
        }
        if let Carrier::Socket(stream) = &mut self.carrier {
            stream.forget_unsent().for_each(|id| drop(self.table.forget(id)));
        }
        let unsent: Vec<_> = self.table.unsent().collect();
        unsent.into_iter().for_each(|id| drop(self.table.forget(id)));
        self.table.contexts_mut(|asked| {
            if let Asked::Guest(guest) = asked {
                guest.abandoned = true;
            }
        });
        self.abandoning = true;
        if !nothing_open {
            self.probe();
        }
    }

    /// Asks for something harmless, whose answer proves that whatever was sent before on another link has ended.
    pub(super) fn probe(&mut self) {
        // One is enough: it is sent again on each link until it is answered.
        let mut is_asked = false;
        self.table.contexts_mut(|asked| is_asked |= matches!(asked, Asked::Probe));
        if !self.lost && !is_asked {
            self.table.admit((BlockOp::Flush, ByteRange::EMPTY, false), Asked::Probe, self.now);
        }
    }

    pub(super) fn break_down(&mut self, queue: u16, why: QueueError) {
        if let Some(served) = self.queues.get_mut(&queue) {
            served.break_down();
            self.setup.metrics.broken_queues.inc();
            self.setup.reports.put(Report::Broken { queue, why });
        }
    }
}
