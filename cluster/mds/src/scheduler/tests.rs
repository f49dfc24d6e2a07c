//! Tables: a view in, operators out.

use super::*;
use crate::state::record::Replacing;
use crate::topology::ServerState;

const LIMITS: Limits = Limits { operators_max: 4, rebuild_after: Duration::from_secs(600) };

fn server(zone: &str, state: ServerState, silent_s: u64) -> ServerView {
    let up_for = if state == ServerState::Up { Duration::from_secs(60) } else { Duration::ZERO };
    ServerView { zone: zone.into(), state, silent_for: Duration::from_secs(silent_s), up_for, full: false }
}

fn id(raw: u32) -> ChunkserverId {
    ChunkserverId::new(raw)
}

fn copyset(raw: u32, members: &[u32], leader: Option<u32>) -> CopysetView {
    let members = members.iter().copied().map(ChunkserverId::new).collect();
    CopysetView { id: CopysetId::new(raw), members, leader: leader.map(ChunkserverId::new), replacing: None }
}

/// Chunkservers 1 to 4 in zones a, b, c, c; `copysets` on 1, 2, 3, led by 1, 2, 3 in turn.
fn view(copysets: u32) -> View {
    let zones = ["a", "b", "c", "c"];
    View {
        servers: (1..).map(id).zip(zones.map(|zone| server(zone, ServerState::Up, 0))).collect(),
        copysets: (1..=copysets).map(|n| copyset(n, &[1, 2, 3], Some(n % 3 + 1))).collect(),
        transfers: Default::default(),
    }
}

fn replace(copyset: u32, add: u32, remove: u32) -> Operator {
    Operator::Replace { copyset: CopysetId::new(copyset), add: id(add), remove: id(remove) }
}

#[test]
fn a_healthy_cluster_is_left_alone() {
    assert_eq!(plan(&view(30), LIMITS), []);
}

#[test]
fn replicas_of_a_gone_chunkserver_are_replaced_at_once_and_only_so_many() {
    let mut view = view(30);
    view.servers.insert(id(3), server("c", ServerState::Gone, 1));
    view.copysets.iter_mut().for_each(|copyset| copyset.leader = Some(id(1)));
    let expected: Vec<_> = (1..=4).map(|n| replace(n, 4, 3)).collect();
    assert_eq!(plan(&view, LIMITS), expected);
    for copyset in &mut view.copysets[..3] {
        copyset.replacing = Some(Replacing { add: id(4), remove: id(3) });
    }
    assert_eq!(plan(&view, LIMITS), [replace(4, 4, 3)]);
}

#[test]
fn a_down_chunkserver_is_given_time() {
    let mut view = view(1);
    for (silent_s, expected) in [(599, vec![]), (600, vec![replace(1, 4, 3)])] {
        view.servers.insert(id(3), server("c", ServerState::Down, silent_s));
        assert_eq!(plan(&view, LIMITS), expected, "silent for {silent_s} s");
    }
}

#[test]
fn a_newcomer_must_be_up_have_room_and_lie_in_a_fitting_zone() {
    let mut view = view(1);
    view.servers.insert(id(2), server("b", ServerState::Gone, 0));
    view.copysets[0].leader = Some(id(1));
    assert_eq!(plan(&view, LIMITS), [], "the only spare one shares zone c with a member that stays");
    view.servers.insert(id(5), server("b", ServerState::Down, 1));
    assert_eq!(plan(&view, LIMITS), []);
    view.servers.insert(id(5), ServerView { full: true, ..server("b", ServerState::Up, 0) });
    assert_eq!(plan(&view, LIMITS), []);
    view.servers.insert(id(5), server("b", ServerState::Up, 0));
    assert_eq!(plan(&view, LIMITS), [replace(1, 5, 2)]);
}

#[test]
fn newcomers_share_the_work() {
    let mut view = view(4);
    view.servers.insert(id(3), server("c", ServerState::Gone, 0));
    view.servers.insert(id(5), server("d", ServerState::Up, 0));
    view.copysets.iter_mut().for_each(|copyset| copyset.leader = Some(id(1)));
    assert_eq!(plan(&view, LIMITS), [replace(1, 4, 3), replace(2, 5, 3), replace(3, 4, 3), replace(4, 5, 3)]);
}

#[test]
fn a_copyset_without_a_leader_waits() {
    let mut view = view(1);
    view.servers.insert(id(3), server("c", ServerState::Gone, 0));
    view.copysets[0].leader = None;
    assert_eq!(plan(&view, LIMITS), []);
}

#[test]
fn a_replacement_is_given_up_when_its_newcomer_is_lost_before_it_joined() {
    let mut view = view(1);
    view.copysets[0].replacing = Some(Replacing { add: id(4), remove: id(3) });
    view.servers.insert(id(4), server("c", ServerState::Gone, 0));
    assert_eq!(plan(&view, LIMITS), [Operator::Abort { copyset: CopysetId::new(1), add: id(4) }]);
    view.copysets[0].members.push(id(4));
    assert_eq!(plan(&view, LIMITS), [], "once a voter, only the group itself can remove it");
}

#[test]
fn leadership_moves_only_when_far_from_fair_and_gently() {
    let mut view = view(30);
    // 10 each is fair, 14 is tolerated.
    for lead in view.copysets.iter_mut().filter(|copyset| copyset.leader == Some(id(2))).take(4) {
        lead.leader = Some(id(1));
    }
    assert_eq!(plan(&view, LIMITS), []);
    view.copysets.iter_mut().for_each(|copyset| copyset.leader = Some(id(1)));
    let planned = plan(&view, Limits { operators_max: 100, ..LIMITS });
    let to = |n: u32, to: u32| Operator::Transfer { copyset: CopysetId::new(n), to: id(to) };
    assert_eq!(planned, [to(1, 2), to(2, 3), to(3, 2), to(4, 3)]);
    view.transfers = (1..=3).map(|n| (CopysetId::new(n), id(2))).collect();
    assert_eq!(plan(&view, Limits { operators_max: 100, ..LIMITS }), [to(4, 3)]);
}

#[test]
fn a_chunkserver_that_just_came_back_is_not_handed_leadership() {
    let mut view = view(30);
    view.copysets.iter_mut().for_each(|copyset| copyset.leader = Some(id(1)));
    for raw in [2, 3] {
        let fresh = ServerView { up_for: Duration::from_secs(9), ..server("b", ServerState::Up, 0) };
        view.servers.insert(id(raw), fresh);
    }
    assert_eq!(plan(&view, LIMITS), []);
}

#[test]
fn a_full_chunkserver_is_not_handed_leadership() {
    let mut view = view(30);
    view.copysets.iter_mut().for_each(|copyset| copyset.leader = Some(id(1)));
    for raw in [2, 3] {
        view.servers.insert(id(raw), ServerView { full: true, ..server("b", ServerState::Up, 0) });
    }
    assert_eq!(plan(&view, LIMITS), []);
}
