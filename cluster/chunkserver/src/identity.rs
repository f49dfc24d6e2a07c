//! The data directory's identity: which store it is, which id it got, and the lock that keeps a second process out.
//!
//! Called at start. Must not know: the network. What a replica promised under an id is lost when its directory is
//! emptied, so an emptied directory gets a fresh uuid and with it a fresh id (`acked_is_durable`).

use anyhow::Context;
use serde::{Deserialize, Serialize};
use spline_types::ChunkserverId;
use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::state_machine::meta::replace_file;

/// Versions of the data directory, newest first.
pub const VERSIONS: [u32; 2] = [
    2, // identity.json names the cluster's election time
    1, // identity.json, raft/, pool/, copysets/, addresses.json
];
const IDENTITY: &str = "identity.json";
const LOCK: &str = "lock";
const QUARANTINE: &str = "quarantine-";

/// What the identity file says.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// Version of the directory's layout.
    pub format: u32,
    /// Made when the directory was formatted.
    pub store_uuid: String,
    /// The id that the metadata server gave; 0: not asked yet.
    pub chunkserver_id: u32,
    /// The cluster it belongs to; empty: not asked yet.
    pub cluster_id: String,
    /// The cluster's `election_max_ms`, with which it registered; 0: not asked yet, or not kept, in version 1.
    #[serde(default)]
    pub election_max_ms: u64,
}

/// A locked data directory.
pub struct DataDir {
    path: PathBuf,
    /// Held as long as the directory is used.
    _lock: File,
    /// What the identity file says.
    pub identity: Identity,
}

impl DataDir {
    /// Locks the directory, and formats it if it is new.
    ///
    /// # Errors
    /// If another process holds it, or it was made by a newer version, or the disk fails.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        fs::create_dir_all(path).with_context(|| format!("could not create path={}", path.display()))?;
        let lock = OpenOptions::new().create(true).truncate(false).write(true).open(path.join(LOCK))?;
        lock.try_lock().with_context(|| {
            format!("data directory is in use by another chunkserver, stop it first: path={}", path.display())
        })?;
        let identity = match fs::read(path.join(IDENTITY)) {
            Ok(bytes) => parse(&bytes).with_context(|| format!("path={}", path.join(IDENTITY).display()))?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => format(path)?,
            Err(error) => {
                return Err(error).with_context(|| format!("path={}", path.join(IDENTITY).display()));
            }
        };
        Ok(Self { path: path.to_owned(), _lock: lock, identity })
    }

    /// The id, if the metadata server has given one for this election time.
    ///
    /// # Errors
    /// If it was given for another one: the lease reads of the other chunkservers rest on it.
    pub fn id(&self, election_max_ms: u64) -> anyhow::Result<Option<ChunkserverId>> {
        let Identity { chunkserver_id, election_max_ms: cluster, .. } = self.identity;
        if chunkserver_id == 0 || cluster == 0 {
            return Ok(None);
        }
        anyhow::ensure!(
            cluster == election_max_ms,
            "election_max_ms is not the one that the cluster was made with, set it to the cluster's: \
             election_max_ms={election_max_ms} cluster={cluster}"
        );
        Ok(Some(ChunkserverId::new(chunkserver_id)))
    }

    /// Remembers the id that the metadata server gave, and the election time that it agreed to.
    ///
    /// # Errors
    /// If the disk fails.
    pub fn registered(
        &mut self,
        id: ChunkserverId,
        cluster: &str,
        election_max_ms: u64,
    ) -> anyhow::Result<()> {
        self.identity.format = VERSIONS[0];
        self.identity.chunkserver_id = id.get();
        self.identity.election_max_ms = election_max_ms;
        cluster.clone_into(&mut self.identity.cluster_id);
        save(&self.path, &self.identity)
    }

    /// Moves all that is in the directory to `quarantine-<unix time>` inside it and formats it anew, with a fresh
    /// uuid: peers fill the replicas again.
    ///
    /// # Errors
    /// If the disk fails.
    pub fn quarantine(&mut self) -> anyhow::Result<PathBuf> {
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let to = self.path.join(format!("{QUARANTINE}{seconds}"));
        fs::create_dir(&to).with_context(|| format!("could not create path={}", to.display()))?;
        for entry in fs::read_dir(&self.path)? {
            let name = entry?.file_name();
            let stays = name.to_string_lossy().starts_with(QUARANTINE) || name == LOCK;
            if !stays {
                fs::rename(self.path.join(&name), to.join(&name))?;
            }
        }
        self.identity = format(&self.path)?;
        Ok(to)
    }
}

fn format(path: &Path) -> anyhow::Result<Identity> {
    let store_uuid = fs::read_to_string("/proc/sys/kernel/random/uuid").context("no random uuid")?;
    let store_uuid = store_uuid.trim().to_owned();
    let identity = Identity {
        format: VERSIONS[0],
        store_uuid,
        chunkserver_id: 0,
        cluster_id: String::new(),
        election_max_ms: 0,
    };
    save(path, &identity)?;
    Ok(identity)
}

fn save(path: &Path, identity: &Identity) -> anyhow::Result<()> {
    replace_file(path, IDENTITY, &serde_json::to_vec_pretty(identity)?)
        .context("could not write the identity")
}

fn parse(bytes: &[u8]) -> anyhow::Result<Identity> {
    #[derive(Deserialize)]
    struct Version {
        format: u32,
    }
    // The version first: a newer file may have fields that this build does not know.
    let Version { format } = serde_json::from_slice(bytes).context("identity file is damaged")?;
    anyhow::ensure!(
        VERSIONS.contains(&format),
        "data directory has a format of another version, use a chunkserver that knows it: format={format} known={VERSIONS:?}"
    );
    serde_json::from_slice(bytes).context("identity file is damaged")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_keeps_its_identity_and_its_lock() {
        let dir = tempfile::tempdir().expect("tempdir");
        let mut first = DataDir::open(dir.path()).expect("formats");
        assert_eq!(first.id(1000).expect("not asked"), None);
        assert!(DataDir::open(dir.path()).is_err());
        first.registered(ChunkserverId::new(7), "c", 1000).expect("saves");
        let identity = first.identity.clone();
        drop(first);
        let again = DataDir::open(dir.path()).expect("opens");
        let id = again.id(1000).expect("the cluster's election time");
        assert_eq!((id, &again.identity), (Some(ChunkserverId::new(7)), &identity));
        let refused = again.id(2000).expect_err("another election time").to_string();
        assert!(refused.contains("election_max_ms=2000 cluster=1000"), "{refused}");
    }

    #[test]
    fn quarantine_keeps_the_old_content_and_starts_anew() {
        let dir = tempfile::tempdir().expect("tempdir");
        let mut data = DataDir::open(dir.path()).expect("formats");
        let old = data.identity.store_uuid.clone();
        fs::write(dir.path().join("thing"), b"x").expect("writes");
        let to = data.quarantine().expect("moves");
        assert_eq!(fs::read(to.join("thing")).expect("kept"), b"x");
        assert!(!dir.path().join("thing").exists());
        assert_ne!(data.identity.store_uuid, old);
    }

    #[test]
    fn the_formats_of_versions_1_and_2_and_strangers() {
        let golden = br#"{"format":1,"store_uuid":"u","chunkserver_id":3,"cluster_id":"c"}"#;
        let old = parse(golden).expect("parses");
        assert_eq!((old.chunkserver_id, old.election_max_ms), (3, 0), "it registers again");
        let golden =
            br#"{"format":2,"store_uuid":"u","chunkserver_id":3,"cluster_id":"c","election_max_ms":1000}"#;
        let new = parse(golden).expect("parses");
        assert_eq!((new.chunkserver_id, new.election_max_ms), (3, 1000));
        assert_eq!(serde_json::to_vec(&new).expect("writes"), golden);
        let newer = parse(br#"{"format":3,"more":1}"#).expect_err("refused");
        assert!(format!("{newer}").contains("format=3"));
        assert!(parse(b"{").is_err());
    }
}
