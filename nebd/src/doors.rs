//! What an export needs of the file system and of privileged ports: its sockets and its status files.
//!
//! Called by `main` before it gives up privileges ([`crate::confine`]); whoever serves the export opens and publishes what
//! is here once the gateway has accepted the volume. Must not know: the protocols, the gateway.

use crate::config::Checked;
use crate::listener::Listener;
use crate::status_file::{Kind, StatusFile};
use std::path::Path;

/// Sockets and status files of one export, taken and not yet open.
#[derive(Debug)]
pub struct Doors {
    /// For NBD clients, if the export has any.
    pub nbd: Option<NbdDoors>,
    /// For a vhost-user front-end.
    pub vhost: Option<VhostDoors>,
}

/// Where NBD clients connect.
#[derive(Debug)]
pub struct NbdDoors {
    /// At least one.
    pub listeners: Vec<Listener>,
    /// Empty until it is published.
    pub status: StatusFile,
}

/// Where a vhost-user front-end connects.
#[derive(Debug)]
pub struct VhostDoors {
    /// A unix socket.
    pub listener: Listener,
    /// Empty until it is published.
    pub status: StatusFile,
}

impl Doors {
    /// Takes them.
    ///
    /// # Errors
    /// If somebody else has one of them, or it can not be made.
    pub fn take(export: &Checked) -> anyhow::Result<Self> {
        let volume = export.volume.as_str();
        let status = |kind| StatusFile::claim(&export.runtime_dir, kind, volume);
        // Status files first: who shares the volume's name with a living nebd must not touch its sockets.
        let nbd_status = export.nbd.as_ref().map(|_| status(Kind::Nbd)).transpose()?;
        let vhost_status = export.vhost.as_ref().map(|_| status(Kind::Vhost)).transpose()?;
        let nbd = match (&export.nbd, nbd_status) {
            (Some(nbd), Some(status)) => {
                let unix = nbd.listen_unix.as_deref().map(Listener::unix);
                let tcp = nbd.listen_tcp.map(Listener::tcp);
                let listeners = unix.into_iter().chain(tcp).collect::<anyhow::Result<_>>()?;
                Some(NbdDoors { listeners, status })
            }
            _ => None,
        };
        let vhost = match (&export.vhost, vhost_status) {
            (Some(vhost), Some(status)) => {
                Some(VhostDoors { listener: Listener::unix(&vhost.socket)?, status })
            }
            _ => None,
        };
        Ok(Self { nbd, vhost })
    }

    /// The files that they are, each to be removed at the end.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        let nbd = self
            .nbd
            .iter()
            .flat_map(|nbd| nbd.listeners.iter().filter_map(Listener::path).chain([nbd.status.location()]));
        let vhost = self
            .vhost
            .iter()
            .flat_map(|vhost| vhost.listener.path().into_iter().chain([vhost.status.location()]));
        nbd.chain(vhost)
    }
}
