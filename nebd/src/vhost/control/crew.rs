//! The workers as control sees them: who serves which queue, and what is not obeyed yet.
//!
//! Owned by `control`. Must not know: messages, sockets. `no_late_duplicate`: it is known at every time whether a worker still has
//! requests of an abandoned connection.

use crate::vhost::order::{Done, Mailbox, Order};
use spline_link::{Hello, Identity, Mode};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// One worker.
#[derive(Debug)]
struct Member {
    orders: Arc<Mailbox<Order>>,
    /// It opens the volume.
    joined: bool,
    /// It has heard that the volume is lost, and was not told to open it again.
    lost: bool,
    /// It had heard so before the volume was opened again for the last time.
    told_lost: bool,
    /// It was given queues that were not abandoned since.
    busy: bool,
    /// It is waited for to have nothing left of what was abandoned.
    abandoning: bool,
    /// Other orders that it has not obeyed.
    others: usize,
    /// Queues that it is to stop.
    stops: BTreeSet<u16>,
}

/// All workers of an export.
#[derive(Debug)]
pub struct Crew {
    members: Vec<Member>,
    /// What the first one opened the volume with; names the volume by its identity once that is known.
    hello: Hello,
}

impl Crew {
    /// Queue `i` is worker `i % workers`'s. The first one has been told to open the volume with `hello`.
    pub fn new(workers: Vec<Arc<Mailbox<Order>>>, hello: Hello) -> Self {
        let members = workers.into_iter().enumerate().map(|(number, orders)| Member {
            orders,
            joined: number == 0,
            lost: false,
            told_lost: false,
            busy: false,
            abandoning: false,
            others: 0,
            stops: BTreeSet::new(),
        });
        Self { members: members.collect(), hello: Hello { mode: Mode::Open, force: false, ..hello } }
    }

    /// A gateway serves the volume, which is this one. All workers open it now: when the guest comes to use their queues, the
    /// metadata server may be away.
    pub fn accepted(&mut self, identity: Identity) {
        self.hello.identity = Some(identity);
        for member in self.members.iter_mut().filter(|member| !member.joined) {
            member.joined = true;
            let hello = Hello { instance: crate::random_instance(), ..self.hello.clone() };
            member.tell(Order::Join(Box::new(hello)));
        }
    }

    /// Gives orders to whom they concern.
    pub fn order(&mut self, orders: Vec<Order>) {
        let workers = self.members.len();
        for order in orders {
            match order {
                Order::Start(start) => self.start(usize::from(start.queue) % workers, Order::Start(start)),
                Order::Stop { queue } => {
                    let member = &mut self.members[usize::from(queue) % workers];
                    member.stops.insert(queue);
                    member.orders.put(order);
                }
                Order::Bell { queue, .. } | Order::Enable { queue, .. } => {
                    self.members[usize::from(queue) % workers].tell(order);
                }
                Order::Memory { memory, rings } => {
                    let mut shares = BTreeMap::<usize, Vec<_>>::new();
                    for (queue, rings) in rings {
                        shares.entry(usize::from(queue) % workers).or_default().push((queue, rings));
                    }
                    for (worker, rings) in shares {
                        self.members[worker].tell(Order::Memory { memory: Arc::clone(&memory), rings });
                    }
                }
                Order::Abandon => self.abandon(),
                everyone @ (Order::Join(_) | Order::Reopen | Order::End) => {
                    debug_assert!(false, "not an order of a device: {everyone:?}");
                }
            }
        }
    }

    fn start(&mut self, worker: usize, order: Order) {
        let member = &mut self.members[worker];
        member.busy = true;
        member.orders.put(order);
    }

    /// Ends everything at once; what workers were to stop is ended by that.
    pub fn abandon(&mut self) {
        for member in self.members.iter_mut().filter(|member| member.busy) {
            member.stops.clear();
            member.busy = false;
            member.abandoning = true;
            member.orders.put(Order::Abandon);
        }
    }

    /// The volume was lost, and a front-end that came since wants it again.
    pub fn reopen(&mut self) {
        for member in self.members.iter_mut().filter(|member| member.joined) {
            member.told_lost = std::mem::replace(&mut member.lost, false);
            member.tell(Order::Reopen);
        }
    }

    /// A worker has heard that the volume is lost. If it hears what others had heard before the front-end came, it opens the
    /// volume again as they did: once, or two hosts would take it from each other for ever.
    pub fn lost(&mut self, worker: usize) {
        let reopened = self.members.iter().any(|member| member.told_lost);
        let Some(member) = self.members.get_mut(worker) else { return };
        if reopened && !std::mem::replace(&mut member.told_lost, true) {
            member.tell(Order::Reopen);
        } else {
            member.lost = true;
        }
    }

    /// A worker has done something.
    pub fn obeyed(&mut self, worker: usize, done: Done) {
        let Some(member) = self.members.get_mut(worker) else { return };
        match done {
            Done::Started { .. } => {}
            Done::Stopped { queue, .. } => {
                member.stops.remove(&queue);
            }
            Done::Abandoned => member.abandoning = false,
            Done::Other => member.others = member.others.saturating_sub(1),
        }
    }

    /// Whether nothing is left of what was abandoned.
    pub fn has_abandoned(&self) -> bool {
        !self.members.iter().any(|member| member.abandoning)
    }

    /// Whether everything is obeyed but what may take as long as the gateway is away: nothing is waited for before the next
    /// message.
    pub fn has_obeyed(&self) -> bool {
        self.members.iter().all(|member| member.others == 0 && member.stops.is_empty())
    }

    /// Whether nothing at all is waited for.
    pub fn is_quiet(&self) -> bool {
        self.has_obeyed() && self.has_abandoned()
    }
}

impl Member {
    fn tell(&mut self, order: Order) {
        self.others += 1;
        self.orders.put(order);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vhost::order::Bell;
    use spline_link::{InstanceId, VersionRange};

    fn crew(workers: usize) -> (Crew, Vec<Arc<Mailbox<Order>>>) {
        let boxes: Vec<_> = (0..workers).map(|_| Arc::new(Mailbox::new().expect("eventfd"))).collect();
        let hello = Hello {
            versions: VersionRange::OURS,
            features: 0,
            mode: Mode::Open,
            read_only: false,
            force: true,
            instance: InstanceId(1),
            identity: None,
            volume: "disk0".parse().expect("a name"),
        };
        (Crew::new(boxes.clone(), hello), boxes)
    }

    #[test]
    fn orders_go_to_the_queues_worker_and_are_waited_for() {
        let (mut crew, boxes) = crew(2);
        crew.order(vec![
            Order::Bell { queue: 3, bell: Bell::Call, fd: None },
            Order::Stop { queue: 0 },
            Order::Enable { queue: 4, enabled: true },
        ]);
        assert_eq!((boxes[0].take().len(), boxes[1].take().len()), (2, 1));
        crew.obeyed(1, Done::Other);
        crew.obeyed(0, Done::Other);
        assert!(!crew.has_obeyed());
        crew.obeyed(0, Done::Stopped { queue: 0, next_available: 7 });
        assert!(crew.is_quiet());
    }

    #[test]
    fn abandoning_ends_what_was_to_be_stopped() {
        let (mut crew, boxes) = crew(1);
        crew.members[0].busy = true;
        crew.order(vec![Order::Stop { queue: 0 }]);
        crew.abandon();
        crew.abandon();
        assert_eq!(boxes[0].take().len(), 2, "abandoned once");
        assert!(crew.has_obeyed() && !crew.has_abandoned());
        crew.obeyed(0, Done::Stopped { queue: 0, next_available: 7 });
        crew.obeyed(0, Done::Abandoned);
        assert!(crew.is_quiet());
    }
}
