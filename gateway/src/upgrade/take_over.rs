//! The new process's side of an upgrade.
//!
//! Called by the gateway's start. Until the old process commits, nothing here changes anything that it would notice: sockets
//! are only held, sessions opened under epochs of which no chunkserver hears, files not touched. Whatever fails is said, and
//! ends this process.

use super::channel::{Channel, ChannelError};
use super::links::{Arriving, nanoseconds};
use super::message::{Message, Offer, SessionState};
use super::version::{StateVersion, VersionRange};
use crate::config::Config;
use crate::engine::{Legacy, OpenError, Passed};
use crate::link::{self, Links};
use crate::listener::PassedListener;
use crate::metrics::Metrics;
use crate::registry::{Registry, Reserved};
use anyhow::{Context, bail, ensure};
use futures_util::stream::{self, StreamExt, TryStreamExt};
use spline_process::standard_streams;
use std::collections::HashMap;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, PoisonError};
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout_at};
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

/// Sessions that are opened at once: each costs the metadata server a log entry.
const PARALLEL: usize = 16;
/// Time for the threads of all links to begin with them, which takes milliseconds; the old process waits a few seconds.
const BEGIN_LIMIT: Duration = Duration::from_secs(1);
/// Sessions that are believed in: what a registry holds at most.
const SESSIONS_MAX: usize = 4096;

/// The process that this one is to take over from.
#[derive(Debug)]
pub struct Predecessor {
    socket: OwnedFd,
}

/// What the old process has listened on.
pub(crate) struct Sockets {
    pub(crate) links: PassedListener,
    pub(crate) admin: Option<TcpListener>,
    pub(crate) metrics: Option<TcpListener>,
    /// Where the old process's log goes.
    log: OwnedFd,
}

/// A session that can be served as soon as the old process lets go of it.
type Prepared = HashMap<u32, Reserved>;

impl Predecessor {
    /// The process that has started this one to take over from it, if one has.
    ///
    /// # Errors
    /// If the environment says so, but there is nobody.
    pub fn of_environment() -> anyhow::Result<Option<Self>> {
        let Some(value) = std::env::var_os(super::child::VARIABLE) else { return Ok(None) };
        ensure!(
            value == "0",
            "channel to the process before is not the standard input: {}={value:?}",
            super::child::VARIABLE
        );
        let socket = standard_streams::take_stdin().context("no descriptor left")?;
        Ok(Some(Self { socket }))
    }

    /// The process at the other end of a socket.
    #[cfg(test)]
    pub(super) const fn at(socket: OwnedFd) -> Self {
        Self { socket }
    }

    /// The channel to it. In a runtime.
    pub(crate) fn channel(self) -> anyhow::Result<Successor> {
        let channel =
            Channel::over(self.socket).context("standard input is no channel to another process")?;
        Ok(Successor { channel })
    }
}

/// This process, on its way into the old one's place.
pub(crate) struct Successor {
    channel: Channel,
}

impl Successor {
    /// Proves that this process can serve and makes everything ready; answers once the old process has committed.
    ///
    /// # Errors
    /// Why it can not; the old one was told.
    pub(crate) async fn prepare(
        &self,
        config: &Config,
        registry: &Arc<Registry>,
    ) -> anyhow::Result<(Sockets, Entering)> {
        let made_ready = self.make_ready(config, registry).await;
        if let Err(error) = &made_ready {
            let reason = format!("{error:#}");
            // It kills this process, whether it hears that or not.
            let _ = self.channel.send(&Message::Refused { reason }, &[]).await;
        }
        made_ready
    }

    async fn make_ready(
        &self,
        config: &Config,
        registry: &Arc<Registry>,
    ) -> anyhow::Result<(Sockets, Entering)> {
        let product = spline_process::VERSION.to_owned();
        self.channel.send(&Message::Hello { versions: VersionRange::OURS, product }, &[]).await?;
        let offer = match self.channel.hear().await? {
            Message::Offer(offer) => offer,
            Message::Refused { reason } => bail!("the process before refuses: {reason}"),
            came => bail!(unexpected("offer", &came)),
        };
        check(&offer, config)?;
        registry.engines().reach().await?;
        info!(version = %offer.product, "takes over from a process of this version");
        self.channel.send(&Message::Proven, &[]).await?;

        let (message, fds) = self.channel.receive().await?;
        let Message::Sockets(told) = message else { bail!(unexpected("sockets", &message)) };
        let sockets = Sockets::new(told, fds, &offer, config)?;
        let states = self.sessions(registry).await?;
        let (reserved, arriving) = (open(registry, states).await?, Arriving::default());
        let entering = Entering { reserved, arriving, beginning: Vec::new(), taken: Taken::default() };
        self.channel.send(&Message::Prepared { sessions: entering.reserved.len() as u32 }, &[]).await?;
        match self.channel.hear().await? {
            Message::Commit => Ok((sockets, entering)),
            came => bail!(unexpected("commit", &came)),
        }
    }

    /// What the old process tells of its sessions, up to the end.
    async fn sessions(&self, registry: &Registry) -> anyhow::Result<Vec<(SessionState, Passed)>> {
        let mut states = Vec::new();
        loop {
            let (message, mut fds) = self.channel.receive().await?;
            let count = fds.len();
            let fits = match &message {
                Message::Session(state) => count == usize::from(state.file),
                _ => count == 0,
            };
            ensure!(fits, ChannelError::Descriptors { message: message.name(), count });
            match message {
                Message::Leaders(leaders) => registry.engines().believe(&leaders),
                Message::Session(state) => states.push((state, Passed { file: fds.pop() })),
                Message::Prepare { sessions } => {
                    let count = states.len();
                    ensure!(sessions as usize == count, "sessions are missing: told={sessions} came={count}");
                    return Ok(states);
                }
                came => bail!(unexpected("session", &came)),
            }
            ensure!(states.len() <= SESSIONS_MAX, "too many sessions: limit={SESSIONS_MAX}");
        }
    }

    /// Serves each session as the old process lets go of it; answers when that has let go of all, or has ended. Links are
    /// accepted by now, and wait for their sessions.
    pub(crate) async fn enter(&self, mut entering: Entering, links: &Arc<Links>, tasks: &TaskTracker) {
        if let Err(error) = self.enter_all(&mut entering, links, tasks).await {
            warn!(%error, "the process before has ended in the middle of the upgrade; this one goes on by itself");
        }
        // What it has not let go of may still be under way there, or in the kernel: it is opened anew, fenced or locked.
        for (_, reserved) in entering.reserved.drain() {
            reserved.give_up(&links.registry).await;
        }
        let Taken { sessions, links, pause } = entering.taken(&links.metrics).await;
        info!(sessions, links, ?pause, "has taken over");
    }

    async fn enter_all(
        &self,
        entering: &mut Entering,
        links: &Arc<Links>,
        tasks: &TaskTracker,
    ) -> Result<(), ChannelError> {
        loop {
            let (message, fds) = self.channel.receive().await?;
            match message {
                Message::Link(state) => entering.arriving.link(state, fds),
                Message::Regions { link, regions } => entering.arriving.regions(link, &regions, fds),
                Message::Yours { session, stopped_ns } => entering.go_on(session, stopped_ns, links, tasks),
                Message::Kept { session } => {
                    if let Some(reserved) = entering.reserved.remove(&session) {
                        warn!(volume = %reserved.session.name, "session is not taken over, it is opened anew");
                        reserved.give_up(&links.registry).await;
                    }
                }
                Message::Finish => {
                    let Taken { sessions, links, pause } = entering.taken(&links.metrics).await;
                    let pause_ns = nanoseconds(pause);
                    self.channel.send(&Message::Taken { sessions, links, pause_ns }, &[]).await?;
                }
                Message::Main => return Ok(()),
                came => return Err(unexpected("yours", &came)),
            }
        }
    }
}

/// What this process goes on with.
#[derive(Clone, Copy, Default)]
struct Taken {
    sessions: u32,
    links: u32,
    /// Longest time for which nobody took requests of a link.
    pause: Duration,
}

/// The sessions that wait for the old process.
pub(crate) struct Entering {
    reserved: Prepared,
    arriving: Arriving,
    /// Links that have not been heard of yet.
    beginning: Vec<oneshot::Receiver<Duration>>,
    taken: Taken,
}

impl Entering {
    /// Serves a session and goes on with its links.
    fn go_on(&mut self, number: u32, stopped_ns: u64, links: &Arc<Links>, tasks: &TaskTracker) {
        let frozen = self.arriving.take(number);
        let Some(reserved) = self.reserved.remove(&number) else { return };
        if frozen.is_empty() {
            *reserved.session.paused.lock().unwrap_or_else(PoisonError::into_inner) = Some(stopped_ns);
        }
        let session = reserved.enter(&links.registry);
        links.metrics.sessions_taken_over.inc();
        self.taken.sessions += 1;
        for frozen in frozen {
            let (begun, heard) = oneshot::channel();
            self.beginning.push(heard);
            tasks.spawn(link::go_on(frozen, Arc::clone(&session), Arc::clone(links), begun));
        }
    }

    /// What is gone on with by now, once every link has begun or failed.
    async fn taken(&mut self, metrics: &Metrics) -> Taken {
        let until = Instant::now() + BEGIN_LIMIT;
        for heard in self.beginning.drain(..) {
            // One that has begun is heard, however late.
            if let Ok(Ok(pause)) = timeout_at(until, heard).await {
                metrics.upgrade_pause.observe(pause.as_secs_f64());
                metrics.links_taken_over.inc();
                self.taken.links += 1;
                self.taken.pause = self.taken.pause.max(pause);
            }
        }
        self.taken
    }
}

impl Sockets {
    fn new(
        told: super::message::Sockets,
        fds: Vec<OwnedFd>,
        offer: &Offer,
        config: &Config,
    ) -> anyhow::Result<Self> {
        let count = fds.len();
        let missing = || ChannelError::Descriptors { message: "sockets", count };
        let expected = 3 + usize::from(told.admin) + usize::from(told.metrics);
        ensure!(count == expected, missing());
        let mut fds = fds.into_iter();
        let mut next = || fds.next().ok_or_else(missing);
        let (socket, lock, log) = (next()?, next()?, next()?);
        let links = PassedListener { socket, lock, is_systemds: told.is_systemds };
        let admin = if told.admin { Some(next()?) } else { None };
        let metrics = if told.metrics { Some(next()?) } else { None };
        let admin = listener(admin, &offer.admin_listen, config.admin_listen, "admin_listen")?;
        let metrics = listener(metrics, &offer.metrics_listen, config.metrics_listen, "metrics_listen")?;
        Ok(Self { links, admin, metrics, log })
    }

    /// Logs where the old process did: what it has read of us so far it reads no more.
    pub(crate) fn take_log(&self) {
        if let Err(error) = standard_streams::replace_stderr(self.log.as_fd()) {
            warn!(%error, "log of the process before can not be taken over");
        }
    }
}

/// The socket that was passed on, if the config asks for the same; else one that it asks for.
fn listener(
    passed: Option<OwnedFd>,
    offered: &str,
    wanted: Option<SocketAddr>,
    key: &str,
) -> anyhow::Result<Option<TcpListener>> {
    let Some(wanted) = wanted else { return Ok(None) };
    match passed {
        Some(passed) if offered == wanted.to_string() => Ok(Some(TcpListener::from(passed))),
        _ => TcpListener::bind(wanted).map(Some).with_context(|| format!("can not listen: {key}={wanted}")),
    }
}

/// Refused if this process is another gateway than the old one, or speaks otherwise.
fn check(offer: &Offer, config: &Config) -> anyhow::Result<()> {
    StateVersion::from_raw(offer.version)?;
    let (id, link_socket) = (config.effective_id(), config.link_socket.display().to_string());
    let same = |key: &str, old: &str, new: &str| {
        ensure!(old == new, "config has another {key}, which takes a restart: {key}={new} old={old}");
        Ok(())
    };
    same("id", &offer.id, &id)?;
    same("link_socket", &offer.link_socket, &link_socket)
}

/// Opens every session anew. One that somebody else has taken meanwhile is left out: its links find out by themselves.
async fn open(registry: &Arc<Registry>, states: Vec<(SessionState, Passed)>) -> anyhow::Result<Prepared> {
    let opened: Vec<Option<(u32, Reserved)>> = stream::iter(states)
        .map(|(state, passed)| async move {
            let SessionState { number, name, epoch, identity, read_only, .. } = state;
            let legacy = Legacy { epoch, identity, read_only, passed };
            match registry.engines().adopt(&name, legacy).await {
                Ok(engine) => Ok(Some((number, registry.reserve(&name, engine).await?))),
                Err(error @ OpenError::Held(_)) => {
                    warn!(volume = %name, %error, "session is lost, it is not taken over");
                    Ok(None)
                }
                Err(error) => {
                    Err(anyhow::Error::new(error).context(format!("can not open a volume: volume={name}")))
                }
            }
        })
        .buffer_unordered(PARALLEL)
        .try_collect()
        .await?;
    Ok(opened.into_iter().flatten().collect())
}

fn unexpected(expected: &'static str, came: &Message) -> ChannelError {
    ChannelError::Order { expected, came: came.name() }
}
