//! Random commands against the invariants of the state, and the rules that tables tell best.

use super::*;
use crate::command::{LeaderReport, Members};
use crate::refusal::RefusalKind;
use proptest::prelude::*;
use spline_types::limits::{SEGMENT_BYTES, SEGMENT_CHUNKS};
use spline_types::{BlockSize, Epoch, OnUnavailable};

const COPYSETS: u32 = 5;

fn server(raw: u32) -> ChunkserverId {
    ChunkserverId::new(raw)
}

fn copyset(raw: u32) -> CopysetId {
    CopysetId::new(raw)
}

fn members(raw: &[u32]) -> Vec<ChunkserverId> {
    raw.iter().copied().map(ChunkserverId::new).collect()
}

fn create(name: u8, segments: u64) -> Command {
    Command::CreateVolume {
        name: format!("v{name}").parse().expect("name"),
        size: segments * SEGMENT_BYTES,
        block_size: BlockSize::B4096,
        on_unavailable: OnUnavailable::Wait,
        now_ms: 1,
    }
}

fn register(store: u32, port: u32) -> Command {
    Command::RegisterChunkserver {
        store_uuid: format!("store{store}"),
        address: format!("127.0.0.1:{port}"),
        zone: format!("z{store}"),
        election_max_ms: 1000,
        now_ms: 1,
    }
}

fn report(raw: u32, term: u64, index: u64, voters: &[u32]) -> Command {
    let report =
        LeaderReport { copyset: copyset(raw), term, index, members: members(voters), learners: Vec::new() };
    Command::CopysetsReported { reports: vec![report] }
}

/// Founded, with chunkservers 1 to 4 and copysets 1 to 5 on 1, 2, 3.
fn cluster() -> MetaState {
    let mut state = MetaState::default();
    state.apply(&Command::Found { cluster: "c".into() }).expect("founded");
    for store in 1..=4 {
        state.apply(&register(store, 6800 + store)).expect("registered");
    }
    let copysets = vec![Members(members(&[1, 2, 3])); COPYSETS as usize];
    state.apply(&Command::CreateCopysets { copysets }).expect("created");
    state
}

fn any_command() -> impl Strategy<Value = Command> {
    let volume = || (0u64..8).prop_map(VolumeId::new);
    let epoch = || (0u64..6).prop_map(Epoch::new);
    let name = || (0u8..5).prop_map(|n| format!("v{n}").parse::<VolumeName>().expect("name"));
    let lie = proptest::collection::vec((1..=COPYSETS + 1).prop_map(CopysetId::new), SEGMENT_CHUNKS as usize);
    prop_oneof![
        3 => (0u8..5, 1u64..4).prop_map(|(name, segments)| create(name, segments)),
        1 => (volume(), 1u64..6).prop_map(|(volume, n)| Command::ResizeVolume { volume, size: n * SEGMENT_BYTES }),
        1 => (volume(), name()).prop_map(|(volume, name)| Command::RenameVolume { volume, name }),
        1 => (volume(), epoch()).prop_map(|(volume, epoch)| Command::DeleteVolume { volume, epoch }),
        3 => (volume(), epoch(), any::<bool>(), any::<bool>()).prop_map(|(volume, epoch, other, resumes)| {
            let gateway = if other { "h" } else { "g" }.to_owned();
            Command::OpenSession { volume, epoch, gateway, resumes, now_ms: 2 }
        }),
        1 => (volume(), epoch()).prop_map(|(volume, epoch)| Command::CloseSession { volume, epoch }),
        6 => (volume(), epoch(), 0u32..5, lie).prop_map(|(volume, epoch, index, copysets)| {
            // A copyset that does not exist is refused; most lists must not name one.
            let copysets = copysets.into_iter().map(|c| if index < 4 { copyset(c.get().min(COPYSETS)) } else { c });
            Command::AllocateSegment { volume, epoch, index: SegmentIndex::new(index), copysets: copysets.collect() }
        }),
        3 => (volume(), proptest::collection::vec((1..=COPYSETS).prop_map(CopysetId::new), 1..6))
            .prop_map(|(volume, copysets)| Command::Reclaimed { volume, copysets }),
        1 => (1u32..7, 6801u32..6806).prop_map(|(store, port)| register(store, port)),
        1 => (1u32..7, 6801u32..6806).prop_map(|(id, port)| Command::MoveChunkserver {
            chunkserver: server(id), address: format!("127.0.0.1:{port}"),
        }),
        1 => (1..=COPYSETS, 1u64..5, 0u64..5, 1u32..5).prop_map(|(id, term, index, out)| {
            let voters: Vec<u32> = (1..=4).filter(|voter| *voter != out).collect();
            report(id, term, index, &voters)
        }),
        1 => (1..=COPYSETS, 1u32..6, 1u32..6).prop_map(|(id, add, remove)| Command::StartReplace {
            copyset: copyset(id), add: server(add), remove: server(remove),
        }),
        1 => (1..=COPYSETS, 1u32..6).prop_map(|(id, add)| Command::AbortReplace { copyset: copyset(id), add: server(add) }),
    ]
}

/// What a model remembers from outside.
#[derive(Default)]
struct Model {
    epochs: BTreeMap<VolumeId, Epoch>,
    segments: BTreeMap<(VolumeId, SegmentIndex), Vec<CopysetId>>,
    given: BTreeSet<VolumeId>,
    deleted: BTreeSet<VolumeId>,
}

impl Model {
    fn observe(&mut self, command: &Command, outcome: &Outcome) -> Result<(), TestCaseError> {
        match (command, outcome) {
            (Command::CreateVolume { .. }, Ok(Answer::Volume(id))) => {
                prop_assert!(self.given.insert(*id), "volume ids are never reused");
            }
            (Command::OpenSession { volume, .. }, Ok(Answer::Epoch(epoch))) => {
                let before = self.epochs.insert(*volume, *epoch);
                prop_assert!(before.is_none_or(|before| before < *epoch), "epochs grow");
            }
            (Command::AllocateSegment { volume, epoch, index, .. }, Ok(Answer::Segment(copysets))) => {
                prop_assert_eq!(self.epochs.get(volume), Some(epoch), "only the newest session allocates");
                let before = self.segments.entry((*volume, *index)).or_insert_with(|| copysets.clone());
                prop_assert_eq!(&*before, copysets, "a chunk is allocated once");
            }
            (Command::DeleteVolume { volume, .. }, Ok(_)) => {
                self.deleted.insert(*volume);
            }
            _ => {}
        }
        Ok(())
    }
}

fn check(state: &MetaState, model: &Model) -> Result<(), TestCaseError> {
    let names: BTreeSet<_> = state.volumes.values().map(|volume| &volume.name).collect();
    prop_assert_eq!(names.len(), state.volumes.len(), "names are unique");
    prop_assert_eq!(state.names.len(), state.volumes.len());
    for ((volume, index), copysets) in &model.segments {
        let expected = (!model.deleted.contains(volume)).then_some(copysets.as_slice());
        prop_assert_eq!(state.segment(*volume, *index), expected);
    }
    let live: u64 = state.volumes().map(|volume| u64::from(state.segment_count(volume.id))).sum();
    let left: u64 =
        state.deletions().flat_map(|(_, left)| left.remaining.values()).map(|n| u64::from(*n)).sum();
    let held: u64 = state.copysets().map(|(_, copyset)| copyset.chunks).sum();
    prop_assert_eq!(held, live * u64::from(SEGMENT_CHUNKS) + left, "no chunk is lost or counted twice");
    let addresses: Vec<_> = state.chunkservers().filter_map(|server| server.address.as_ref()).collect();
    prop_assert_eq!(addresses.iter().collect::<BTreeSet<_>>().len(), addresses.len(), "one id per address");
    prop_assert!(state.chunkservers().all(|server| !server.gone || server.address.is_none()));
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn invariants_hold_under_any_commands(commands in proptest::collection::vec(any_command(), 1..120)) {
        let mut state = cluster();
        state.take_changed();
        let mut rows: BTreeMap<Key, Vec<u8>> = state.keys().filter_map(|key| Some((key, state.row(key)?))).collect();
        let mut model = Model::default();
        for command in &commands {
            let before = state.clone();
            let outcome = state.apply(command);
            model.observe(command, &outcome)?;
            check(&state, &model)?;
            for key in state.take_changed() {
                match state.row(key) {
                    Some(row) => rows.insert(key, row),
                    None => rows.remove(&key),
                };
            }
            if outcome.is_err() {
                prop_assert_eq!(&before, &state, "a refused command changes nothing");
            }
            let again = before.clone().apply(command);
            prop_assert_eq!(&again, &outcome, "apply is deterministic");
        }
        let loaded = MetaState::from_rows(rows).expect("rows fit");
        prop_assert_eq!(&loaded, &state, "the changed rows are the whole change");
        // Space of deleted volumes comes back.
        let waiting: Vec<_> = state.deletions().map(|(volume, _)| volume).collect();
        let all: Vec<_> = state.copysets().map(|(id, _)| id).collect();
        for volume in waiting {
            state.apply(&Command::Reclaimed { volume, copysets: all.clone() }).expect("reclaimed");
        }
        prop_assert_eq!(state.deletions().count(), 0);
        check(&state, &model)?;
    }
}

fn kind(outcome: Outcome) -> RefusalKind {
    outcome.expect_err("refused").kind
}

#[test]
fn a_new_store_at_an_old_address_makes_the_old_one_gone() {
    let mut state = cluster();
    assert_eq!(state.apply(&register(9, 6801)), Ok(Answer::Chunkserver(server(5))));
    let old = state.chunkserver(server(1)).expect("kept");
    assert!(old.gone && old.address.is_none());
    let walk = Command::MoveChunkserver { chunkserver: server(1), address: "127.0.0.1:6950".into() };
    assert_eq!(kind(state.apply(&walk)), RefusalKind::Precondition, "only registering brings it back");
    assert_eq!(state.apply(&register(9, 6801)), Ok(Answer::Chunkserver(server(5))), "same store, same id");
    // The old store is found again elsewhere: its data is back.
    assert_eq!(state.apply(&register(1, 6900)), Ok(Answer::Chunkserver(server(1))));
    assert!(!state.chunkserver(server(1)).expect("kept").gone);
}

#[test]
fn a_known_store_at_anothers_address_only_takes_the_address() {
    let mut state = cluster();
    state.apply(&register(2, 6801)).expect("moved");
    let other = state.chunkserver(server(1)).expect("kept");
    assert!(!other.gone && other.address.is_none());
}

#[test]
fn a_group_that_was_led_stays_led_and_old_reports_are_ignored() {
    let mut state = cluster();
    assert!(!state.copyset(copyset(1)).expect("there").led);
    state.apply(&report(1, 2, 10, &[1, 2, 4])).expect("taken");
    let row = state.copyset(copyset(1)).expect("there").clone();
    assert!(row.led);
    assert_eq!(row.members, members(&[1, 2, 4]));
    state.apply(&report(1, 2, 9, &[1, 2, 3])).expect("ignored");
    state.apply(&report(1, 1, 99, &[1, 2, 3])).expect("ignored");
    assert_eq!(state.copyset(copyset(1)), Some(&row));
}

#[test]
fn a_replacement_lasts_until_a_leader_reports_it_done() {
    let mut state = cluster();
    let start = Command::StartReplace { copyset: copyset(1), add: server(4), remove: server(3) };
    assert_eq!(kind(state.apply(&start)), RefusalKind::Conflict, "never led");
    state.apply(&report(1, 1, 1, &[1, 2, 3])).expect("led");
    state.apply(&start).expect("started");
    assert_eq!(kind(state.apply(&start)), RefusalKind::Conflict, "one at a time");
    let holders = |state: &MetaState| state.copyset(copyset(1)).expect("there").holders().collect::<Vec<_>>();
    assert_eq!(holders(&state), members(&[1, 2, 3, 4]));
    state.apply(&report(1, 1, 5, &[1, 2, 3, 4])).expect("joint");
    assert_eq!(holders(&state), members(&[1, 2, 3, 4]));
    let abort = Command::AbortReplace { copyset: copyset(1), add: server(4) };
    state.apply(&abort).expect("ignored: it is a voter");
    assert!(state.copyset(copyset(1)).expect("there").replacing.is_some());
    state.apply(&report(1, 1, 6, &[1, 2, 4])).expect("done");
    assert_eq!(holders(&state), members(&[1, 2, 4]));
    assert!(state.copyset(copyset(1)).expect("there").replacing.is_none());
}

#[test]
fn segments_are_judged() {
    let mut state = cluster();
    state.apply(&create(1, 2)).expect("created");
    let volume = VolumeId::new(1);
    let allocate = |epoch, index| Command::AllocateSegment {
        volume,
        epoch: Epoch::new(epoch),
        index: SegmentIndex::new(index),
        copysets: vec![copyset(1); 64],
    };
    assert_eq!(kind(state.apply(&allocate(0, 0))), RefusalKind::Fenced, "nobody has it open");
    let open =
        Command::OpenSession { volume, epoch: Epoch::new(0), gateway: "g".into(), resumes: false, now_ms: 1 };
    assert_eq!(state.apply(&open), Ok(Answer::Epoch(Epoch::new(1))));
    assert_eq!(kind(state.apply(&open)), RefusalKind::Conflict, "the epoch has moved on");
    assert!(state.apply(&allocate(1, 1)).is_ok());
    assert_eq!(kind(state.apply(&allocate(1, 2))), RefusalKind::Invalid, "past the end");
    let delete = |epoch| Command::DeleteVolume { volume, epoch: Epoch::new(epoch) };
    assert_eq!(kind(state.apply(&delete(0))), RefusalKind::Conflict);
    state.apply(&delete(1)).expect("deleted");
    assert_eq!(state.copyset(copyset(1)).map(|row| row.chunks), Some(64), "until reclaimed");
    assert_eq!(kind(state.apply(&allocate(1, 0))), RefusalKind::NotFound);
    state.apply(&Command::Reclaimed { volume, copysets: vec![copyset(1)] }).expect("reclaimed");
    assert_eq!(state.copyset(copyset(1)).map(|row| row.chunks), Some(0));
    assert_eq!(state.deletions().count(), 0);
}

#[test]
fn rows_that_do_not_fit_each_other_are_refused() {
    let state = cluster();
    let rows =
        |state: &MetaState| state.keys().filter_map(|key| Some((key, state.row(key)?))).collect::<Vec<_>>();
    let mut damaged = rows(&state);
    damaged.push((Key::Copyset(copyset(9)), b"{".to_vec()));
    assert!(MetaState::from_rows(damaged).expect_err("damaged").contains("Copyset"));
    let mut dangling = rows(&state);
    dangling.push((Key::Segment(VolumeId::new(1), SegmentIndex::new(0)), b"[99]".to_vec()));
    assert!(MetaState::from_rows(dangling).expect_err("dangling").contains("copyset=99"));
}

#[test]
fn a_run_lasts_until_another_gateway_has_the_volume() {
    let mut state = cluster();
    state.apply(&create(1, 1)).expect("created");
    let volume = VolumeId::new(1);
    // Who opens, whether it resumes, whether it closes then; and since when the run lasts.
    let steps = [
        ("g", false, true, 1),
        ("g", false, false, 1),
        ("h", false, true, 3),
        ("g", false, false, 4),
        ("g", true, true, 4),
        ("renamed", true, false, 4),
        ("renamed", false, false, 4),
        ("g", false, false, 8),
    ];
    for (seen, (gateway, resumes, closes, since)) in (0u64..).zip(steps) {
        let epoch = Epoch::new(seen);
        let open = Command::OpenSession { volume, epoch, gateway: gateway.into(), resumes, now_ms: 1 };
        assert_eq!(state.apply(&open), Ok(Answer::Epoch(Epoch::new(seen + 1))));
        if closes {
            state.apply(&Command::CloseSession { volume, epoch: Epoch::new(seen + 1) }).expect("closed");
        }
        let row = state.volume(volume).expect("there");
        assert_eq!(
            (row.run_since(), row.session.is_none()),
            (Epoch::new(since), closes),
            "after epoch {}",
            seen + 1
        );
    }
}

#[test]
fn a_volume_row_of_format_1_is_read() {
    let old = r#"{"id":1,"name":"v1","size":1073741824,"block_size":4096,"on_unavailable":"wait","created_ms":1,"epoch":3,"session":null}"#;
    let mut state = MetaState::from_rows(vec![(Key::Volume(VolumeId::new(1)), old.into())]).expect("is read");
    let volume = VolumeId::new(1);
    assert_eq!(state.volume(volume).expect("there").run_since(), Epoch::new(3));
    let open =
        Command::OpenSession { volume, epoch: Epoch::new(3), gateway: "g".into(), resumes: false, now_ms: 1 };
    state.apply(&open).expect("opened");
    let golden = r#"{"id":1,"name":"v1","size":1073741824,"block_size":4096,"on_unavailable":"wait","created_ms":1,"epoch":4,"session":{"gateway":"g","since_ms":1},"run":{"gateway":"g","since":4}}"#;
    let row = state.row(Key::Volume(volume)).expect("there");
    assert_eq!(String::from_utf8_lossy(&row), golden, "format 2");
    let golden = r#"{"cluster":"","last_volume":0,"last_chunkserver":0,"last_epoch":4,"election_max_ms":0}"#;
    let row = state.row(Key::Counters).expect("there");
    assert_eq!(String::from_utf8_lossy(&row), golden, "format 2");
    let old = r#"{"cluster":"c","last_volume":1,"last_chunkserver":3}"#;
    let mut state = MetaState::from_rows(vec![(Key::Counters, old.into())]).expect("is read");
    assert_eq!(state.apply(&create(1, 1)), Ok(Answer::Volume(VolumeId::new(2))));
}

#[test]
fn all_chunkservers_have_one_election_time() {
    let with = |store, time| match register(store, 6800 + store) {
        Command::RegisterChunkserver { store_uuid, address, zone, now_ms, .. } => {
            Command::RegisterChunkserver { store_uuid, address, zone, election_max_ms: time, now_ms }
        }
        other => other,
    };
    let mut state = MetaState::default();
    state.apply(&with(1, 0)).expect("logged by version 1");
    state.apply(&with(2, 1500)).expect("the first that tells decides");
    state.apply(&with(3, 1500)).expect("agrees");
    let before = state.clone();
    let refused = state.apply(&with(4, 1000)).expect_err("differs");
    assert_eq!(refused.kind, RefusalKind::Precondition);
    assert!(refused.message.contains("election_max_ms=1000 cluster=1500"), "{refused}");
    assert_eq!(state, before, "a refusal changes nothing");
    state.apply(&with(3, 1000)).expect_err("nor may it change");
}
