//! The old process's side of an upgrade.
//!
//! Called by the service. Knows: how a new process is started, what it is told, in which order sessions go over. Must not know:
//! what a link is made of, what an engine passes on. `bounded`: every wait for the other process has a limit.

mod error;

use super::channel::{Channel, ChannelError};
use super::child::Child;
use super::course::{Course, Outcome};
use super::launch::{self, Launch};
use super::links;
use super::message::{LEADERS_MAX, Message, Offer, SessionState, Sockets};
use super::monotonic_ns;
use super::reopening::Reopening;
use super::version::StateVersion;
use crate::engine::Passed;
use crate::link::ring::{Freeze, Frozen};
use crate::listener::PassedListener;
use crate::metrics::Metrics;
use crate::registry::{Held, HeldSession, Registry};
use crate::session::{Order, Session};
pub(crate) use error::{Phase, UpgradeError, Why};
use futures_util::stream::{self, StreamExt, TryStreamExt};
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::{Mutex, oneshot, watch};
use tokio::time::{timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

/// How long requests may run on that the new process can carry out instead: sending them again takes no longer.
const DRAIN_LIMIT: Duration = Duration::from_millis(50);
/// Sessions that go over at once: while one waits for its last requests, the others need not.
const PARALLEL: usize = 8;
/// What a link's end may take beyond the drain limit: a farewell and a few wakes.
pub(super) const LINK_END_MARGIN: Duration = Duration::from_secs(1);
/// Time for an engine to end what its links have given up; a disk that hangs takes longer.
const RELEASE_LIMIT: Duration = Duration::from_secs(5);
/// Time for the new process to say that it serves what it was given, once all of that has been sent. It takes milliseconds; while
/// a new process hangs, guests wait, and systemd can not start another one before this one ends.
const TAKEN_LIMIT: Duration = Duration::from_secs(5);

/// What can be passed on, and what is needed for it.
pub(crate) struct HandOver {
    pub(crate) launch: Launch,
    /// What the new process must be like; product and version are this build's.
    pub(crate) id: String,
    pub(crate) link_socket: String,
    pub(crate) admin_listen: String,
    pub(crate) metrics_listen: String,
    pub(crate) passing: Passing,
    pub(crate) registry: Arc<Registry>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) upgrade_limit: Duration,
    pub(crate) drain_limit: Duration,
    /// Cancelled when this process is to stop: an upgrade that is not committed yet is given up.
    pub(crate) leaving: CancellationToken,
    /// Cancelled at the commit: this process accepts nothing more.
    pub(crate) committed: CancellationToken,
    /// Whether that comes to pass, or this process stops first.
    pub(crate) course: Arc<Course>,
    /// What became of it: there is nothing left to do here.
    pub(crate) outcome: watch::Sender<Option<Outcome>>,
    /// Sessions of an upgrade that was given up.
    pub(crate) reopening: Reopening,
    pub(crate) one: Mutex<()>,
    /// Links that have gone over so far.
    pub(crate) links: AtomicU32,
}

/// What this process listens on.
pub(crate) struct Passing {
    pub(crate) links: PassedListener,
    pub(crate) admin: Option<OwnedFd>,
    pub(crate) metrics: Option<OwnedFd>,
}

/// What came of an upgrade.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Upgraded {
    /// Version of the new process.
    pub(crate) product: String,
    pub(crate) pid: u32,
    pub(crate) sessions: u32,
    /// Links that go on as they were.
    pub(crate) links: u32,
    /// Longest time for which none of the two has taken a request from one of them.
    pub(crate) pause: Duration,
    /// From the command to the end of this process's work.
    pub(crate) took: Duration,
}

/// A session that the new process may go on with.
pub(super) struct Offered {
    number: u32,
    held: HeldSession,
    passed: Passed,
}

impl HandOver {
    /// Replaces this process by one of `binary`, or of the one that it was started by itself.
    ///
    /// # Errors
    /// Why this process goes on serving; or, [broken](UpgradeError::Broken), why neither can.
    pub(crate) async fn run(&self, binary: Option<PathBuf>) -> Result<Upgraded, UpgradeError> {
        let one = self.one.try_lock().ok().filter(|_| self.outcome.borrow().is_none());
        let Some(_one) = one else { return Err(self.refused(UpgradeError::Busy)) };
        let binary = self.may_begin(binary).await.map_err(|error| self.refused(error))?;
        info!(binary = %binary.display(), "upgrade begins");
        let result = self.replace(&binary, Instant::now() + self.upgrade_limit).await;
        match &result {
            Ok(upgraded) => {
                self.metrics.upgrade_ended("done");
                info!(?upgraded, "the new process serves");
                self.outcome.send_replace(Some(Outcome::Replaced { pid: upgraded.pid }));
            }
            Err(broken @ UpgradeError::Broken { .. }) => {
                self.metrics.upgrade_ended("broken");
                error!(error = %broken, "upgrade has failed half way, this process ends; it must be started again");
                self.outcome.send_replace(Some(Outcome::Broken));
            }
            Err(failed) => {
                self.metrics.upgrade_ended("failed");
                warn!(error = %failed, "upgrade is given up, this process goes on serving");
            }
        }
        result
    }

    fn refused(&self, error: UpgradeError) -> UpgradeError {
        self.metrics.upgrade_ended("refused");
        warn!(%error, "upgrade is refused");
        error
    }

    /// The binary to start, once the sessions of the last upgrade are as they were.
    async fn may_begin(&self, binary: Option<PathBuf>) -> Result<PathBuf, UpgradeError> {
        timeout(self.upgrade_limit, self.reopening.ended()).await.map_err(|_| UpgradeError::Reopening)?;
        let Some(binary) = binary else { return Ok(self.launch.binary.clone()) };
        launch::check(&binary).map_err(UpgradeError::Binary)?;
        Ok(binary)
    }

    /// Starts the new process, which has to be ready `until` then.
    async fn replace(&self, binary: &Path, until: Instant) -> Result<Upgraded, UpgradeError> {
        let begun = Instant::now();
        let not_started = |error| UpgradeError::Start { binary: binary.to_owned(), error };
        let (channel, theirs) = Channel::pair().map_err(not_started)?;
        let mut child = Child::start(binary, &self.launch, theirs).map_err(not_started)?;
        let made_ready = async {
            let product = self.within(Phase::Proof, until, self.prove(&channel)).await?;
            Ok((product, self.prepare(&channel, until).await?))
        };
        let (product, given) = match made_ready.await {
            Ok(made_ready) => made_ready,
            Err((phase, why)) => {
                let said = child.end().await;
                return Err(UpgradeError::Failed { phase, why, binary: binary.to_owned(), said });
            }
        };
        if let Err(why) = self.decide(&channel) {
            self.take_back(given.0, given.1, true);
            let (phase, said) = (Phase::Preparation, child.end().await);
            return Err(UpgradeError::Failed { phase, why, binary: binary.to_owned(), said });
        }
        // Whatever happens now, this process does not have its sessions back: nobody may come to their slots any more.
        let given = ManuallyDrop::new(given);
        let pid = child.id();
        match self.commit(&channel, &given.0, pid).await {
            Ok((sessions, links, pause)) => {
                child.release();
                Ok(Upgraded { product, pid, sessions, links, pause, took: begun.elapsed() })
            }
            Err(error) => {
                let why = error.to_string();
                Err(UpgradeError::Broken { why, said: child.end().await })
            }
        }
    }

    /// Carries out a phase that can be given up: in time, and only while this process is not told to stop.
    async fn within<T>(
        &self,
        phase: Phase,
        until: Instant,
        work: impl Future<Output = Result<T, Why>>,
    ) -> Result<T, (Phase, Why)> {
        let done = tokio::select! {
            biased;
            done = timeout_at(until.into(), work) => done,
            () = self.leaving.cancelled() => return Err((phase, Why::Stopped)),
        };
        match done {
            Ok(done) => done.map_err(|why| (phase, why)),
            Err(_) => Err((phase, Why::Slow(self.upgrade_limit))),
        }
    }

    /// Versions, config, metadata server; answers the new process's version.
    pub(super) async fn prove(&self, channel: &Channel) -> Result<String, Why> {
        let (versions, product) = match heard(channel, "hello").await? {
            Message::Hello { versions, product } => (versions, product),
            came => return Err(unexpected("hello", &came)),
        };
        let version = match StateVersion::choose(versions) {
            Ok(version) => version,
            Err(unknown) => {
                let reason = unknown.to_string();
                // It is killed, whether it hears that or not.
                let _ = channel.send(&Message::Refused { reason: reason.clone() }, &[]).await;
                return Err(Why::Unfit(reason));
            }
        };
        let offer = Offer {
            version: version as u16,
            product: spline_process::VERSION.to_owned(),
            id: self.id.clone(),
            link_socket: self.link_socket.clone(),
            admin_listen: self.admin_listen.clone(),
            metrics_listen: self.metrics_listen.clone(),
        };
        channel.send(&Message::Offer(offer), &[]).await?;
        match heard(channel, "proven").await? {
            Message::Proven => Ok(product),
            came => Err(unexpected("proven", &came)),
        }
    }

    /// Sockets and sessions; afterwards the new process could serve. If it could not, the sessions are served on, and opened anew.
    pub(super) async fn prepare(
        &self,
        channel: &Channel,
        until: Instant,
    ) -> Result<(Vec<Offered>, Held), (Phase, Why)> {
        let held = async { self.registry.hold(until).await.map_err(Why::Held) };
        // Its own end is looked at first, and names the volume.
        let mut held = self.within(Phase::Preparation, until, held).await?;
        let mut offered = Vec::new();
        let mut opening = false;
        let made_ready = self.within(Phase::Preparation, until, async {
            offer(&mut held, &mut offered).await?;
            self.describe(channel, &offered).await?;
            // From here on any of them may have been opened by the other process, or may be yet: a call of one that is killed
            // can still be on its way.
            opening = true;
            channel.send(&Message::Prepare { sessions: offered.len() as u32 }, &[]).await?;
            match heard(channel, "prepared").await? {
                Message::Prepared { .. } => Ok(()),
                came => Err(unexpected("prepared", &came)),
            }
        });
        match made_ready.await {
            Ok(()) => Ok((offered, held)),
            Err(failed) => {
                self.take_back(offered, held, opening);
                Err(failed)
            }
        }
    }

    async fn describe(&self, channel: &Channel, offered: &[Offered]) -> Result<(), Why> {
        let Passing { links, admin, metrics } = &self.passing;
        let log = std::io::stderr();
        let mut fds: Vec<BorrowedFd<'_>> = vec![links.socket.as_fd(), links.lock.as_fd(), log.as_fd()];
        fds.extend(admin.iter().chain(metrics).map(AsFd::as_fd));
        let sockets =
            Sockets { is_systemds: links.is_systemds, admin: admin.is_some(), metrics: metrics.is_some() };
        channel.send(&Message::Sockets(sockets), &fds).await?;
        channel.send(&Message::Leaders(self.registry.engines().leaders(LEADERS_MAX)), &[]).await?;
        for Offered { number, held, passed } in offered {
            let traits = held.session.engine.traits();
            let state = SessionState {
                number: *number,
                name: held.session.name.clone(),
                epoch: traits.epoch,
                identity: traits.identity,
                read_only: traits.read_only,
                file: passed.file.is_some(),
            };
            let fds: Vec<BorrowedFd<'_>> = passed.file.iter().map(AsFd::as_fd).collect();
            channel.send(&Message::Session(state), &fds).await?;
        }
        Ok(())
    }

    /// Goes on with the sessions. With `opening`, those that have a number may have got another one: they are opened anew. A file
    /// has no number; its descriptor was only lent.
    fn take_back(&self, offered: Vec<Offered>, held: Held, opening: bool) {
        // They were not told to anybody.
        held.sessions.iter().for_each(|held| held.session.engine.keep());
        let mut over = Vec::new();
        for Offered { held, .. } in &offered {
            match opening && held.session.engine.traits().epoch.get() > 0 {
                true => over.push(Arc::clone(&held.session)),
                false => held.session.engine.keep(),
            }
        }
        // Before anybody has them again: one that ends now is in doubt too.
        self.reopening.begin(over);
        // Whoever waits for one of them has it as it is.
        drop((offered, held));
    }

    /// Tells the new process that it is to serve: from here on there is no way back.
    pub(super) fn decide(&self, channel: &Channel) -> Result<(), Why> {
        let told = self.course.goes_over(|| channel.send_now(&Message::Commit));
        match told {
            Ok(Some(())) => {
                self.committed.cancel();
                Ok(())
            }
            Ok(None) => Err(Why::Stopped),
            Err(ChannelError::Closed) => Err(Why::Ended("taken")),
            Err(error) => Err(error.into()),
        }
    }

    /// Gives everything away, session by session; answers how many sessions and links the new process goes on with, and after
    /// how long at most.
    pub(super) async fn commit(
        &self,
        channel: &Channel,
        offered: &[Offered],
        pid: u32,
    ) -> Result<(u32, u32, Duration), Why> {
        // Those that were not offered are lost or over: their links end by themselves, and find out anew.
        stream::iter(offered)
            .map(Ok::<_, ChannelError>)
            .try_for_each_concurrent(PARALLEL, |offered| self.pass(channel, offered))
            .await?;
        channel.send(&Message::Finish, &[]).await?;
        let taken = timeout(TAKEN_LIMIT, heard(channel, "taken")).await;
        let serves = match taken.map_err(|_| Why::Slow(TAKEN_LIMIT))?? {
            Message::Taken { sessions, links, pause_ns } => (sessions, links, Duration::from_nanos(pause_ns)),
            came => return Err(unexpected("taken", &came)),
        };
        spline_process::ready::name_main(pid);
        channel.send(&Message::Main, &[]).await?;
        Ok(serves)
    }

    /// Ends what runs of a session and gives it away, with those of its links that can go on as they are.
    async fn pass(&self, channel: &Channel, offered: &Offered) -> Result<(), ChannelError> {
        let session = &offered.held.session;
        let stopped_ns = monotonic_ns();
        let number = offered.number;
        let message = match stop(session, self.drain_limit).await {
            Some(frozen) => {
                for frozen in &frozen {
                    debug!(volume = %session.name, withdrawn = frozen.withdrawn, "link goes over");
                    let link = self.links.fetch_add(1, Ordering::Relaxed);
                    links::send(channel, number, link, frozen).await?;
                }
                Message::Yours { session: number, stopped_ns }
            }
            None => {
                warn!(volume = %session.name, links = session.links(), "requests do not end, the volume is opened anew");
                Message::Kept { session: number }
            }
        };
        channel.send(&message, &[]).await
    }
}

/// Ends what runs of a session, and gives nothing back; answers those of its links that can go on elsewhere as they are. `None` if
/// something may still run: then all of its links end.
pub(super) async fn stop(session: &Session, drain_limit: Duration) -> Option<Vec<Frozen>> {
    // From here on what can not be carried out is withdrawn.
    session.passing.store(true, Ordering::Release);
    session.engine.leave();
    let frozen = freeze(session, drain_limit.min(DRAIN_LIMIT)).await;
    session.leaving.cancel();
    let left = timeout(drain_limit + LINK_END_MARGIN, session.deserted()).await.is_ok();
    match timeout(RELEASE_LIMIT, session.engine.release()).await {
        Ok(true) if left => Some(frozen),
        _ => None,
    }
}

/// Stops all links at once; answers those that can go on elsewhere.
async fn freeze(session: &Session, drain_limit: Duration) -> Vec<Frozen> {
    // Those of files run to their end.
    let limit = LINK_END_MARGIN + RELEASE_LIMIT;
    let links = session.links_orders().into_iter().filter_map(|link| {
        let (reply, frozen) = oneshot::channel();
        link.send(Order::Freeze(Freeze { drain_limit, reply })).ok()?;
        Some(timeout(limit, frozen))
    });
    let stopped = futures_util::future::join_all(links).await;
    stopped.into_iter().filter_map(|frozen| frozen.ok()?.ok()).collect()
}

/// Makes every session that is served ready to go over.
async fn offer(held: &mut Held, offered: &mut Vec<Offered>) -> Result<(), Why> {
    let all = std::mem::take(&mut held.sessions);
    let (served, over): (Vec<_>, Vec<_>) =
        all.into_iter().partition(|held| !held.session.is_lost() && !held.session.leaving.is_cancelled());
    held.sessions = over;
    for (number, session) in (0..).zip(served) {
        offered.push(Offered { number, held: session, passed: Passed::default() });
    }
    let passes = offered.iter_mut().map(|offered| async {
        offered.passed =
            offered.held.session.engine.pass().await.map_err(|error| Why::Ours(error.to_string()))?;
        Ok::<(), Why>(())
    });
    futures_util::future::try_join_all(passes).await.map(drop)
}

/// What the new process says next, unless it refuses.
async fn heard(channel: &Channel, expected: &'static str) -> Result<Message, Why> {
    match channel.hear().await {
        Ok(Message::Refused { reason }) => Err(Why::Unfit(reason)),
        Ok(message) => Ok(message),
        Err(ChannelError::Closed) => Err(Why::Ended(expected)),
        Err(error) => Err(error.into()),
    }
}

fn unexpected(expected: &'static str, came: &Message) -> Why {
    ChannelError::Order { expected, came: came.name() }.into()
}
