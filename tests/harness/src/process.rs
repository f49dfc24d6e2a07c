//! One process under test: started, killed, stopped, continued, restarted; its log kept.

use anyhow::{Context, bail};
use rustix::io::Errno;
use rustix::process::{
    Pid, PidfdFlags, PidfdGetfdFlags, Signal, WaitOptions, getpid, kill_process, pidfd_getfd, pidfd_open,
    set_child_subreaper, waitpid,
};
use std::ffi::OsString;
use std::fs::File;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

/// Lines of a log that are shown when a test fails.
const LOG_TAIL_LINES: usize = 40;

/// Time for a signal to reach every thread of a process, on a machine that is busy.
const STOP_LIMIT: Duration = Duration::from_secs(20);

/// A process that can be started again and again with the same arguments. Dropping it kills it.
#[derive(Debug)]
pub struct Process {
    name: String,
    binary: PathBuf,
    arguments: Vec<OsString>,
    log: PathBuf,
    running: Option<Running>,
}

/// What runs.
#[derive(Debug)]
enum Running {
    /// What was started here.
    Child(Child),
    /// A descendant that has taken its place.
    Follower(Pid),
}

impl Running {
    fn id(&self) -> u32 {
        match self {
            Self::Child(child) => child.id(),
            Self::Follower(pid) => pid.as_raw_nonzero().get().unsigned_abs(),
        }
    }

    /// How it has ended, if it has.
    fn try_wait(&mut self) -> anyhow::Result<Option<ExitStatus>> {
        match self {
            Self::Child(child) => Ok(child.try_wait()?),
            Self::Follower(pid) => {
                let ended = waitpid(Some(*pid), WaitOptions::NOHANG)?;
                Ok(ended.map(|(_, status)| ExitStatus::from_raw(status.as_raw())))
            }
        }
    }
}

impl Process {
    /// A process that is not started yet; its output is appended to `<dir>/<name>.log`.
    pub fn new(name: &str, binary: PathBuf, arguments: Vec<OsString>, dir: &Path) -> Self {
        Self { name: name.to_owned(), binary, arguments, log: dir.join(format!("{name}.log")), running: None }
    }

    /// Adds arguments for the next starts.
    pub fn add_arguments(&mut self, arguments: &[&str]) {
        self.arguments.extend(arguments.iter().map(OsString::from));
    }

    /// Its name in logs and messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its process id, while it runs.
    pub fn id(&self) -> Option<u32> {
        self.running.as_ref().map(Running::id)
    }

    /// Starts it.
    ///
    /// # Errors
    /// If it runs already or can not be started.
    pub fn start(&mut self) -> anyhow::Result<()> {
        if self.is_running()? {
            bail!("runs already: process={}", self.name);
        }
        let log = File::options().create(true).append(true).open(&self.log)?;
        let mut command = Command::new(&self.binary);
        command.args(&self.arguments).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let child =
            command.spawn().with_context(|| format!("can not start: binary={}", self.binary.display()))?;
        self.running = Some(Running::Child(child));
        Ok(())
    }

    /// Makes the descendants of processes that end this process's children, which [`follow`](Self::follow) needs.
    ///
    /// # Errors
    /// Those of the system.
    pub fn adopt_orphans() -> anyhow::Result<()> {
        Ok(set_child_subreaper(Some(getpid()))?)
    }

    /// From now on this is the process with that id, which has taken its place; waits until the one before has ended.
    ///
    /// # Errors
    /// If it has not ended within `limit`, or with a failure.
    pub fn follow(&mut self, id: u32, limit: Duration) -> anyhow::Result<()> {
        let before = self.running.as_mut().with_context(|| format!("does not run: process={}", self.name))?;
        let status = crate::wait_until("the process that was replaced to end", limit, || before.try_wait())?;
        if !status.success() {
            bail!("process that was replaced failed: process={} {status}\n{}", self.name, self.log_tail());
        }
        let pid = i32::try_from(id).ok().and_then(Pid::from_raw).context("no such process id")?;
        self.running = Some(Running::Follower(pid));
        Ok(())
    }

    /// Whether it runs.
    ///
    /// # Errors
    /// Those of the system.
    pub fn is_running(&mut self) -> anyhow::Result<bool> {
        match &mut self.running {
            Some(running) => Ok(running.try_wait()?.is_none()),
            None => Ok(false),
        }
    }

    /// Fails if it does not run; shows the end of its log.
    ///
    /// # Errors
    /// That it has ended.
    pub fn assert_running(&mut self) -> anyhow::Result<()> {
        if !self.is_running()? {
            bail!("has ended: process={}\n{}", self.name, self.log_tail());
        }
        Ok(())
    }

    /// Kills it with SIGKILL and waits until it is gone.
    ///
    /// # Errors
    /// Those of the system.
    pub fn kill9(&mut self) -> anyhow::Result<()> {
        match self.running.take() {
            Some(Running::Child(mut child)) => {
                child.kill()?;
                child.wait()?;
            }
            // One that has ended and was waited for is nobody's any more.
            Some(Running::Follower(pid)) if kill_process(pid, Signal::KILL).is_ok() => {
                waitpid(Some(pid), WaitOptions::empty())?;
            }
            _ => {}
        }
        Ok(())
    }

    /// Kills and starts it.
    ///
    /// # Errors
    /// See [`Process::kill9`] and [`Process::start`].
    pub fn restart(&mut self) -> anyhow::Result<()> {
        self.kill9()?;
        self.start()
    }

    /// Stops it in its tracks (SIGSTOP); on return none of its threads runs any more.
    ///
    /// # Errors
    /// If it does not run.
    pub fn stop(&self) -> anyhow::Result<()> {
        self.signal(Signal::STOP)?;
        let id = self.id().context("does not run")?;
        // The signal is only on its way when the call returns.
        crate::wait_until("every thread to stop", STOP_LIMIT, || {
            for thread in std::fs::read_dir(format!("/proc/{id}/task"))? {
                let stat = std::fs::read_to_string(thread?.path().join("stat"))?;
                // "id (name) state …", and a name may hold anything.
                let state = stat.rsplit(") ").next().and_then(|rest| rest.chars().next());
                if state != Some('T') {
                    return Ok(None);
                }
            }
            Ok(Some(()))
        })
    }

    /// Lets it go on (SIGCONT).
    ///
    /// # Errors
    /// If it does not run.
    pub fn cont(&self) -> anyhow::Result<()> {
        self.signal(Signal::CONT)
    }

    /// Asks it to end (SIGTERM) and waits until it has.
    ///
    /// # Errors
    /// If it has not ended within `limit`.
    pub fn terminate(&mut self, limit: Duration) -> anyhow::Result<ExitStatus> {
        self.signal(Signal::TERM)?;
        let running = self.running.as_mut().context("does not run")?;
        let status = crate::wait_until("a process to end", limit, || running.try_wait())?;
        self.running = None;
        Ok(status)
    }

    /// Cuts the connections that it has accepted on the unix socket at `path`, as if either side had closed them: both are told.
    /// Also of one that is stopped. Answers how many there were.
    ///
    /// # Errors
    /// If it does not run, or the system keeps its descriptors from us.
    pub fn cut(&self, path: &Path) -> anyhow::Result<usize> {
        let id = self.id().with_context(|| format!("does not run: process={}", self.name))?;
        let pid = i32::try_from(id).ok().and_then(Pid::from_raw).context("no such process id")?;
        let process = pidfd_open(pid, PidfdFlags::empty())?;
        let mut cut = 0;
        for entry in std::fs::read_dir(format!("/proc/{id}/fd"))? {
            let entry = entry?;
            // What was closed meanwhile is not there any more.
            let Ok(target) = std::fs::read_link(entry.path()) else { continue };
            if !target.to_string_lossy().starts_with("socket:") {
                continue;
            }
            let number = entry.file_name().to_string_lossy().parse()?;
            let socket = match pidfd_getfd(&process, number, PidfdGetfdFlags::empty()) {
                Ok(socket) => UnixStream::from(socket),
                Err(Errno::BADF) => continue,
                Err(error) => return Err(error).context("a descriptor of another process"),
            };
            // A socket that listens has a name too, but no peer; those of another family have neither.
            let (Ok(local), Ok(_)) = (socket.local_addr(), socket.peer_addr()) else { continue };
            // It may have been bound under a longer name and renamed.
            let is_there = |name: &Path| name.to_string_lossy().starts_with(&*path.to_string_lossy());
            if local.as_pathname().is_some_and(is_there) {
                socket.shutdown(Shutdown::Both)?;
                cut += 1;
            }
        }
        Ok(cut)
    }

    fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        let pid = self.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        let pid = pid.with_context(|| format!("does not run: process={}", self.name))?;
        Ok(kill_process(pid, signal)?)
    }

    /// The end of its log.
    pub fn log_tail(&self) -> String {
        let text = std::fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(LOG_TAIL_LINES)..].join("\n")
    }

    /// Everything it has said.
    ///
    /// # Errors
    /// If the log can not be read.
    pub fn log(&self) -> anyhow::Result<String> {
        Ok(String::from_utf8_lossy(&std::fs::read(&self.log)?).into_owned())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("---- log of {} ----\n{}\n", self.name, self.log_tail());
        }
        let _ = self.kill9();
    }
}
