//! Tests of the cache: whom it would ask.

use super::*;

const SET: CopysetId = CopysetId::new(5);

fn id(number: u32) -> ChunkserverId {
    ChunkserverId::new(number)
}

fn update(members: &[u32], leader: Option<u32>) -> RouteUpdate {
    let address = |&n: &u32| (id(n), SocketAddr::from(([127, 0, 0, 1], n as u16)));
    let route = (members.iter().copied().map(id).collect(), leader.map(id));
    RouteUpdate { addresses: members.iter().map(address).collect(), copysets: [(SET, route)].into() }
}

fn target(table: &Table, asked: &[u32]) -> Option<u32> {
    let asked: Vec<_> = asked.iter().copied().map(id).collect();
    table.target(SET, &asked).map(|(id, _)| id.get())
}

#[test]
fn the_leader_is_asked_then_the_others_then_nobody() {
    let mut table = Table::default();
    assert_eq!(target(&table, &[]), None);
    table.apply(update(&[1, 2, 3], Some(2)));
    assert_eq!(target(&table, &[]), Some(2));
    assert_eq!(target(&table, &[2]), Some(1));
    assert_eq!(target(&table, &[2, 1]), Some(3));
    assert_eq!(target(&table, &[2, 1, 3]), None);
}

#[test]
fn one_that_did_not_lead_is_asked_last_until_it_is_named_again() {
    let mut table = Table::default();
    table.apply(update(&[1, 2, 3], Some(1)));
    table.doubt(SET, id(1));
    assert_eq!(target(&table, &[]), Some(2));
    assert_eq!(target(&table, &[2, 3]), Some(1));
    // The metadata server's older knowledge does not win over what was seen.
    table.apply(update(&[1, 2, 3], Some(1)));
    assert_eq!(target(&table, &[]), Some(2));
    table.believe(SET, id(3));
    // Late news about 1 does not unseat 3.
    table.doubt(SET, id(1));
    assert_eq!(target(&table, &[]), Some(3));
    table.doubt(SET, id(3));
    table.believe(SET, id(1));
    assert_eq!(target(&table, &[]), Some(1));
}

#[test]
fn a_member_that_left_is_not_asked() {
    let mut table = Table::default();
    table.apply(update(&[1, 2, 3], Some(1)));
    table.apply(update(&[2, 3, 4], Some(4)));
    assert_eq!(target(&table, &[]), Some(4));
    assert_eq!(target(&table, &[2, 3, 4]), None);
}

#[test]
fn who_leads_is_told_on_and_believed() {
    let (known, fresh) = (Routes::default(), Routes::default());
    known.write().apply(update(&[1, 2, 3], None));
    assert_eq!(known.leaders(10), []);
    known.believe(SET, id(3));
    assert_eq!(known.leaders(10), [(SET, id(3))]);
    assert_eq!(known.leaders(0), []);
    fresh.believe(SET, id(3));
    assert_eq!(fresh.unknown([SET].into()), [SET], "its members are to be asked for all the same");
    fresh.write().apply(update(&[1, 2, 3], Some(1)));
    assert_eq!(target(&fresh.read(), &[]), Some(3), "what was seen wins over what was reported");
}
