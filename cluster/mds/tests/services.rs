//! The three services over a real loopback socket, against a real raft group and real tables. Chunkservers are played
//! by heartbeats: what they say is all that the metadata server knows of them.

use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use spline_mds::{Config, Mds};
use spline_rpc::mds as pb;
use spline_rpc::mds::cluster_client::ClusterClient;
use spline_rpc::mds::sessions_client::SessionsClient;
use spline_rpc::mds::volumes_client::VolumesClient;
use std::path::Path;
use std::time::{Duration, Instant};
use tonic::Code;
use tonic::transport::Channel;

/// How long a condition may take to come true on a busy machine.
const LIMIT: Duration = Duration::from_secs(30);
const GIB: u64 = 1 << 30;

struct Lab {
    mds: Mds,
    registry: Registry,
    volumes: VolumesClient<Channel>,
    sessions: SessionsClient<Channel>,
    cluster: ClusterClient<Channel>,
}

fn config(dir: &Path) -> Config {
    Config {
        data_dir: dir.to_path_buf(),
        listen: ([127, 0, 0, 1], 0).into(),
        copysets: 12,
        lease: Duration::from_secs(2),
        heartbeat: Duration::from_millis(500),
        down_after: Duration::from_secs(60),
        ..Config::default()
    }
}

impl Lab {
    async fn start(config: Config) -> Self {
        let mut registry = Registry::default();
        let mds = Mds::start(config, &mut registry).await.expect("starts");
        let endpoint = format!("http://{}", mds.address());
        let channel = Channel::from_shared(endpoint).expect("address").connect().await.expect("connects");
        Self {
            mds,
            registry,
            volumes: VolumesClient::new(channel.clone()),
            sessions: SessionsClient::new(channel.clone()),
            cluster: ClusterClient::new(channel),
        }
    }

    async fn create(&mut self, name: &str, size_bytes: u64) -> Result<pb::Volume, Code> {
        let request = pb::CreateVolumeRequest { name: name.into(), size_bytes, ..Default::default() };
        self.volumes.create(request).await.map(tonic::Response::into_inner).map_err(|status| status.code())
    }

    async fn get(&mut self, name: &str) -> Result<pb::Volume, Code> {
        let request = pb::GetVolumeRequest { name: name.into() };
        self.volumes.get(request).await.map(tonic::Response::into_inner).map_err(|status| status.code())
    }

    async fn open(&mut self, volume: &str, gateway: &str, force: bool) -> Result<pb::OpenSessionReply, Code> {
        let request = pb::OpenSessionRequest {
            volume: volume.into(),
            gateway: gateway.into(),
            force,
            ..Default::default()
        };
        self.sessions.open(request).await.map(tonic::Response::into_inner).map_err(|status| status.code())
    }

    /// Opens `volume` if it is the one with that id.
    async fn open_known(&mut self, volume: &str, id: u64) -> Result<pb::OpenSessionReply, tonic::Status> {
        let (volume, gateway) = (volume.into(), "g".into());
        let request = pb::OpenSessionRequest { volume, gateway, known_id: Some(id), ..Default::default() };
        self.sessions.open(request).await.map(tonic::Response::into_inner)
    }

    /// Opens to resume a session; answers the new one and since when its run lasts.
    async fn resume(&mut self, volume: &str, gateway: &str, epoch: u64) -> Result<(u64, u64), String> {
        let request = pb::OpenSessionRequest {
            volume: volume.into(),
            gateway: gateway.into(),
            resumed_epoch: Some(epoch),
            ..Default::default()
        };
        let reply = self.sessions.open(request).await.map_err(|status| {
            assert_eq!(status.code(), Code::FailedPrecondition);
            status.message().to_owned()
        })?;
        let reply = reply.into_inner();
        Ok((reply.epoch, reply.run_since))
    }

    /// Opens as the successor of a session.
    async fn follow(&mut self, volume: &str, gateway: &str, newest: u64) -> Result<u64, Code> {
        let (volume, gateway) = (volume.into(), gateway.into());
        let request =
            pb::OpenSessionRequest { volume, gateway, newest_epoch: Some(newest), ..Default::default() };
        let reply = self.sessions.open(request).await.map_err(|status| status.code())?;
        Ok(reply.into_inner().epoch)
    }

    async fn renew(&mut self, gateway: &str, volume_id: u64, epoch: u64) -> pb::RenewedSession {
        let sessions = vec![pb::SessionRef { volume_id, epoch }];
        let request = pb::RenewSessionsRequest { gateway: gateway.into(), sessions };
        let renewed = self.sessions.renew(request).await.expect("renews").into_inner().sessions.remove(0);
        assert_eq!((renewed.volume_id, renewed.epoch), (volume_id, epoch), "it says which one it judges");
        renewed
    }

    async fn allocate(&mut self, volume_id: u64, epoch: u64, index: u32) -> Result<Vec<u32>, Code> {
        let request = pb::AllocateSegmentRequest { volume_id, epoch, index };
        let reply = self.sessions.allocate_segment(request).await;
        reply.map(|segment| segment.into_inner().copysets).map_err(|status| status.code())
    }

    async fn register(&mut self, store: &str, port: u16, zone: &str) -> u32 {
        self.try_register(store, port, zone, 1000).await.expect("registers")
    }

    async fn try_register(
        &mut self,
        store: &str,
        port: u16,
        zone: &str,
        election_max_ms: u64,
    ) -> Result<u32, tonic::Status> {
        let request = pb::RegisterRequest {
            address: format!("127.0.0.1:{port}"),
            zone: zone.into(),
            store_uuid: store.into(),
            election_max_ms,
        };
        Ok(self.cluster.register(request).await?.into_inner().chunkserver_id)
    }

    async fn heartbeat(
        &mut self,
        id: u32,
        port: u16,
        copysets: Vec<pb::CopysetReport>,
    ) -> pb::HeartbeatReply {
        self.try_heartbeat(id, port, copysets).await.expect("is taken")
    }

    async fn try_heartbeat(
        &mut self,
        chunkserver_id: u32,
        port: u16,
        copysets: Vec<pb::CopysetReport>,
    ) -> Result<pb::HeartbeatReply, Code> {
        let request = pb::HeartbeatRequest {
            chunkserver_id,
            address: format!("127.0.0.1:{port}"),
            capacity_bytes: 100 * GIB,
            copysets,
            ..Default::default()
        };
        self.cluster.heartbeat(request).await.map(tonic::Response::into_inner).map_err(|status| status.code())
    }

    /// Registers chunkservers 1 to 3 and lets the first member of each copyset report that it leads.
    async fn lead_all(&mut self) {
        for (id, port) in [(1, 7001), (2, 7002), (3, 7003)] {
            assert_eq!(self.register(&format!("store{id}"), port, &format!("z{id}")).await, id);
        }
        for (id, port) in [(1, 7001), (2, 7002), (3, 7003)] {
            let asked = self.heartbeat(id, port, Vec::new()).await;
            let own = asked.assignments.iter().filter(|assignment| assignment.members[0] == id);
            let reports = own.map(|assignment| leads(assignment.id, 1, &assignment.members)).collect();
            self.heartbeat(id, port, reports).await;
        }
    }
}

fn leads(id: u32, term: u64, members: &[u32]) -> pb::CopysetReport {
    pb::CopysetReport {
        id,
        leader: true,
        term,
        applied_index: term,
        members: members.to_vec(),
        ..Default::default()
    }
}

#[tokio::test]
async fn volumes_are_created_grown_renamed_and_deleted() {
    let dir = tempfile::tempdir().expect("directory");
    let mut lab = Lab::start(config(dir.path())).await;
    let created = lab.create("a", GIB).await.expect("created");
    assert_eq!((created.id, created.block_size, created.on_unavailable.as_str()), (1, 4096, "wait"));
    assert_eq!(lab.create("a", GIB).await, Err(Code::AlreadyExists));
    assert_eq!(lab.create("../x", GIB).await, Err(Code::InvalidArgument));
    assert_eq!(lab.create("b", 1000).await, Err(Code::InvalidArgument));
    assert_eq!(lab.create("b", (64 << 40) + 4096).await, Err(Code::InvalidArgument));
    lab.create("b", 1 << 20).await.expect("created");
    let resize = |size_bytes| pb::ResizeVolumeRequest { name: "a".into(), size_bytes };
    assert_eq!(lab.volumes.resize(resize(2 * GIB)).await.expect("grown").into_inner().size_bytes, 2 * GIB);
    let shrink = lab.volumes.resize(resize(GIB)).await.expect_err("refused");
    assert_eq!(shrink.code(), Code::FailedPrecondition);
    assert!(shrink.message().contains("can not shrink"), "{}", shrink.message());
    let rename = |to: &str| pb::RenameVolumeRequest { name: "a".into(), new_name: to.into() };
    assert_eq!(lab.volumes.rename(rename("b")).await.expect_err("refused").code(), Code::AlreadyExists);
    lab.volumes.rename(rename("c")).await.expect("renamed");
    assert_eq!(lab.get("a").await, Err(Code::NotFound));
    lab.volumes.delete(pb::DeleteVolumeRequest { name: "b".into() }).await.expect("deleted");
    let listed = lab.volumes.list(pb::ListVolumesRequest {}).await.expect("lists").into_inner().volumes;
    assert_eq!(listed.iter().map(|volume| volume.name.as_str()).collect::<Vec<_>>(), ["c"]);
    let again = lab.create("b", 1 << 20).await.expect("created");
    assert_eq!(again.id, 3, "ids are not reused");
    let mut text = String::new();
    encode(&mut text, &lab.registry).expect("encodes");
    assert!(text.contains(r#"spline_mds_requests_total{method="volumes.create",code="ok"} 3"#), "{text}");
    assert!(
        text.contains(r#"spline_mds_commands_total{command="rename_volume",outcome="exists"} 1"#),
        "{text}"
    );
    lab.mds.shutdown().await;
}

#[tokio::test]
async fn a_session_is_exclusive_while_its_lease_is_alive() {
    let dir = tempfile::tempdir().expect("directory");
    let mut lab = Lab::start(Config { lease: Duration::from_secs(600), ..config(dir.path()) }).await;
    let volume = lab.create("a", GIB).await.expect("created").id;
    assert_eq!(lab.open("a", "g1", false).await.expect("opened").epoch, 1);
    assert_eq!(lab.open("a", "g2", false).await, Err(Code::FailedPrecondition));
    assert_eq!(lab.open("a", "g1", false).await.expect("the same gateway restarted").epoch, 2);
    assert!(lab.renew("g1", volume, 1).await.lost);
    assert!(!lab.renew("g1", volume, 2).await.lost);
    assert!(lab.renew("g2", volume, 2).await.lost, "another gateway's session");
    let delete = pb::DeleteVolumeRequest { name: "a".into() };
    assert_eq!(
        lab.volumes.delete(delete.clone()).await.expect_err("in use").code(),
        Code::FailedPrecondition
    );
    assert_eq!(lab.open("a", "g2", true).await.expect("forced").epoch, 3);
    assert!(lab.renew("g1", volume, 2).await.lost);
    let close = |epoch| pb::CloseSessionRequest { volume_id: volume, epoch };
    lab.sessions.close(close(2)).await.expect("an old session's close changes nothing");
    assert!(!lab.renew("g2", volume, 3).await.lost);
    lab.sessions.close(close(3)).await.expect("closed");
    assert_eq!(lab.get("a").await.expect("there").session, None);
    lab.volumes.delete(delete).await.expect("deleted");
    lab.mds.shutdown().await;
}

#[tokio::test]
async fn a_successor_that_comes_late_opens_nothing() {
    let dir = tempfile::tempdir().expect("directory");
    let mut lab = Lab::start(config(dir.path())).await;
    let volume = lab.create("a", GIB).await.expect("created").id;
    assert_eq!(lab.open("a", "g1", false).await.expect("opened").epoch, 1);
    assert_eq!(lab.follow("a", "g1", 1).await, Ok(2));
    // Given up, and the session opened anew by whom it was to follow: the same call again finds that.
    assert_eq!(lab.open("a", "g1", false).await.expect("opened").epoch, 3);
    assert_eq!(lab.follow("a", "g1", 2).await, Err(Code::FailedPrecondition));
    assert!(!lab.renew("g1", volume, 3).await.lost, "nothing was taken from it");
    lab.mds.shutdown().await;
}

#[tokio::test]
async fn a_session_is_resumed_unless_another_gateway_had_the_volume_since() {
    let dir = tempfile::tempdir().expect("directory");
    let mut lab = Lab::start(Config { lease: Duration::from_secs(600), ..config(dir.path()) }).await;
    let volume = lab.create("a", GIB).await.expect("created").id;
    assert_eq!(lab.open("a", "g1", false).await.expect("opened").run_since, 1);
    assert_eq!(lab.resume("a", "g1", 1).await, Ok((2, 1)));
    let close = |epoch| pb::CloseSessionRequest { volume_id: volume, epoch };
    lab.sessions.close(close(2)).await.expect("closed");
    assert_eq!(lab.resume("a", "g1", 1).await, Ok((3, 1)), "its own sessions in between do no harm");
    assert_eq!(lab.open("a", "g2", true).await.expect("forced").epoch, 4);
    lab.sessions.close(close(4)).await.expect("closed");
    let refused = lab.resume("a", "g1", 3).await.expect_err("g2 had it");
    assert!(refused.contains("resumed_epoch=3 epoch=4 last_gateway=g2"), "{refused}");
    assert_eq!(lab.open("a", "g1", false).await.expect("opened anew").run_since, 5);
    lab.resume("a", "g1", 3).await.expect_err("g2 had it");
    assert_eq!(lab.resume("a", "g1", 5).await, Ok((6, 5)));
    lab.sessions.close(close(6)).await.expect("closed");
    // The gateway may have another name now.
    assert_eq!(lab.resume("a", "g9", 6).await, Ok((7, 5)));
    lab.resume("a", "g9", 8).await.expect_err("there was no such session");
    // Another volume of this name is not the one that was open, however often it is opened itself.
    lab.sessions.close(close(7)).await.expect("closed");
    lab.volumes.delete(pb::DeleteVolumeRequest { name: "a".into() }).await.expect("deleted");
    lab.create("a", GIB).await.expect("created");
    lab.resume("a", "g9", 7).await.expect_err("a session of the volume before");
    for _ in 0..3 {
        lab.open("a", "g9", false).await.expect("opened");
    }
    lab.resume("a", "g9", 7).await.expect_err("a session of the volume before");
    lab.mds.shutdown().await;
}

#[tokio::test]
async fn a_known_volume_is_not_opened_by_a_name_that_is_another_s() {
    let dir = tempfile::tempdir().expect("directory");
    let mut lab = Lab::start(config(dir.path())).await;
    let (first, second) =
        (lab.create("a", GIB).await.expect("created").id, lab.create("b", GIB).await.expect("created").id);
    assert_eq!(lab.open_known("a", first).await.expect("it is").epoch, 1);
    let rename =
        |name: &str, new_name: &str| pb::RenameVolumeRequest { name: name.into(), new_name: new_name.into() };
    let refused = lab.volumes.rename(rename("a", "c")).await.expect_err("it is open");
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("end its exports there first: name=a gateway="), "{refused}");
    let first_session = pb::CloseSessionRequest { volume_id: first, epoch: 1 };
    lab.sessions.close(first_session).await.expect("closed");
    for (name, new_name) in [("a", "c"), ("b", "a")] {
        lab.volumes.rename(rename(name, new_name)).await.expect("renamed");
    }
    let refused = lab.open_known("a", first).await.expect_err("the name is the second's");
    assert_eq!(refused.code(), Code::AlreadyExists);
    let says = refused.message();
    assert!(says.contains(&format!("name=a volume_id={second} known_id={first}")), "{says}");
    assert!(lab.get("a").await.expect("there").session.is_none(), "nothing was opened");
    assert_eq!(lab.open_known("c", first).await.expect("its name now").epoch, 2);
    lab.open_known("a", second).await.expect("its name now");
    lab.mds.shutdown().await;
}

#[tokio::test]
async fn an_expired_lease_lets_another_gateway_in() {
    let dir = tempfile::tempdir().expect("directory");
    let mut lab = Lab::start(Config { lease: Duration::from_millis(100), ..config(dir.path()) }).await;
    lab.create("a", GIB).await.expect("created");
    lab.open("a", "g1", false).await.expect("opened");
    let start = Instant::now();
    while lab.get("a").await.expect("there").session.is_some_and(|session| session.lease_left_ms > 0) {
        assert!(start.elapsed() < LIMIT, "the lease does not run out");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(lab.open("a", "g2", false).await.expect("opened").epoch, 2);
    lab.mds.shutdown().await;
}

#[tokio::test]
async fn copysets_are_created_bootstrapped_once_and_routed() {
    let dir = tempfile::tempdir().expect("directory");
    let mut lab = Lab::start(config(dir.path())).await;
    assert_eq!(lab.register("store1", 7001, "z1").await, 1);
    assert_eq!(lab.register("store2", 7002, "z2").await, 2);
    let early = lab.heartbeat(1, 7001, Vec::new()).await;
    assert_eq!((early.interval_ms, early.assignments.len()), (100, 0));
    assert_eq!(lab.register("store3", 7003, "z3").await, 3);
    let asked = lab.heartbeat(1, 7001, Vec::new()).await;
    assert_eq!((asked.interval_ms, asked.assignments.len(), asked.chunkservers.len()), (100, 12, 3));
    assert!(asked.assignments.iter().all(|assignment| assignment.bootstrap));
    for first in 1..=3 {
        let count = asked.assignments.iter().filter(|assignment| assignment.members[0] == first).count();
        assert_eq!(count, 4, "bootstrapping is spread");
    }
    lab.lead_all().await;
    let settled = lab.heartbeat(3, 7003, Vec::new()).await;
    assert_eq!(settled.interval_ms, 500);
    assert!(settled.assignments.iter().all(|assignment| !assignment.bootstrap));
    let routes = lab.cluster.routes(pb::RoutesRequest::default()).await.expect("routes").into_inner();
    assert_eq!((routes.routes.len(), routes.chunkservers.len()), (12, 3));
    assert!(routes.routes.iter().all(|route| route.leader == route.members[0]));
    let some = lab.cluster.routes(pb::RoutesRequest { copysets: vec![5, 999] }).await.expect("routes");
    assert_eq!(some.into_inner().routes.iter().map(|route| route.copyset).collect::<Vec<_>>(), [5]);
    let status = lab.cluster.status(pb::StatusRequest {}).await.expect("status").into_inner();
    assert!(status.copysets.iter().all(|copyset| copyset.state == "healthy"));
    assert_eq!(status.chunkservers.iter().map(|server| server.leaders).collect::<Vec<_>>(), [4, 4, 4]);
    assert_eq!(lab.try_heartbeat(77, 7077, Vec::new()).await, Err(Code::NotFound));
    // A replica that has stopped on a chunkserver that is up.
    let (copyset, member) = (&status.copysets[0], status.copysets[0].members[1]);
    let replica = |stopped| pb::CopysetReport { id: copyset.id, stopped, ..Default::default() };
    lab.heartbeat(member, 7000 + member as u16, vec![replica(true)]).await;
    let status = lab.cluster.status(pb::StatusRequest {}).await.expect("status").into_inner();
    let expected = format!("replica on chunkserver {member} has stopped, see its log and restart it");
    assert_eq!((status.copysets[0].state.as_str(), &status.copysets[0].reason), ("degraded", &expected));
    assert!(
        status.copysets[1..].iter().all(|copyset| copyset.state == "healthy" && copyset.reason.is_empty())
    );
    lab.heartbeat(member, 7000 + member as u16, vec![replica(false)]).await;
    let status = lab.cluster.status(pb::StatusRequest {}).await.expect("status").into_inner();
    assert_eq!((status.copysets[0].state.as_str(), status.copysets[0].reason.as_str()), ("healthy", ""));
    lab.mds.shutdown().await;
}

#[tokio::test]
async fn a_chunkserver_with_another_election_time_is_refused() {
    let dir = tempfile::tempdir().expect("directory");
    let mut lab = Lab::start(config(dir.path())).await;
    assert_eq!(lab.register("store1", 7001, "z1").await, 1);
    for (time, says) in [(2000, "election_max_ms=2000 cluster=1000"), (0, "upgrade it")] {
        let refused = lab.try_register("store2", 7002, "z2", time).await.expect_err("differs");
        assert_eq!(refused.code(), Code::FailedPrecondition);
        assert!(refused.message().contains(says), "{}", refused.message());
    }
    lab.mds.shutdown().await;
    let mut lab = Lab::start(config(dir.path())).await;
    lab.try_register("store2", 7002, "z2", 2000).await.expect_err("it is kept");
    assert_eq!(lab.register("store2", 7002, "z2").await, 2);
    lab.mds.shutdown().await;
}

#[tokio::test]
async fn segments_are_allocated_once_and_their_space_comes_back() {
    let dir = tempfile::tempdir().expect("directory");
    let mut lab = Lab::start(config(dir.path())).await;
    let volume = lab.create("a", 2 * GIB).await.expect("created").id;
    let epoch = lab.open("a", "g1", false).await.expect("opened").epoch;
    assert_eq!(lab.allocate(volume, epoch, 0).await, Err(Code::Unavailable), "no copysets yet");
    lab.lead_all().await;
    let copysets = lab.allocate(volume, epoch, 0).await.expect("allocated");
    assert_eq!(copysets.len(), 64);
    assert_eq!(lab.allocate(volume, epoch, 0).await, Ok(copysets.clone()), "idempotent");
    assert_eq!(lab.allocate(volume, epoch, 2).await, Err(Code::InvalidArgument), "past the end");
    let reopened = lab.open("a", "g1", false).await.expect("opened");
    assert_eq!(reopened.segments, [pb::Segment { index: 0, copysets }]);
    assert_eq!(lab.allocate(volume, epoch, 1).await, Err(Code::FailedPrecondition), "an old epoch");
    let close = pb::CloseSessionRequest { volume_id: volume, epoch: reopened.epoch };
    lab.sessions.close(close).await.expect("closed");
    lab.volumes.delete(pb::DeleteVolumeRequest { name: "a".into() }).await.expect("deleted");
    for (id, port) in [(1, 7001), (2, 7002), (3, 7003)] {
        let reply = lab.heartbeat(id, port, Vec::new()).await;
        assert_eq!(reply.reclaims.len(), 1, "for the copyset of the segment that it leads");
        let routes = lab.cluster.routes(pb::RoutesRequest::default()).await.expect("routes").into_inner();
        let done = routes.routes.iter().filter(|route| route.leader == id).map(|route| pb::CopysetReport {
            reclaimed_volumes: vec![volume],
            ..leads(route.copyset, 1, &route.members)
        });
        let reply = lab.heartbeat(id, port, done.collect()).await;
        assert_eq!(reply.reclaims, []);
    }
    lab.mds.shutdown().await;
}

#[tokio::test]
async fn a_wiped_chunkserver_is_replaced_by_its_successor() {
    let dir = tempfile::tempdir().expect("directory");
    let mut lab = Lab::start(config(dir.path())).await;
    lab.lead_all().await;
    assert_eq!(lab.register("store3-formatted-anew", 7003, "z3").await, 4);
    assert_eq!(lab.try_heartbeat(3, 7003, Vec::new()).await, Err(Code::FailedPrecondition));
    let start = Instant::now();
    let replaced = loop {
        let reply = lab.heartbeat(1, 7001, Vec::new()).await;
        if let Some(operator) = reply.operators.first() {
            assert!(
                !reply.chunkservers.iter().any(|server| server.id == 3),
                "nobody must ask for the old id"
            );
            break *operator;
        }
        assert!(start.elapsed() < LIMIT, "no replacement was planned");
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    assert_eq!(replaced.change, Some(pb::operator::Change::Replace(pb::ReplacePeer { add: 4, remove: 3 })));
    let newcomer = lab.heartbeat(4, 7003, Vec::new()).await;
    assert!(newcomer.assignments.iter().any(|a| a.id == replaced.copyset && !a.bootstrap));
    lab.heartbeat(1, 7001, vec![leads(replaced.copyset, 2, &[1, 2, 4])]).await;
    let routes = lab.cluster.routes(pb::RoutesRequest { copysets: vec![replaced.copyset] }).await;
    assert_eq!(routes.expect("routes").into_inner().routes[0].members, [1, 2, 4]);
    lab.mds.shutdown().await;
}

#[tokio::test]
async fn a_restart_keeps_everything_and_grants_a_lease_of_grace() {
    let dir = tempfile::tempdir().expect("directory");
    let long = Config { lease: Duration::from_secs(600), ..config(dir.path()) };
    let mut lab = Lab::start(long.clone()).await;
    lab.lead_all().await;
    let volume = lab.create("a", GIB).await.expect("created").id;
    let epoch = lab.open("a", "g1", false).await.expect("opened").epoch;
    let copysets = lab.allocate(volume, epoch, 0).await.expect("allocated");
    let cluster = lab.cluster.status(pb::StatusRequest {}).await.expect("status").into_inner().cluster_id;
    assert_eq!(cluster.len(), 32);
    lab.mds.shutdown().await;
    let mut lab = Lab::start(long).await;
    let status = lab.cluster.status(pb::StatusRequest {}).await.expect("status").into_inner();
    assert_eq!((status.cluster_id, status.copysets.len(), status.volumes), (cluster, 12, 1));
    assert_eq!(lab.open("a", "g2", false).await, Err(Code::FailedPrecondition), "grace");
    assert!(!lab.renew("g1", volume, epoch).await.lost, "the session outlives the restart");
    assert_eq!(lab.allocate(volume, epoch, 0).await, Ok(copysets));
    let reply = lab.heartbeat(2, 7002, Vec::new()).await;
    assert_eq!(reply.assignments.len(), 12);
    assert!(reply.assignments.iter().all(|assignment| !assignment.bootstrap), "never bootstrapped again");
    lab.mds.shutdown().await;
}

#[tokio::test]
async fn a_lost_log_is_not_papered_over() {
    let dir = tempfile::tempdir().expect("directory");
    Lab::start(config(dir.path())).await.mds.shutdown().await;
    std::fs::remove_dir_all(dir.path().join("raft")).expect("removed");
    let refused = Mds::start(config(dir.path()), &mut Registry::default()).await;
    let error = refused.err().expect("refused").to_string();
    assert!(error.contains("raft log is missing"), "{error}");
}
