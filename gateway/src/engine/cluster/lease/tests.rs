use super::*;
use spline_client::{ClientConfig, OpenedSession, RenewedSession};
use spline_link::Identity;
use spline_types::{BlockSize, Epoch, Geometry, OnUnavailable, VolumeId, VolumeName};

const ID: VolumeId = VolumeId::new(7);
const SIZE: u64 = 1 << 30;

/// A session of the one volume, opened under a name.
fn session(name: &str, epoch: u64) -> Arc<Volume> {
    let client =
        ClusterClient::new(ClientConfig::default(), &mut prometheus_client::registry::Registry::default());
    let opened = OpenedSession {
        volume: ID,
        geometry: Geometry { size: SIZE, block_size: BlockSize::B4096 },
        epoch: Epoch::new(epoch),
        run_since: Epoch::new(epoch),
        on_unavailable: OnUnavailable::Wait,
        lease: Duration::from_secs(10),
        segments: Default::default(),
    };
    let name: VolumeName = name.parse().expect("a name");
    let identity = Identity::new(0, ID.get()).expect("an identity");
    Arc::new(Volume::new(name, client, &opened, identity))
}

fn answer(sessions: &[(u64, SessionState)]) -> Renewal {
    let renewed = |(epoch, state): &(u64, SessionState)| RenewedSession {
        volume: ID,
        epoch: Epoch::new(*epoch),
        state: state.clone(),
    };
    Renewal { lease: Duration::from_secs(10), sessions: sessions.iter().map(renewed).collect() }
}

fn alive(size: u64, name: &str) -> SessionState {
    SessionState::Alive { size, name: name.to_owned() }
}

fn is_lost(volume: &Volume) -> bool {
    volume.standing.borrow().lost
}

#[tokio::test]
async fn of_two_sessions_of_a_volume_each_gets_its_own_verdict() {
    for turned in [false, true] {
        let (old, new) = (session("disk", 3), session("moved", 4));
        let mut held = vec![Arc::clone(&old), Arc::clone(&new)];
        let mut said = vec![(3, SessionState::Lost), (4, alive(2 * SIZE, "moved"))];
        if turned {
            held.reverse();
            said.reverse();
        }
        apply(&held, &answer(&said), 1);
        assert!(is_lost(&old) && !is_lost(&new), "turned={turned}");
        assert_eq!(new.standing.borrow().size, 2 * SIZE);
        assert_eq!(old.standing.borrow().size, SIZE);
    }
}

#[tokio::test]
async fn an_answer_that_was_overtaken_brings_no_old_name_back() {
    let volume = session("disk", 3);
    let held = [Arc::clone(&volume)];
    apply(&held, &answer(&[(3, alive(2 * SIZE, "moved"))]), 2);
    // Asked for before the rename, held up on its way.
    apply(&held, &answer(&[(3, alive(SIZE, "disk"))]), 1);
    assert!(volume.is_called_so().is_err(), "the name may be another volume's by now");
    assert_eq!(volume.standing.borrow().size, 2 * SIZE);
    apply(&held, &answer(&[(3, alive(2 * SIZE, "disk"))]), 3);
    assert!(volume.is_called_so().is_ok());
}
