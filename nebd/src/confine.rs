//! What this process gives up once it has its sockets: its user, other files, other programs, most of the kernel.
//!
//! Called by `main` after [`crate::doors`] are taken and before any other thread starts: Landlock and seccomp bind the calling
//! thread and those that it starts. A guest that breaks nebd finds the descriptors that nebd has and little else. Must not
//! know: exports, links.
//!
//! Three layers, each for what the others can not do:
//! - [`user`]: becomes another user, for good. What the kernel allows that user is the outer bound.
//! - Landlock: no file can be reached, whatever the user may do. Left are connecting to a unix socket by its path (the gateway's,
//!   which a new gateway makes anew, so a descriptor kept from the start would not do; Landlock rules it from Linux 7.1 on) and
//!   removing files in the directories where this process has its own.
//! - [`seccomp`]: no file can be opened, where there is no Landlock either; no programs, no other processes, no sockets but unix
//!   ones, no new code, none of the kernel's larger doors.
//!
//! Landlock and seccomp are best effort: a kernel without them serves guests too, and says so in the log and in
//! `spline_nebd_confined`. What a process removes at its end is in directories that its user may not be allowed to write: then
//! sockets stay behind dead and status files empty, which readers pass over and the next start replaces.

pub mod seccomp;
pub mod user;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus, Scope,
};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use rustix::fs::Access as May;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use user::Account;

/// The newest of Landlock that this was tried with; what a kernel has beyond it is not asked for.
const LANDLOCK: ABI = ABI::V6;

/// Files that must be reached from inside: everything else is out of reach.
#[derive(Clone, Debug, Default)]
pub struct Reach {
    /// Removed at the end: sockets and status files.
    pub removed: Vec<PathBuf>,
    /// Renamed within its directory once, and removed at the end: the pid file.
    pub renamed: Option<PathBuf>,
}

/// What came of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Confinement {
    /// Another user, for good.
    pub user: bool,
    /// Files are out of reach: wholly, or as far as the kernel knows how.
    pub landlock: bool,
    /// System calls are refused.
    pub seccomp: bool,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Layer {
    by: &'static str,
}

impl Confinement {
    /// Shows it as `spline_nebd_confined`, 1 or 0 for each layer.
    pub fn register(self, registry: &mut Registry) {
        let layers = Family::<Layer, Gauge>::default();
        for (by, is) in [("user", self.user), ("landlock", self.landlock), ("seccomp", self.seccomp)] {
            layers.get_or_create(&Layer { by }).set(is.into());
        }
        registry.register("spline_nebd_confined", "1 for each layer that confines this process", layers);
    }
}

/// Becomes `user`, if there is one, and gives up what is not needed, if `confine`.
///
/// # Errors
/// If the user is not known or this process may not become it, or it could not carry out what is certain to come.
pub fn enter(user: Option<&str>, confine: bool, reach: &Reach) -> anyhow::Result<Confinement> {
    // Opened as who may: the user may not be allowed to look into a directory that it needs no more than to leave.
    let places = places(reach);
    let mut confinement = Confinement::default();
    if let Some(name) = user {
        let account = Account::find(name)?;
        account.own(&reach.removed)?;
        account.become_it()?;
        confinement.user = true;
        check_places(name, reach)?;
    }
    if confine {
        let restricted = restrict(&places)?;
        confinement = Confinement { user: confinement.user, ..restricted };
    }
    let Confinement { landlock, seccomp, .. } = confinement;
    match (confine, landlock && seccomp) {
        (false, _) => tracing::warn!(user, "not confined, as asked for"),
        (true, true) => tracing::info!(user, landlock, seccomp, "confined"),
        (true, false) => {
            tracing::info!(user, landlock, seccomp, "confined in part, this kernel does not offer the rest");
        }
    }
    Ok(confinement)
}

/// What may be done in each directory.
type Places = BTreeMap<PathBuf, (PathFd, BitFlags<AccessFs>)>;

fn places(reach: &Reach) -> Places {
    let removed = reach.removed.iter().map(|path| (path, AccessFs::RemoveFile.into()));
    let renamed = reach.renamed.iter().map(|path| (path, AccessFs::RemoveFile | AccessFs::MakeReg));
    let mut places = Places::new();
    for (path, rights) in removed.chain(renamed) {
        let dir = directory(path);
        match PathFd::new(dir) {
            Ok(opened) => {
                places.entry(dir.to_owned()).or_insert((opened, BitFlags::EMPTY)).1 |= rights;
            }
            // Then nothing can be removed there, and that is all.
            Err(error) => tracing::debug!(path = %dir.display(), %error, "directory is out of reach"),
        }
    }
    places
}

fn directory(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Says early what the new user can not do later.
fn check_places(user: &str, reach: &Reach) -> anyhow::Result<()> {
    let may_write = |path: &Path| rustix::fs::access(directory(path), May::WRITE_OK | May::EXEC_OK).is_ok();
    if let Some(path) = reach.renamed.as_deref().filter(|path| !may_write(path)) {
        anyhow::bail!("user may not write the pid file's directory: user={user} path={}", path.display());
    }
    if let Some(path) = reach.removed.iter().find(|path| !may_write(path)) {
        tracing::info!(user, path = %path.display(), "user may not remove this, it stays behind when the process ends");
    }
    Ok(())
}

/// Confines the calling thread and those that it will start.
///
/// # Errors
/// If privileges can not be renounced: every kernel since 3.5 can.
fn restrict(places: &Places) -> anyhow::Result<Confinement> {
    rustix::thread::set_no_new_privs(true)?;
    let landlock = shut_files(places).unwrap_or_else(|error| {
        tracing::warn!(%error, "landlock refuses, files are not out of reach");
        RulesetStatus::NotEnforced
    });
    let seccomp = seccomp::install();
    if let Err(error) = &seccomp {
        tracing::warn!(%error, "seccomp refuses, system calls are not limited");
    }
    Ok(Confinement {
        user: false,
        landlock: landlock != RulesetStatus::NotEnforced,
        seccomp: seccomp.is_ok(),
    })
}

fn shut_files(places: &Places) -> Result<RulesetStatus, landlock::RulesetError> {
    let mut ruleset = Ruleset::default()
        .handle_access(AccessFs::from_all(LANDLOCK))?
        .handle_access(AccessNet::from_all(LANDLOCK))?
        .scope(Scope::from_all(LANDLOCK))?
        .create()?;
    for (dir, rights) in places.values() {
        ruleset = ruleset.add_rule(PathBeneath::new(dir, *rights))?;
    }
    Ok(ruleset.restrict_self()?.ruleset)
}

#[cfg(test)]
mod tests;
