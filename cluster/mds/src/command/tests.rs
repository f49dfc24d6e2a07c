//! Golden JSON: these texts lie in logs on disk and must be read for ever.

use super::*;

fn ids(raw: &[u32]) -> Vec<ChunkserverId> {
    raw.iter().copied().map(ChunkserverId::new).collect()
}

fn golden() -> Vec<(Command, &'static str)> {
    let volume = VolumeId::new(7);
    let copyset = CopysetId::new(3);
    vec![
        (Command::Found { cluster: "c0ffee".into() }, r#"{"v":2,"command":{"found":{"cluster":"c0ffee"}}}"#),
        (
            Command::CreateVolume {
                name: "vm/root".parse().expect("name"),
                size: 1 << 30,
                block_size: BlockSize::B4096,
                on_unavailable: OnUnavailable::FailAfter(std::time::Duration::from_secs(30)),
                now_ms: 1_700_000_000_000,
            },
            r#"{"v":2,"command":{"create_volume":{"name":"vm/root","size":1073741824,"block_size":4096,"on_unavailable":"fail-after:30","now_ms":1700000000000}}}"#,
        ),
        (
            Command::ResizeVolume { volume, size: 1 << 31 },
            r#"{"v":2,"command":{"resize_volume":{"volume":7,"size":2147483648}}}"#,
        ),
        (
            Command::RenameVolume { volume, name: "b".parse().expect("name") },
            r#"{"v":2,"command":{"rename_volume":{"volume":7,"name":"b"}}}"#,
        ),
        (
            Command::DeleteVolume { volume, epoch: Epoch::new(2) },
            r#"{"v":2,"command":{"delete_volume":{"volume":7,"epoch":2}}}"#,
        ),
        (
            Command::Reclaimed { volume, copysets: vec![copyset] },
            r#"{"v":2,"command":{"reclaimed":{"volume":7,"copysets":[3]}}}"#,
        ),
        (
            Command::OpenSession {
                volume,
                epoch: Epoch::new(2),
                gateway: "host1".into(),
                resumes: true,
                now_ms: 5,
            },
            r#"{"v":2,"command":{"open_session":{"volume":7,"epoch":2,"gateway":"host1","resumes":true,"now_ms":5}}}"#,
        ),
        (
            Command::CloseSession { volume, epoch: Epoch::new(3) },
            r#"{"v":2,"command":{"close_session":{"volume":7,"epoch":3}}}"#,
        ),
        (
            Command::AllocateSegment {
                volume,
                epoch: Epoch::new(3),
                index: SegmentIndex::new(1),
                copysets: vec![copyset, CopysetId::new(4)],
            },
            r#"{"v":2,"command":{"allocate_segment":{"volume":7,"epoch":3,"index":1,"copysets":[3,4]}}}"#,
        ),
        (
            Command::RegisterChunkserver {
                store_uuid: "u-1".into(),
                address: "10.0.0.1:6800".into(),
                zone: "z1".into(),
                election_max_ms: 1000,
                now_ms: 6,
            },
            r#"{"v":2,"command":{"register_chunkserver":{"store_uuid":"u-1","address":"10.0.0.1:6800","zone":"z1","election_max_ms":1000,"now_ms":6}}}"#,
        ),
        (
            Command::MoveChunkserver { chunkserver: ChunkserverId::new(2), address: "10.0.0.2:6800".into() },
            r#"{"v":2,"command":{"move_chunkserver":{"chunkserver":2,"address":"10.0.0.2:6800"}}}"#,
        ),
        (
            Command::CreateCopysets { copysets: vec![Members(ids(&[1, 2, 3])), Members(ids(&[2, 3, 1]))] },
            r#"{"v":2,"command":{"create_copysets":{"copysets":[[1,2,3],[2,3,1]]}}}"#,
        ),
        (
            Command::CopysetsReported {
                reports: vec![LeaderReport {
                    copyset,
                    term: 2,
                    index: 9,
                    members: ids(&[1, 2, 3]),
                    learners: ids(&[4]),
                }],
            },
            r#"{"v":2,"command":{"copysets_reported":{"reports":[{"copyset":3,"term":2,"index":9,"members":[1,2,3],"learners":[4]}]}}}"#,
        ),
        (
            Command::StartReplace { copyset, add: ChunkserverId::new(4), remove: ChunkserverId::new(3) },
            r#"{"v":2,"command":{"start_replace":{"copyset":3,"add":4,"remove":3}}}"#,
        ),
        (
            Command::AbortReplace { copyset, add: ChunkserverId::new(4) },
            r#"{"v":2,"command":{"abort_replace":{"copyset":3,"add":4}}}"#,
        ),
    ]
}

#[test]
fn commands_are_written_and_read_as_ever() {
    for (command, text) in golden() {
        assert_eq!(String::from_utf8_lossy(&command.encode()), text);
        assert_eq!(Command::decode(text.as_bytes()), Ok(command));
    }
}

#[test]
fn commands_of_version_1_are_read() {
    let text = r#"{"v":1,"command":{"open_session":{"volume":7,"epoch":2,"gateway":"host1","now_ms":5}}}"#;
    let open = Command::OpenSession {
        volume: VolumeId::new(7),
        epoch: Epoch::new(2),
        gateway: "host1".into(),
        resumes: false,
        now_ms: 5,
    };
    assert_eq!(Command::decode(text.as_bytes()), Ok(open));
}

#[test]
fn answers_are_written_and_read_as_ever() {
    let golden: [(Outcome, &str); 6] = [
        (Ok(Answer::Done), r#"{"Ok":"done"}"#),
        (Ok(Answer::Volume(VolumeId::new(7))), r#"{"Ok":{"volume":7}}"#),
        (Ok(Answer::Epoch(Epoch::new(2))), r#"{"Ok":{"epoch":2}}"#),
        (Ok(Answer::Segment(vec![CopysetId::new(3)])), r#"{"Ok":{"segment":[3]}}"#),
        (Ok(Answer::Chunkserver(ChunkserverId::new(1))), r#"{"Ok":{"chunkserver":1}}"#),
        (Err(Refusal::no_space("full")), r#"{"Err":{"kind":"no_space","message":"full"}}"#),
    ];
    for (outcome, text) in golden {
        assert_eq!(serde_json::to_string(&outcome).expect("serialises"), text);
        assert_eq!(serde_json::from_str::<Outcome>(text).expect("parses"), outcome);
    }
}

#[test]
fn what_is_not_a_known_command_is_refused_by_name() {
    let unknown = Command::decode(br#"{"v":99,"command":{"fly":{}}}"#).expect_err("version 99");
    assert!(unknown.contains("version=99"), "{unknown}");
    for bad in ["", "{}", r#"{"v":1}"#, r#"{"v":2,"command":{"fly":{}}}"#, "\0"] {
        assert!(Command::decode(bad.as_bytes()).is_err(), "{bad}");
    }
}
