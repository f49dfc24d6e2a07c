//! A machine with a real systemd: a Debian root in a container (systemd-nspawn), booted, rebooted, powered off by the test.
//!
//! Called by tests/e2e. Its file system is [`root`]'s, under an overlay of its own; its network is its own loopback. Commands run
//! by `nsenter`; its unix sockets are reached through `/proc`. Needs root. Nothing of it outlives the test, however that ends: mounts
//! and processes are in namespaces that end with the process that is started here, which is killed with the thread that started
//! it. Must never know: what is installed in it.

mod root;

use crate::tool;
use crate::wait_until;
use anyhow::{Context, bail, ensure};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// Longest boot or shutdown; a second on a machine that is not busy.
const LIFE_LIMIT: Duration = Duration::from_secs(90);
/// Longest time for what was killed to leave its control group.
const GROUP_LIMIT: Duration = Duration::from_secs(20);
/// Hierarchies of control groups in which the container gets a place of its own.
const HIERARCHIES: [&str; 3] = ["/sys/fs/cgroup/systemd", "/sys/fs/cgroup/unified", "/sys/fs/cgroup"];
/// Lines of the journal that are shown if a test fails.
const JOURNAL_LINES: &str = "200";
/// The hierarchy of memory, where it is one of its own.
const MEMORY_GROUPS: &str = "/sys/fs/cgroup/memory";
/// Bytes that are not enough for anything.
const STARVING: &str = "65536";
/// Puts itself into the groups in front of `--`, and becomes what is behind.
const IN_GROUPS: &str = r#"
for group; do
	shift
	[ "$group" = -- ] && break
	echo $$ >"$group/cgroup.procs"
done
exec "$@"
"#;
/// Runs within a mount namespace of its own: $1 the root, $2 the overlay's directory. nspawn leaves things in /run.
const IN_OWN_NAMESPACE: &str = r#"
mount -t tmpfs tmpfs /run
mount -t overlay overlay -o "lowerdir=$1,upperdir=$2/upper,workdir=$2/work" "$2/merged"
exec systemd-nspawn --quiet --directory="$2/merged" --machine=spline --register=no --keep-unit --private-network --boot \
	--console=read-only --system-call-filter="@aio landlock_create_ruleset landlock_add_rule landlock_restrict_self seccomp"
"#;

/// A machine; on while it is booted. Dropping it takes its power away.
#[derive(Debug)]
pub struct Machine {
    dir: tempfile::TempDir,
    base: PathBuf,
    groups: Vec<PathBuf>,
    running: Option<Running>,
    finished: bool,
}

#[derive(Debug)]
struct Running {
    container: Child,
    /// Process id of the container's systemd.
    leader: u32,
}

impl Machine {
    /// A new machine that is off.
    ///
    /// # Errors
    /// If its root can not be made.
    pub fn new() -> anyhow::Result<Self> {
        ensure!(
            rustix::process::geteuid().is_root(),
            "a machine with systemd needs root: run the tests as root"
        );
        let base = root::find()?;
        let dir = tempfile::Builder::new().prefix("spline-machine-").tempdir()?;
        for part in ["upper", "work", "merged"] {
            std::fs::create_dir(dir.path().join(part))?;
        }
        Ok(Self { dir, base, groups: Vec::new(), running: None, finished: false })
    }

    /// Where files of the machine are put before it is booted: a directory to be `DESTDIR`.
    pub fn files(&self) -> PathBuf {
        self.dir.path().join("upper")
    }

    /// Boots it, and waits until all that starts at boot has started or failed.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn boot(&mut self) -> anyhow::Result<()> {
        ensure!(self.running.is_none(), "it is booted");
        let console = File::options().create(true).append(true).open(self.dir.path().join("console"))?;
        let groups = self.groups()?;
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "sh", "-euc", IN_GROUPS, "sh"]).args(&groups);
        command.args([
            "--",
            "unshare",
            "--mount",
            "--propagation",
            "private",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
        ]);
        command.args(["sh", "-euc", IN_OWN_NAMESPACE, "sh"]).arg(&self.base).arg(self.dir.path());
        command.stdin(Stdio::null()).stdout(console.try_clone()?).stderr(console);
        let container = command.spawn()?;
        self.groups = groups;
        self.running = Some(Running { container, leader: 0 });
        let up = self.wait_until_up();
        up.with_context(|| format!("the machine does not boot:\n{}", self.console()))
    }

    fn wait_until_up(&mut self) -> anyhow::Result<()> {
        wait_until("systemd to be up", LIFE_LIMIT, || {
            let running = self.running.as_mut().context("it is off")?;
            let ended = running.container.try_wait()?;
            if let Some(status) = ended {
                bail!("the container has ended: {status}");
            }
            // unshare, nspawn, systemd.
            let nspawn = only_child(running.container.id())?;
            running.leader = only_child(nspawn)?;
            let state = self.command("systemctl").arg("is-system-running").output()?;
            let state = String::from_utf8_lossy(&state.stdout).trim().to_owned();
            Ok(matches!(state.as_str(), "running" | "degraded").then_some(()))
        })
    }

    /// Groups for the next container: it must not be in that of others.
    fn groups(&self) -> anyhow::Result<Vec<PathBuf>> {
        let name = self.dir.path().file_name().context("a directory's name")?;
        let mut groups: Vec<_> = HIERARCHIES.iter().map(Path::new).collect();
        groups.retain(|hierarchy| hierarchy.join("cgroup.procs").exists());
        let groups: Vec<_> = groups.into_iter().map(|hierarchy| hierarchy.join(name)).collect();
        for group in &groups {
            std::fs::create_dir(group).with_context(|| group.display().to_string())?;
        }
        Ok(groups)
    }

    /// A command that will run within the machine, as root.
    pub fn command(&self, program: &str) -> Command {
        let leader = self.running.as_ref().map_or(0, |running| running.leader);
        let mut command = Command::new("nsenter");
        let target = format!("--target={leader}");
        let spaces = ["--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--root", "--wd"];
        command.arg(target).args(spaces).args(["--", program]);
        command.env_clear().env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
        command.stdin(Stdio::null());
        command
    }

    /// Runs a command within the machine and answers what it printed.
    ///
    /// # Errors
    /// If it fails; the message holds all that it said.
    pub fn run(&self, program: &str, arguments: &[&str]) -> anyhow::Result<String> {
        tool::run(self.command(program).args(arguments))
    }

    /// Runs a command that must fail, and answers all that it said.
    ///
    /// # Errors
    /// If it succeeds.
    pub fn fails(&self, program: &str, arguments: &[&str]) -> anyhow::Result<String> {
        let output = self.command(program).args(arguments).output()?;
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        ensure!(!output.status.success(), "should have failed: {program} {arguments:?}\n{said}");
        Ok(said)
    }

    /// Runs `systemctl`.
    ///
    /// # Errors
    /// If it fails.
    pub fn systemctl(&self, arguments: &[&str]) -> anyhow::Result<String> {
        self.run("systemctl", arguments)
    }

    /// A property of a unit, as `systemctl show` prints it.
    ///
    /// # Errors
    /// If systemd does not answer.
    pub fn property(&self, unit: &str, name: &str) -> anyhow::Result<String> {
        let value = self.systemctl(&["show", "--value", "--property", name, unit])?;
        Ok(value.trim().to_owned())
    }

    /// Waits until a property of a unit has this value.
    ///
    /// # Errors
    /// If it does not get it within `limit`.
    pub fn wait_for(&self, unit: &str, name: &str, value: &str, limit: Duration) -> anyhow::Result<()> {
        wait_until(&format!("{unit} {name}={value}"), limit, || {
            let found = self.property(unit, name)?;
            ensure!(found == value, "unit={unit} {name}={found}");
            Ok(Some(()))
        })
    }

    /// Takes memory away from the main process of a service until the kernel kills it for want of memory, which happens when it
    /// next wants some. Where systemd rules memory by its own groups that is the service's, whose next process may be killed, too.
    ///
    /// # Errors
    /// If the kernel has no control group for memory, or the process lives on.
    pub fn starve(&mut self, service: &str) -> anyhow::Result<()> {
        let process = self.property(service, "MainPID")?;
        let apart = Path::new(MEMORY_GROUPS).join("memory.limit_in_bytes").exists();
        match apart {
            true => self.starve_process(&process)?,
            false => {
                self.systemctl(&["set-property", "--runtime", service, &format!("MemoryMax={STARVING}")])?;
            }
        }
        let killed = wait_until("the kernel to kill for want of memory", LIFE_LIMIT, || {
            Ok((self.property(service, "MainPID")? != process).then_some(()))
        });
        if !apart {
            self.systemctl(&["set-property", "--runtime", service, "MemoryMax=infinity"])?;
        }
        killed
    }

    fn starve_process(&mut self, process: &str) -> anyhow::Result<()> {
        let name = self.dir.path().file_name().context("a directory's name")?;
        let group = Path::new(MEMORY_GROUPS).join(name);
        if !group.exists() {
            std::fs::create_dir(&group)?;
            self.groups.push(group.clone());
        }
        std::fs::write(group.join("memory.limit_in_bytes"), STARVING)?;
        // Only the namespace of its processes: it has the number there that systemd says.
        let leader = self.running.as_ref().map_or(0, |running| running.leader);
        let mut command = Command::new("nsenter");
        command.arg(format!("--target={leader}")).args([
            "--pid",
            "--",
            "sh",
            "-ec",
            "echo $1 >$2",
            "sh",
            process,
        ]);
        tool::run(command.arg(group.join("cgroup.procs"))).map(drop)
    }

    /// A path of the machine as the test reaches it, sockets too; valid until the machine is off.
    pub fn path(&self, path: &str) -> PathBuf {
        let leader = self.running.as_ref().map_or(0, |running| running.leader);
        PathBuf::from(format!("/proc/{leader}/root{path}"))
    }

    /// The machine's journal of a unit, since boot.
    ///
    /// # Errors
    /// If it can not be read.
    pub fn journal(&self, unit: &str) -> anyhow::Result<String> {
        self.run("journalctl", &["--no-pager", "--output=short-monotonic", "--unit", unit])
    }

    /// Shuts it down as `systemctl poweroff` does, and waits until it is off.
    ///
    /// # Errors
    /// If it does not end.
    pub fn power_off(&mut self) -> anyhow::Result<()> {
        // nsenter may be killed by what it has asked for.
        let _ = self.command("systemctl").arg("poweroff").output();
        let mut running = self.running.take().context("it is off")?;
        let ended = wait_until("the machine to be off", LIFE_LIMIT, || Ok(running.container.try_wait()?));
        let killed = kill(&mut running.container);
        self.leave_groups();
        ended?;
        killed
    }

    /// Shuts it down and boots it again; what was written to its disk is still there.
    ///
    /// # Errors
    /// As [`Machine::power_off`] and [`Machine::boot`].
    pub fn reboot(&mut self) -> anyhow::Result<()> {
        self.power_off()?;
        self.boot()
    }

    /// The test has got what it wanted: a machine that is dropped without it shows its journal.
    pub fn finish(mut self) {
        self.finished = true;
    }

    fn console(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("console")).unwrap_or_default()
    }

    fn leave_groups(&mut self) {
        for group in self.groups.drain(..) {
            remove_group(&group);
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if !self.finished && self.running.is_some() {
            let journal = self.run("journalctl", &["--no-pager", "--lines", JOURNAL_LINES]);
            eprintln!("---- the machine ----\n{}\n", journal.unwrap_or_else(|_| self.console()));
        }
        if let Some(mut running) = self.running.take() {
            let _ = kill(&mut running.container);
        }
        self.leave_groups();
    }
}

fn only_child(id: u32) -> anyhow::Result<u32> {
    let children = std::fs::read_to_string(format!("/proc/{id}/task/{id}/children"))?;
    let [child] = children.split_whitespace().collect::<Vec<_>>()[..] else {
        bail!("not one child yet: children={children:?}")
    };
    Ok(child.parse()?)
}

/// Kills the container, and with it all that runs in it, and waits until it is gone.
fn kill(container: &mut Child) -> anyhow::Result<()> {
    container.kill()?;
    container.wait()?;
    Ok(())
}

/// Removes a group and those below it; what was killed a moment ago may still leave it.
fn remove_group(group: &Path) {
    let removed = wait_until("a control group to be empty", GROUP_LIMIT, || {
        remove_empty(group)?;
        Ok(Some(()))
    });
    if let Err(error) = removed {
        eprintln!("a control group stays behind: path={} {error:#}", group.display());
    }
}

fn remove_empty(group: &Path) -> std::io::Result<()> {
    for entry in std::fs::read_dir(group)? {
        let path = entry?.path();
        if path.is_dir() {
            remove_empty(&path)?;
        }
    }
    std::fs::remove_dir(group)
}
