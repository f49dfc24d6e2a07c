//! What `spline dev` says once it serves: lines ready to paste.
//!
//! Called by `dev`. Must not know how anything is started.

use super::state::DevDir;
use crate::nebd::NebdSpec;
use serde::Serialize;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// What a program needs to know.
#[derive(Serialize)]
pub struct Facts {
    /// NBD URI of the export.
    pub uri: String,
    /// The volume.
    pub volume: String,
    /// Where the metadata server listens.
    pub mds: SocketAddr,
    /// Link socket of the gateway.
    pub gateway: PathBuf,
    /// Where its administration listens.
    pub gateway_admin: SocketAddr,
    /// Directory of nebd's status files.
    pub runtime_dir: PathBuf,
    /// Metrics pages: metadata server, chunkservers, gateway.
    pub metrics: Vec<String>,
    /// Directory of everything.
    pub dir: PathBuf,
    /// Time from the start until all served, milliseconds.
    pub ready_ms: u64,
}

/// Collects the facts.
pub fn facts(dir: &DevDir, spec: &NebdSpec, took: Duration) -> Facts {
    let state = dir.state();
    Facts {
        uri: spec.place(),
        volume: spec.volume.clone(),
        mds: state.mds,
        gateway: spec.gateway.clone(),
        gateway_admin: state.gateway,
        runtime_dir: dir.runtime_dir(),
        metrics: state.metrics.iter().map(|address| format!("http://{address}/metrics")).collect(),
        dir: dir.root().to_owned(),
        ready_ms: u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
    }
}

/// The facts as lines to paste into another terminal.
pub fn human(facts: &Facts) -> String {
    let Facts { uri, mds, gateway, gateway_admin, runtime_dir, dir, volume, .. } = facts;
    let (gateway, runtime_dir, dir) = (gateway.display(), runtime_dir.display(), dir.display());
    let seconds = facts.ready_ms as f64 / 1000.0;
    let metrics = facts.metrics.join(" ");
    format!(
        "\
ready after {seconds:.1} s: volume {volume}, three replicas, data and logs in {dir}

Paste into another terminal:

  nbdinfo '{uri}'
  nbdcopy --progress IMAGE '{uri}'
  qemu-img convert -p -n -f qcow2 -O raw IMAGE '{uri}'
  fio --name=try --ioengine=nbd --uri='{uri}' --rw=randrw --bs=4k --iodepth=32 --size=1G --time_based --runtime=10
  qemu-system-x86_64 -m 1G -drive 'file={uri},format=raw,if=virtio,cache=none,discard=unmap'

  export SPLINE_MDS={mds} SPLINE_GATEWAY={gateway} SPLINE_GATEWAY_ADMIN={gateway_admin} SPLINE_RUNTIME_DIR={runtime_dir}
  spline volume ls; spline cluster status; spline gateway status; spline nbd ls
  spline volume create disk1 20G && spline nbd export disk1

Metrics: {metrics}
Ctrl-C stops it; the next start finds the data.
"
    )
}
