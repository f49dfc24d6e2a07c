//! Golden bytes of every encoding, round trips, and refusal of what is not known.

use bytes::Bytes;
use proptest::prelude::*;
use spline_wire::{Frame, Kind};

use super::message::{Beat, Reply, Request};
use super::*;
use crate::command::{GroupId, NodeId};
use crate::types::{AppendRequest, SnapshotMeta, TransferRequest, VoteRequest, VoteResponse};

fn id(term: u64, node: u64, index: u64) -> LogId {
    LogId::new(LeaderId { term, node_id: node }, index)
}

fn vote(term: u64, node: u64) -> Vote {
    Vote { leader_id: LeaderId { term, node_id: node }, committed: true }
}

fn membership() -> Membership {
    let nodes: BTreeMap<u64, EmptyNode> = [1, 2, 3].map(|node| (node, EmptyNode::new())).into();
    Membership::new(vec![[1, 2].into()], nodes).unwrap()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn le(number: u64) -> String {
    hex(&number.to_le_bytes())
}

fn le4(number: u32) -> String {
    hex(&number.to_le_bytes())
}

fn sets() -> String {
    [le4(1), le4(2), le(1), le(2), le4(3), le(1), le(2), le(3)].concat()
}

#[test]
fn golden_records() {
    assert_eq!(hex(&encode_vote(&vote(5, 2))), format!("01{}{}01", le(5), le(2)));
    assert_eq!(hex(&encode_position(&id(5, 2, 9))), format!("01{}{}{}", le(5), le(2), le(9)));
    let stored = StoredMembership::new(Some(id(5, 2, 9)), membership());
    let golden = format!("0101{}{}{}{}", le(5), le(2), le(9), sets());
    assert_eq!(hex(&encode_membership(&stored)), golden);
    let entry = |payload| Entry { log_id: id(5, 2, 9), payload };
    let leader = le(5) + &le(2);
    let (_, blank, _) = encode_entry(entry(EntryPayload::Blank));
    assert_eq!(hex(&blank), format!("0100{leader}"));
    let (_, command, _) = encode_entry(entry(EntryPayload::Normal(Placed::default())));
    assert_eq!(hex(&command), format!("0101{leader}"));
    let bundle = Placed { is_bundle: true, ..Placed::default() };
    let (_, bundle, _) = encode_entry(entry(EntryPayload::Normal(bundle)));
    assert_eq!(hex(&bundle), format!("0203{leader}"));
    let (_, members, _) = encode_entry(entry(EntryPayload::Membership(membership())));
    assert_eq!(hex(&members), format!("0102{leader}{}", sets()));
}

fn append() -> AppendRequest {
    let command = LogCommand { meta: Bytes::from_static(b"me"), payload: Bytes::from_static(b"pay") };
    AppendRequest {
        vote: vote(5, 2),
        prev_log_id: Some(id(4, 1, 8)),
        leader_commit: None,
        entries: vec![Entry { log_id: id(5, 2, 9), payload: EntryPayload::Normal(command.into()) }],
    }
}

#[test]
fn golden_append() {
    let frame = Request::Append(append()).into_frame(GroupId(7), 3);
    assert_eq!((frame.kind, frame.request), (Kind::RaftRequest, 3));
    let head = format!("0201{}{}{}01", le4(7), le(5), le(2));
    let positions = format!("01{}{}{}00", le(4), le(1), le(8));
    let table = [le(9), le4(1), le4(18), le4(2), le4(3)].concat();
    assert_eq!(hex(&frame.meta), head + &positions + &table);
    let payload = format!("0101{}{}{}{}", le(5), le(2), hex(b"me"), hex(b"pay"));
    assert_eq!(hex(&frame.into_payload()), payload);
}

#[test]
fn golden_vote_messages() {
    let request = VoteRequest::new(vote(6, 3), Some(id(5, 2, 9)));
    let candidacy = format!("{}{}{}0101{}{}{}", le4(7), le(6), le(3), le(5), le(2), le(9));
    let frame = Request::PreVote(request.clone()).into_frame(GroupId(7), 1);
    assert_eq!(hex(&frame.meta), format!("0203{candidacy}"));
    let frame = Request::Vote { request: request.clone(), handed_over: None }.into_frame(GroupId(7), 1);
    assert_eq!(hex(&frame.meta), format!("0202{candidacy}00"));
    let handed_over = Some(LeaderId { term: 5, node_id: 2 });
    let frame = Request::Vote { request, handed_over }.into_frame(GroupId(7), 1);
    assert_eq!(hex(&frame.meta), format!("0202{candidacy}01{}{}", le(5), le(2)));
    let response = VoteResponse { vote: vote(6, 3), vote_granted: true, last_log_id: None };
    let reply = Reply::Voted(response).into_frame(1);
    assert_eq!(hex(&reply.meta), format!("0204{}{}010100", le(6), le(3)));
}

#[test]
fn golden_beats() {
    let request = Request::Beats { leader: NodeId(2), beats: vec![beat(7, 5, 0), beat(9, 6, 300)] };
    let frame = request.into_frame(GroupId(0), 1);
    assert_eq!(hex(&frame.meta), format!("0208{}{}", le4(0), le(2)));
    let beats = [le4(7), le(5), le(0), le4(9), le(6), le(300)].concat();
    assert_eq!(hex(&frame.into_payload()), beats);
    let reply = Reply::Heard { refused: vec![GroupId(7)] }.into_frame(1);
    assert_eq!((hex(&reply.meta), hex(&reply.into_payload())), ("020a".to_owned(), le4(7)));
}

fn beat(group: u32, term: u64, committed: u64) -> Beat {
    Beat { group: GroupId(group), term, committed }
}

fn requests() -> Vec<Request> {
    let meta = SnapshotMeta {
        last_log_id: Some(id(5, 2, 9)),
        last_membership: StoredMembership::new(Some(id(1, 1, 0)), membership()),
    };
    let manifest = Bytes::from_static(b"manifest");
    vec![
        Request::Append(append()),
        Request::Vote {
            request: VoteRequest::new(vote(6, 3), None),
            handed_over: Some(vote(5, 2).leader_id),
        },
        Request::PreVote(VoteRequest::new(vote(6, 3), Some(id(5, 2, 9)))),
        Request::Transfer(TransferRequest::new(vote(6, 3), 2, Some(id(5, 2, 9)))),
        Request::SnapshotBegin { vote: vote(6, 3), session: 77, meta, manifest },
        Request::SnapshotItem { session: 77, item: 4, data: Bytes::from_static(b"data") },
        Request::SnapshotFinish { session: 77 },
        Request::Beats { leader: NodeId(2), beats: vec![beat(7, 5, 0), beat(9, 6, 300)] },
    ]
}

#[test]
fn every_message_comes_back_as_it_went() {
    for request in requests() {
        let (group, back) = Request::from_frame(request.clone().into_frame(GroupId(7), 1)).unwrap();
        assert_eq!((group, format!("{back:?}")), (GroupId(7), format!("{request:?}")));
    }
    let response = VoteResponse { vote: vote(6, 3), vote_granted: false, last_log_id: Some(id(5, 2, 9)) };
    let replies = [
        Reply::Appended,
        Reply::Conflict,
        Reply::HigherVote(vote(6, 3)),
        Reply::Voted(response),
        Reply::TransferTaken,
        Reply::Needs(vec![0, 5, 900]),
        Reply::ItemWritten,
        Reply::Installed(vote(6, 3)),
        Reply::Refused("no such group".to_owned()),
        Reply::Heard { refused: vec![GroupId(7), GroupId(9)] },
    ];
    for reply in replies {
        assert_eq!(Reply::from_frame(reply.clone().into_frame(1)).unwrap(), reply);
    }
}

#[test]
fn unknown_versions_are_named() {
    let mut bytes = encode_vote(&vote(5, 2)).to_vec();
    bytes[0] = 9;
    assert_eq!(decode_vote(&bytes), Err(DecodeError::Version { what: "vote", version: 9 }));
    let mut frame = Reply::Appended.into_frame(1);
    frame.meta = Bytes::from_static(&[8, 1]);
    assert_eq!(Reply::from_frame(frame), Err(DecodeError::Version { what: "reply", version: 8 }));
}

#[test]
fn a_gap_between_previous_and_first_entry_is_refused() {
    let mut gap = append();
    gap.prev_log_id = Some(id(4, 1, 6));
    let refused = Request::from_frame(Request::Append(gap).into_frame(GroupId(7), 1));
    assert!(matches!(refused, Err(DecodeError::Value { what: "first index", value: 9 })));
}

#[test]
fn a_membership_of_nobody_survives_a_checkpoint() {
    let empty = StoredMembership::default();
    assert_eq!(decode_membership(&encode_membership(&empty)).unwrap(), empty);
    assert_eq!(decode_membership(&[]).unwrap(), empty);
}

proptest! {
    /// Foreign bytes are refused or read, never a panic; every prefix of a message too.
    #[test]
    fn foreign_bytes_do_not_panic(meta in proptest::collection::vec(any::<u8>(), 0..200), which in 0..8usize, cut in 0..400usize) {
        let foreign = |meta: Bytes, payload| Frame { kind: Kind::RaftRequest, request: 1, meta, payload };
        let _ = Request::from_frame(foreign(meta.clone().into(), vec![Bytes::from_static(b"abc")]));
        let _ = Reply::from_frame(foreign(meta.into(), Vec::new()));
        let mut frame = requests().swap_remove(which).into_frame(GroupId(1), 1);
        frame.meta.truncate(cut);
        let _ = Request::from_frame(frame);
    }
}
