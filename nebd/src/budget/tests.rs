//! The budget against a model of clients that ask, take, pause and go.

use super::*;
use proptest::prelude::*;
use std::collections::VecDeque;

const MIB: u64 = 1 << 20;
const A: ConnectionId = ConnectionId(1);
const B: ConnectionId = ConnectionId(2);
const C: ConnectionId = ConnectionId(3);

#[test]
fn a_large_request_is_not_overtaken_and_shares_are_everybodys_own() {
    let mut budget = Budget::default();
    assert_eq!(budget.room(A, 0), COMMON_BYTES + SHARE_BYTES);
    budget.took(0, 40 * MIB);
    assert_eq!(budget.room(B, 0), 26 * MIB + SHARE_BYTES);
    budget.wait(B);
    budget.wait(C);
    budget.wait(B);
    assert_eq!(budget.room(C, 0), SHARE_BYTES, "B comes first");
    assert_eq!(budget.room(C, SHARE_BYTES - 7), 7);
    assert_eq!(budget.room(B, 0), 26 * MIB + SHARE_BYTES);
    // Many small ones do not keep it from what A lets go of.
    assert!(budget.settle([10 * MIB].into_iter().chain([SHARE_BYTES; 40])));
    assert!(!budget.settle([10 * MIB].into_iter().chain([SHARE_BYTES; 40])), "told once");
    assert_eq!(budget.room(B, 0), 56 * MIB + SHARE_BYTES);
    budget.leave(B);
    assert!(budget.settle([10 * MIB].into_iter()), "now it is C's turn");
    assert_eq!(budget.room(C, 0), 56 * MIB + SHARE_BYTES);
    budget.leave(C);
    assert!(!budget.is_short() && !budget.settle([0].into_iter()));
}

#[test]
fn what_the_gone_leave_behind_counts_until_it_is_answered() {
    let mut budget = Budget::default();
    budget.took(0, CLIENT_BYTES);
    budget.took(0, CLIENT_BYTES);
    assert_eq!(budget.room(C, 0), SHARE_BYTES);
    assert!(!budget.settle([CLIENT_BYTES; 2].into_iter()));
    budget.abandon(A, CLIENT_BYTES);
    assert_eq!(budget.room(C, 0), 0, "its share is taken as well");
    budget.wait(C);
    budget.settle([CLIENT_BYTES].into_iter());
    assert_eq!(budget.room(C, 0), 0, "whoever is connected holds the rest");
    budget.buried(SHARE_BYTES);
    assert!(budget.settle([CLIENT_BYTES].into_iter()));
    assert_eq!(budget.room(C, 0), SHARE_BYTES);
}

#[test]
fn places_in_the_table_are_given_in_order() {
    let mut budget = Budget::default();
    assert!(budget.may_enter(A));
    budget.park(A);
    budget.park(B);
    budget.park(A);
    assert!(budget.may_enter(A) && !budget.may_enter(B) && !budget.may_enter(C));
    assert_eq!(budget.queue().collect::<Vec<_>>(), [A, B]);
    budget.unpark(A);
    assert!(budget.settle(std::iter::empty()) && budget.may_enter(B));
    budget.abandon(B, 0);
    assert!(budget.may_enter(C) && !budget.settle(std::iter::empty()));
}

/// A client: what is open is answered by the gateway, what is unread goes when the client takes it.
#[derive(Clone, Debug, Default)]
struct Client {
    id: u64,
    open: Vec<u64>,
    unread: u64,
    wants: Option<u64>,
}

impl Client {
    fn held(&self) -> u64 {
        self.open.iter().sum::<u64>() + self.unread
    }
}

#[derive(Debug, Default)]
struct Model {
    budget: Budget,
    clients: Vec<Client>,
    /// Requests of clients that are gone.
    orphans: Vec<u64>,
    /// Who waits for common memory, by the model's own book.
    order: VecDeque<u64>,
    last_id: u64,
}

impl Model {
    fn new(clients: usize) -> Self {
        let mut model = Self::default();
        (0..clients).for_each(|_| model.connect());
        model
    }

    fn connect(&mut self) {
        self.last_id += 1;
        self.clients.push(Client { id: self.last_id, ..Client::default() });
    }

    fn total(&self) -> u64 {
        self.clients.iter().map(Client::held).sum::<u64>() + self.orphans.iter().sum::<u64>()
    }

    /// As a connection asks: within its own limit and the budget.
    fn ask(&mut self, at: usize) {
        let client = &mut self.clients[at];
        let Some(bytes) = client.wants else { return };
        let (id, held) = (ConnectionId(client.id), client.held());
        let (own, common) = (CLIENT_BYTES.saturating_sub(held), self.budget.room(id, held));
        if bytes > own.min(common) {
            if bytes <= own {
                assert!(
                    held + bytes > SHARE_BYTES || !self.orphans.is_empty(),
                    "a share is its client's own: held={held} bytes={bytes}"
                );
            }
            if common < own {
                self.budget.wait(id);
                if !self.order.contains(&client.id) {
                    self.order.push_back(client.id);
                }
            } else {
                self.budget.leave(id);
                self.order.retain(|other| *other != client.id);
            }
            return;
        }
        if held + bytes > SHARE_BYTES {
            assert!(
                self.order.front().is_none_or(|first| *first == client.id),
                "overtaken: {:?}",
                self.order
            );
        }
        self.order.retain(|other| *other != client.id);
        self.budget.leave(id);
        client.open.push(bytes);
        client.wants = None;
        self.budget.took(held, client.held());
    }

    /// As the event loop settles.
    fn settle(&mut self) {
        while self.budget.settle(self.clients.iter().map(Client::held)) {
            let queue: Vec<ConnectionId> = self.budget.queue().collect();
            for id in queue {
                let at =
                    self.clients.iter().position(|client| client.id == id.0).expect("the gone do not wait");
                self.ask(at);
            }
        }
    }

    fn go(&mut self, at: usize) {
        let gone = self.clients.remove(at);
        self.order.retain(|other| *other != gone.id);
        self.budget.abandon(ConnectionId(gone.id), gone.open.iter().sum());
        self.orphans.extend(gone.open);
        self.connect();
    }
}

#[derive(Clone, Debug)]
enum Step {
    /// A client wants so much, unless it waits already.
    Want(usize, u64),
    /// The gateway answers a client's oldest request.
    Answer(usize),
    /// A client takes what it has not read.
    Take(usize),
    Go(usize),
    /// The gateway answers the oldest request of those that are gone.
    Bury,
}

fn step() -> impl Strategy<Value = Step> {
    let bytes = prop_oneof![
        3 => 1..=SHARE_BYTES,
        2 => 1..=u64::from(REQUEST_BYTES_MAX),
        1 => Just(u64::from(REQUEST_BYTES_MAX)),
    ];
    prop_oneof![
        6 => (0usize..8, bytes).prop_map(|(at, bytes)| Step::Want(at, bytes)),
        3 => (0usize..8).prop_map(Step::Answer),
        2 => (0usize..8).prop_map(Step::Take),
        1 => (0usize..8).prop_map(Step::Go),
        1 => Just(Step::Bury),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn memory_is_bounded_fair_and_free_of_deadlocks(
        count in 1usize..8, steps in proptest::collection::vec(step(), 0..200),
    ) {
        let mut model = Model::new(count);
        for step in steps {
            match step {
                Step::Want(at, bytes) => {
                    let client = &mut model.clients[at % count];
                    client.wants = client.wants.or(Some(bytes));
                    model.ask(at % count);
                }
                Step::Answer(at) => {
                    let client = &mut model.clients[at % count];
                    if !client.open.is_empty() {
                        client.unread += client.open.remove(0);
                    }
                }
                Step::Take(at) => model.clients[at % count].unread = 0,
                Step::Go(at) => model.go(at % count),
                Step::Bury if !model.orphans.is_empty() => model.budget.buried(model.orphans.remove(0)),
                Step::Bury => {}
            }
            model.settle();
            // A client that its own limit held up asks again by itself.
            (0..count).for_each(|at| model.ask(at));
            model.settle();
            let most = COMMON_BYTES + count as u64 * SHARE_BYTES;
            prop_assert!(model.total() <= most, "total={} most={}", model.total(), most);
        }
        // Whatever came before: once the gateway answers and the clients take, everybody gets what he wants.
        for _ in 0..=count {
            for client in &mut model.clients {
                client.open.clear();
                client.unread = 0;
            }
            while let Some(bytes) = model.orphans.pop() {
                model.budget.buried(bytes);
            }
            model.settle();
            (0..count).for_each(|at| model.ask(at));
        }
        prop_assert!(model.clients.iter().all(|client| client.wants.is_none()), "{model:?}");
    }
}
