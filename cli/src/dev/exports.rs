//! The nebd processes of `spline dev`: started, watched, started again if they die, kept if they outlived a crash.
//!
//! Called by `dev`. One thread owns all of them. Must not know what nebd does.

use crate::nebd::status;
use crate::nebd::{self, NebdSpec};
use anyhow::Context;
use std::process::Child;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How often the processes are looked at; a died one is back within this and its start.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Least time between two starts of one process, so that one that dies at once does not burn a core.
const RESTART_PAUSE: Duration = Duration::from_secs(1);
/// Time that a process gets to end by itself.
const STOP_LIMIT: Duration = Duration::from_secs(3);

/// The watched processes.
pub struct Exports {
    stop: Sender<()>,
    watcher: JoinHandle<()>,
}

/// One nebd process.
enum Process {
    /// Started by this process.
    Ours(Child),
    /// Left alive by an earlier one.
    Kept(u32),
}

impl Process {
    fn id(&self) -> u32 {
        match self {
            Self::Ours(child) => child.id(),
            Self::Kept(pid) => *pid,
        }
    }

    fn has_ended(&mut self) -> bool {
        match self {
            Self::Ours(child) => !matches!(child.try_wait(), Ok(None)),
            Self::Kept(pid) => !nebd::is_alive(*pid),
        }
    }
}

struct Export {
    spec: NebdSpec,
    process: Process,
    started: Instant,
}

impl Exports {
    /// Starts a process for each of `specs`, or keeps one that still serves it; answers when all serve.
    ///
    /// # Errors
    /// Why one does not serve within `limit`.
    pub fn start(specs: Vec<NebdSpec>, limit: Duration) -> anyhow::Result<Self> {
        let mut exports: Vec<Export> = Vec::new();
        for spec in specs {
            match Export::start(spec, limit) {
                Ok(export) => exports.push(export),
                Err(error) => {
                    exports.into_iter().for_each(Export::stop);
                    return Err(error);
                }
            }
        }
        let (stop, stopped) = mpsc::channel();
        let watcher = std::thread::Builder::new().name("exports".into()).spawn(move || {
            while let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(LOOK_EVERY) {
                exports.iter_mut().for_each(Export::look);
            }
            exports.into_iter().for_each(Export::stop);
        });
        Ok(Self { stop, watcher: watcher.context("can not start a thread")? })
    }

    /// Ends all processes.
    pub fn stop(self) {
        drop(self.stop);
        let _ = self.watcher.join();
    }
}

impl Export {
    fn start(spec: NebdSpec, limit: Duration) -> anyhow::Result<Self> {
        let socket = spec.listen.to_string();
        let found = status::read_all(&spec.runtime_dir, status::Kind::Nbd)?;
        let kept = found
            .iter()
            .find(|e| e.alive && e.volume == spec.volume && e.sockets.iter().any(|s| s.contains(&socket)));
        if let Some(kept) = kept
            && spec.probe(limit).is_ok()
        {
            tracing::info!(volume = spec.volume, pid = kept.pid, "kept the nebd process of an earlier start");
            return Ok(Self { process: Process::Kept(kept.pid), spec, started: Instant::now() });
        }
        let mut child = spec.spawn()?;
        if let Err(error) = spec.wait_until_serving(&mut child, limit) {
            let _ = child.kill();
            let _ = child.wait();
            return Err(error);
        }
        Ok(Self { process: Process::Ours(child), spec, started: Instant::now() })
    }

    /// Starts the process again if it has died.
    fn look(&mut self) {
        if !self.process.has_ended() || self.started.elapsed() < RESTART_PAUSE {
            return;
        }
        tracing::error!(volume = self.spec.volume, pid = self.process.id(), "nebd died, starting it again");
        self.started = Instant::now();
        match self.spec.spawn() {
            Ok(child) => self.process = Process::Ours(child),
            Err(error) => tracing::error!(error = format!("{error:#}"), "nebd can not be started"),
        }
    }

    fn stop(mut self) {
        if self.process.has_ended() {
            return;
        }
        let pid = self.process.id();
        if let Err(error) = nebd::stop(pid, STOP_LIMIT, || self.process.has_ended()) {
            tracing::warn!(pid, %error, "nebd could not be stopped");
        }
        if let Process::Ours(child) = &mut self.process {
            let _ = child.wait();
        }
    }
}
