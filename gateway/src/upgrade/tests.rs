//! Tests of a whole upgrade within one process: the real old side and the real new side at the two ends of a channel, over
//! engines that only remember what they were told.

mod reopening;

use super::channel::Channel;
use super::hand_over::{Phase, Why};
use super::message::{Message, SessionState};
use super::version::VersionRange;
use super::{HandOver, Launch, Passing, Predecessor, Reopening};
use crate::buffer::BufferPool;
use crate::config::Config;
use crate::engine::{
    Engine, EngineAnswer, EngineTraits, Legacy, OpenError, Opener, Passed, Standing, Wanted,
};
use crate::link::{LaneThreads, Links};
use crate::listener::Listener;
use crate::metrics::Metrics;
use crate::registry::{Registry, SessionLimits};
use crate::session::Caller;
use bytes::Bytes;
use futures_util::future::{BoxFuture, FutureExt};
use spline_link::{Identity, InstanceId};
use spline_types::{BlockRequest, BlockSize, Epoch, Fault, Geometry, OnUnavailable, VolumeName};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// What engines were told, in order.
type Log = Arc<Mutex<Vec<String>>>;

struct Remembering {
    name: VolumeName,
    epoch: u64,
    releases: bool,
    log: Log,
}

impl Remembering {
    fn told(&self, what: &str) {
        self.log
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(format!("{what} {}@{}", self.name, self.epoch));
    }
}

impl Engine for Remembering {
    fn name(&self) -> &'static str {
        "remembering"
    }
    fn geometry(&self) -> Geometry {
        Geometry { size: 1 << 20, block_size: BlockSize::B512 }
    }
    fn traits(&self) -> EngineTraits {
        EngineTraits {
            volatile_cache: false,
            read_only: false,
            fast_zero: false,
            rotational: false,
            identity: Identity::new(0, 7).expect("an identity"),
            epoch: Epoch::new(self.epoch),
            run_since: Epoch::new(self.epoch.min(1)),
            on_unavailable: OnUnavailable::Wait,
        }
    }
    fn prove(&self, _: bool) -> BoxFuture<'_, Result<(), OpenError>> {
        std::future::ready(Ok(())).boxed()
    }
    fn standing(&self) -> watch::Receiver<Standing> {
        watch::Sender::new(Standing { size: 1 << 20, lost: false }).subscribe()
    }
    fn execute(&self, _: BlockRequest, _: Bytes) -> BoxFuture<'static, Result<EngineAnswer, Fault>> {
        std::future::ready(Ok(EngineAnswer::Done)).boxed()
    }
    fn close(&self) -> BoxFuture<'_, ()> {
        self.told("close");
        std::future::ready(()).boxed()
    }
    fn pass(&self) -> BoxFuture<'_, Result<Passed, OpenError>> {
        self.told("pass");
        let file = (self.epoch == 0).then(|| std::fs::File::open("/dev/null").expect("opens").into());
        std::future::ready(Ok(Passed { file })).boxed()
    }
    fn keep(&self) {
        self.told("keep");
    }
    fn leave(&self) {
        self.told("leave");
    }
    fn release(&self) -> BoxFuture<'_, bool> {
        self.told("release");
        std::future::ready(self.releases).boxed()
    }
}

/// Where the engines of one process come from.
struct Source {
    log: Log,
    /// Why volumes can not be taken over.
    refuses: Option<OpenError>,
    metadata: Arc<Metadata>,
}

/// The metadata server as opens meet it.
struct Metadata {
    /// It is away: nothing can be opened.
    away: AtomicBool,
    /// Another gateway has every volume.
    held: AtomicBool,
    /// One permit lets it answer one open; without one it hangs.
    answers: Semaphore,
    /// Opens that it was asked for.
    asked: watch::Sender<usize>,
}

impl Default for Metadata {
    fn default() -> Self {
        let (away, held) = (AtomicBool::default(), AtomicBool::default());
        Self { away, held, answers: Semaphore::new(1000), asked: watch::Sender::new(0) }
    }
}

impl Opener for Source {
    fn open<'a>(
        &'a self,
        name: &'a VolumeName,
        _: Wanted,
    ) -> BoxFuture<'a, Result<Arc<dyn Engine>, OpenError>> {
        async move {
            let Metadata { away, held, answers, asked } = &*self.metadata;
            asked.send_modify(|asked| *asked += 1);
            answers.acquire().await.expect("open").forget();
            if away.load(Ordering::Acquire) {
                return Err(OpenError::Unavailable("nobody answers".into()));
            }
            if held.load(Ordering::Acquire) {
                return Err(OpenError::Held("open on another gateway".into()));
            }
            let (name, log) = (name.clone(), Arc::clone(&self.log));
            let engine = Remembering { name, epoch: 9, releases: true, log };
            engine.told("open");
            Ok(Arc::new(engine) as Arc<dyn Engine>)
        }
        .boxed()
    }
    fn adopt<'a>(
        &'a self,
        name: &'a VolumeName,
        legacy: Legacy,
    ) -> BoxFuture<'a, Result<Arc<dyn Engine>, OpenError>> {
        if let Some(refused) = self.refuses.clone() {
            return std::future::ready(Err(refused)).boxed();
        }
        assert_eq!(legacy.passed.file.is_some(), legacy.epoch.get() == 0, "a file comes with its descriptor");
        let epoch = legacy.epoch.get();
        let epoch = if epoch == 0 { 0 } else { epoch + 1 };
        let engine = Remembering { name: name.clone(), epoch, releases: true, log: Arc::clone(&self.log) };
        engine.told("adopt");
        std::future::ready(Ok(Arc::new(engine) as Arc<dyn Engine>)).boxed()
    }
    fn stop(&self) {}
}

/// One process of a gateway.
struct Side {
    registry: Arc<Registry>,
    links: Arc<Links>,
    log: Log,
    metadata: Arc<Metadata>,
}

impl Side {
    fn new(refuses: Option<OpenError>) -> Self {
        let log = Log::default();
        let metrics = Arc::new(Metrics::new(&mut prometheus_client::registry::Registry::default()));
        let limits = SessionLimits { requests: 16, bytes: 1 << 20, grace: Duration::from_secs(600) };
        let metadata: Arc<Metadata> = Arc::default();
        let source = Source { log: Arc::clone(&log), refuses, metadata: Arc::clone(&metadata) };
        let registry =
            Arc::new(Registry::new(Box::new(source), limits, Arc::clone(&metrics), CancellationToken::new()));
        let links = Arc::new(Links {
            registry: Arc::clone(&registry),
            metrics,
            buffers: BufferPool::new(),
            drain_limit: Duration::from_secs(1),
            threads: LaneThreads::new(true),
        });
        Self { registry, links, log, metadata }
    }

    /// Serves a volume without links.
    async fn serve(&self, name: &str, epoch: u64, releases: bool) {
        let name: VolumeName = name.parse().expect("a name");
        let engine = Remembering { name: name.clone(), epoch, releases, log: Arc::clone(&self.log) };
        let reserved = self.registry.reserve(&name, Arc::new(engine)).await.expect("room");
        reserved.enter(&self.registry);
    }

    /// What engines were told since the last call.
    fn log(&self) -> Vec<String> {
        std::mem::take(&mut *self.log.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Epochs of the volumes that can be joined, by name.
    fn served(&self) -> Vec<(String, u64)> {
        let sessions = self.registry.sessions();
        let mut all: Vec<_> =
            sessions.iter().map(|it| (it.name.to_string(), it.engine.traits().epoch.get())).collect();
        all.sort();
        all
    }

    /// A link joins a volume; answers the epoch that it gets.
    async fn join(&self, name: &str) -> u64 {
        let (socket, _other) = std::os::unix::net::UnixStream::pair().expect("opens");
        let socket: Arc<OwnedFd> = Arc::new(socket.into());
        let caller = Caller { instance: InstanceId(1), socket: &socket, ring: false };
        let name = name.parse().expect("a name");
        let joined = self.registry.join(&name, Wanted::default(), caller).await.expect("joins");
        joined.session.engine.traits().epoch.get()
    }
}

/// When an upgrade that does not get on is given up: later than anything here takes.
fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

/// An old process and a new one.
struct Lab {
    old: Side,
    new: Side,
    hand_over: HandOver,
    config: Config,
    /// The old one's end of the channel; the new one's, until it is used.
    channel: Channel,
    socket: Option<OwnedFd>,
    _listener: Listener,
    _dir: tempfile::TempDir,
}

impl Lab {
    fn new(refuses: Option<OpenError>) -> Self {
        let dir = tempfile::tempdir().expect("temporary directory");
        let config = Config {
            id: "g".into(),
            link_socket: dir.path().join("g.sock"),
            admin_listen: None,
            mds: Vec::new(),
            ..Config::default()
        };
        let (old, new) = (Side::new(None), Side::new(refuses));
        let listener = Listener::bind(&config.link_socket).expect("binds");
        let (channel, socket) = Channel::pair().expect("opens");
        let links = listener.pass().expect("passes");
        let hand_over = HandOver {
            launch: Launch { binary: "/bin/true".into(), arguments: Vec::new() },
            id: "g".into(),
            link_socket: config.link_socket.display().to_string(),
            admin_listen: String::new(),
            metrics_listen: String::new(),
            passing: Passing { links, admin: None, metrics: None },
            registry: Arc::clone(&old.registry),
            metrics: Arc::clone(&old.links.metrics),
            upgrade_limit: Duration::from_secs(20),
            drain_limit: Duration::from_secs(1),
            leaving: CancellationToken::new(),
            committed: CancellationToken::new(),
            course: Arc::default(),
            outcome: watch::Sender::new(None),
            reopening: Reopening::new(Arc::clone(&old.links), TaskTracker::new(), CancellationToken::new()),
            one: tokio::sync::Mutex::default(),
            links: 0.into(),
        };
        Self { old, new, hand_over, config, channel, socket: Some(socket), _listener: listener, _dir: dir }
    }

    /// The new process from beginning to end; its refusal, if it refuses.
    async fn run_new(&self, socket: OwnedFd) -> anyhow::Result<()> {
        let successor = Predecessor::at(socket).channel()?;
        let (_sockets, entering) = successor.prepare(&self.config, &self.new.registry).await?;
        successor.enter(entering, &self.new.links, &TaskTracker::new()).await;
        Ok(())
    }

    /// The old one up to the commit.
    async fn make_ready(&self) -> Result<usize, (Phase, Why)> {
        self.hand_over.prove(&self.channel).await.map_err(|why| (Phase::Proof, why))?;
        let (offered, held) = self.hand_over.prepare(&self.channel, soon()).await?;
        let count = offered.len();
        // As if it were to be committed: nothing is given back.
        std::mem::forget((offered, held));
        Ok(count)
    }
}

#[tokio::test]
async fn sessions_go_over_and_are_never_closed() {
    let mut lab = Lab::new(None);
    lab.old.serve("disk", 4, true).await;
    lab.old.serve("file:/a", 0, true).await;
    let socket = lab.socket.take().expect("once");
    let old = async {
        lab.hand_over.prove(&lab.channel).await.expect("proves");
        let (offered, held) = lab.hand_over.prepare(&lab.channel, soon()).await.expect("prepares");
        assert_eq!(lab.new.served(), [], "nothing is served before the commit");
        lab.hand_over.decide(&lab.channel).expect("commits");
        let taken = lab.hand_over.commit(&lab.channel, &offered, 0).await.expect("commits");
        assert_eq!((taken.0, taken.1), (2, 0));
        std::mem::forget((offered, held));
    };
    let (ended, ()) = tokio::join!(lab.run_new(socket), old);
    ended.expect("takes over");
    let mut told = lab.old.log();
    told.sort();
    assert_eq!(
        told,
        [
            "leave disk@4",
            "leave file:/a@0",
            "pass disk@4",
            "pass file:/a@0",
            "release disk@4",
            "release file:/a@0"
        ]
    );
    assert_eq!(lab.new.served(), [("disk".to_owned(), 5), ("file:/a".to_owned(), 0)]);
    assert!(lab.hand_over.committed.is_cancelled(), "the old one accepts nothing more");
    assert_eq!(lab.new.join("disk").await, 5);
    // Whoever comes to the old one waits until it is gone.
    assert!(lab.old.join("disk").now_or_never().is_none());
    assert!(lab.old.join("another").now_or_never().is_none());
}

#[tokio::test]
async fn a_new_one_that_can_not_open_a_volume_is_refused_and_the_old_one_goes_on() {
    let mut lab = Lab::new(Some(OpenError::Unavailable("nobody answers".into())));
    lab.old.serve("disk", 4, true).await;
    lab.old.serve("file:/a", 0, true).await;
    let socket = lab.socket.take().expect("once");
    lab.old.metadata.away.store(true, Ordering::Release);
    let (ended, refused) = tokio::join!(lab.run_new(socket), lab.make_ready());
    assert!(format!("{:#}", ended.expect_err("refuses")).contains("nobody answers"));
    let (phase, why) = refused.expect_err("is given up");
    assert_eq!(phase, Phase::Preparation);
    assert!(why.to_string().contains("can not open a volume: volume="), "{why}");
    let mut told = lab.old.log();
    told.sort();
    // The file was only lent; the session of the cluster may have another epoch by now, of which nobody hears.
    assert_eq!(told, ["keep file:/a@0", "pass disk@4", "pass file:/a@0"]);
    assert_eq!((lab.old.join("disk").await, lab.old.join("file:/a").await), (4, 0), "served as before");
    assert!(lab.hand_over.run(Some("/bin/true".into())).now_or_never().is_none(), "waits for it");
    lab.old.metadata.away.store(false, Ordering::Release);
    lab.hand_over.reopening.ended().await;
    assert_eq!(lab.old.log(), ["open disk@9", "leave disk@4", "release disk@4"], "never closed");
    assert_eq!(lab.old.join("disk").await, 9);
    assert_eq!(lab.old.served(), [("disk".to_owned(), 9), ("file:/a".to_owned(), 0)]);
    assert!(!lab.hand_over.committed.is_cancelled());
}

#[tokio::test]
async fn a_volume_that_somebody_else_has_taken_does_not_stop_the_others() {
    let mut lab = Lab::new(Some(OpenError::Held("open on another gateway".into())));
    lab.old.serve("disk", 4, true).await;
    let socket = lab.socket.take().expect("once");
    let old = async {
        lab.hand_over.prove(&lab.channel).await.expect("proves");
        let (offered, held) = lab.hand_over.prepare(&lab.channel, soon()).await.expect("prepares");
        lab.hand_over.decide(&lab.channel).expect("commits");
        let taken = lab.hand_over.commit(&lab.channel, &offered, 0).await.expect("commits");
        assert_eq!(taken.0, 0, "none could be taken over");
        std::mem::forget((offered, held));
    };
    let (ended, ()) = tokio::join!(lab.run_new(socket), old);
    ended.expect("takes over");
    assert_eq!(lab.new.served(), []);
    assert_eq!(lab.new.join("disk").await, 9, "finds out by itself");
}

#[tokio::test]
async fn a_session_that_does_not_end_is_not_gone_on_with() {
    let mut lab = Lab::new(None);
    lab.old.serve("file:/a", 0, false).await;
    let socket = lab.socket.take().expect("once");
    let old = async {
        lab.hand_over.prove(&lab.channel).await.expect("proves");
        let (offered, held) = lab.hand_over.prepare(&lab.channel, soon()).await.expect("prepares");
        lab.hand_over.decide(&lab.channel).expect("commits");
        let taken = lab.hand_over.commit(&lab.channel, &offered, 0).await.expect("commits");
        assert_eq!(taken.0, 0);
        std::mem::forget((offered, held));
    };
    let (ended, ()) = tokio::join!(lab.run_new(socket), old);
    ended.expect("takes over");
    assert_eq!(lab.new.log(), ["adopt file:/a@0", "release file:/a@0"], "the lock is not given back");
    assert_eq!(lab.new.join("file:/a").await, 9, "is opened anew");
}

#[tokio::test]
async fn an_old_one_that_dies_half_way_leaves_the_rest_to_be_opened_anew() {
    let mut lab = Lab::new(None);
    let socket = lab.socket.take().expect("once");
    let (old, theirs) = (std::mem::replace(&mut lab.channel, Channel::pair().expect("opens").0), socket);
    let state = |number, name: &str| {
        let (name, epoch) = (name.parse().expect("a name"), Epoch::new(4));
        let identity = Identity::new(0, 7).expect("an identity");
        Message::Session(SessionState { number, name, epoch, identity, read_only: false, file: false })
    };
    let scripted = async {
        assert!(matches!(old.hear().await, Ok(Message::Hello { versions: VersionRange::OURS, .. })));
        let offer = super::message::Offer {
            version: 1,
            product: "0".into(),
            id: "g".into(),
            link_socket: lab.config.link_socket.display().to_string(),
            admin_listen: String::new(),
            metrics_listen: String::new(),
        };
        old.send(&Message::Offer(offer), &[]).await.expect("sends");
        assert!(matches!(old.hear().await, Ok(Message::Proven)));
        use std::os::fd::AsFd;
        let links = &lab.hand_over.passing.links;
        let log = std::io::stderr();
        let fds = [links.socket.as_fd(), links.lock.as_fd(), log.as_fd()];
        old.send(&Message::Sockets(super::message::Sockets::default()), &fds).await.expect("sends");
        for (number, name) in [(0, "a"), (1, "b")] {
            old.send(&state(number, name), &[]).await.expect("sends");
        }
        old.send(&Message::Prepare { sessions: 2 }, &[]).await.expect("sends");
        assert!(matches!(old.hear().await, Ok(Message::Prepared { sessions: 2 })));
        old.send(&Message::Commit, &[]).await.expect("sends");
        old.send(&Message::Yours { session: 1, stopped_ns: 0 }, &[]).await.expect("sends");
        // It is gone.
        drop(old);
    };
    let (ended, ()) = tokio::join!(lab.run_new(theirs), scripted);
    ended.expect("goes on by itself");
    assert_eq!(lab.new.served(), [("b".to_owned(), 5)]);
    assert_eq!((lab.new.join("a").await, lab.new.join("b").await), (9, 5));
}

#[tokio::test]
async fn another_gateways_config_is_refused_before_anything_is_touched() {
    let mut lab = Lab::new(None);
    lab.old.serve("disk", 4, true).await;
    lab.config.id = "another".into();
    let socket = lab.socket.take().expect("once");
    let (ended, refused) = tokio::join!(lab.run_new(socket), lab.make_ready());
    assert!(ended.is_err());
    let (phase, why) = refused.expect_err("is given up");
    assert_eq!(phase, Phase::Proof);
    assert!(why.to_string().contains("config has another id") && why.to_string().contains("old=g"), "{why}");
    assert_eq!(lab.old.log(), [] as [String; 0]);
    assert_eq!(lab.old.join("disk").await, 4, "served as before");
}

#[tokio::test]
async fn whoever_comes_meanwhile_waits_and_is_served_when_it_is_given_up() {
    let lab = Lab::new(None);
    lab.old.serve("disk", 4, true).await;
    let held = lab.old.registry.hold(soon()).await.expect("holds");
    let (mut open, mut fresh) = (Box::pin(lab.old.join("disk")), Box::pin(lab.old.join("fresh")));
    assert!((&mut open).now_or_never().is_none() && (&mut fresh).now_or_never().is_none());
    assert!(!lab.old.registry.sessions().is_empty(), "operators see it all the same");
    drop(held);
    assert_eq!((open.await, fresh.await), (4, 9));
}

#[tokio::test]
async fn a_volume_whose_opening_hangs_is_named() {
    let lab = Lab::new(None);
    lab.old.serve("disk", 4, true).await;
    lab.old.serve("stuck", 4, true).await;
    let sessions = lab.old.registry.sessions();
    let stuck = sessions.iter().find(|session| session.name.to_string() == "stuck").expect("is served");
    let busy = lab.old.registry.hold_one(stuck).await.expect("is served");
    {
        let mut held = std::pin::pin!(lab.old.registry.hold(soon()));
        assert!((&mut held).now_or_never().is_none(), "waits for it");
        let listed = lab.old.registry.listed();
        assert_eq!((listed.sessions.len(), listed.busy), (1, vec!["stuck".parse().expect("a name")]));
    }
    let refused =
        lab.hand_over.prepare(&lab.channel, Instant::now()).await.map(drop).expect_err("is given up");
    assert!(refused.1.to_string().contains("volume=stuck"), "{}", refused.1);
    drop(busy);
    assert_eq!((lab.old.join("disk").await, lab.old.join("stuck").await), (4, 4), "served as before");
}

#[tokio::test]
async fn a_new_one_that_dies_before_it_hears_of_the_commit_leaves_the_old_one_serving() {
    let mut lab = Lab::new(None);
    lab.old.serve("disk", 4, true).await;
    let socket = lab.socket.take().expect("once");
    let made_ready = async {
        lab.hand_over.prove(&lab.channel).await.expect("proves");
        lab.hand_over.prepare(&lab.channel, soon()).await.expect("prepares")
    };
    let given = tokio::select! {
        given = made_ready => given,
        ended = lab.run_new(socket) => panic!("it waits to be told: {ended:?}"),
    };
    let why = lab.hand_over.decide(&lab.channel).expect_err("nobody hears it");
    assert!(why.to_string().contains("has ended"), "{why}");
    drop(given);
    assert!(!lab.hand_over.committed.is_cancelled());
    assert!(lab.hand_over.course.stops(), "a stop is this process's own");
}
