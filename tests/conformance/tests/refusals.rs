//! What is refused, and with which error number (NBD proto.md, "Error values").

use anyhow::ensure;
use spline_conformance::MIB;
use spline_harness::nbd::{Connection, Kind, errno};
use spline_harness::{Rig, Tool};
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(20);

#[test]
fn ranges_past_the_end() -> anyhow::Result<()> {
    Rig::both(|rig| {
        let export = rig.serve("disk", MIB)?;
        let mut connection = Connection::open(&export.socket, &export.volume, LIMIT)?;
        for (kind, offset, length, wanted) in [
            (Kind::Read, MIB, 1, errno::EINVAL),
            (Kind::Read, MIB - 1, 2, errno::EINVAL),
            (Kind::Read, u64::MAX, 1, errno::EINVAL),
            (Kind::Write, MIB, 1, errno::ENOSPC),
            (Kind::Write, u64::MAX - 1, 4, errno::ENOSPC),
            (Kind::WriteZeroes, MIB - 512, 1024, errno::ENOSPC),
        ] {
            let data = vec![1; if kind == Kind::Write { length as usize } else { 0 }];
            let (found, _) = connection.call(kind, offset, length, &data)?;
            ensure!(found == wanted, "kind={kind:?} offset={offset} errno={found} wanted={wanted}");
        }
        let bytes = connection.succeed(Kind::Read, MIB - 4096, 4096, &[])?;
        ensure!(bytes.iter().all(|byte| *byte == 0), "the connection goes on and nothing was written");
        connection.close()
    })
}

#[test]
fn writes_to_a_read_only_export() -> anyhow::Result<()> {
    Rig::both(|rig| {
        let volume = rig.create("disk", MIB)?;
        let export = rig.export(&volume, true)?;
        Tool::new("nbdinfo").args(["--is", "read-only", &export.uri()]).run()?;
        let mut connection = Connection::open(&export.socket, &export.volume, LIMIT)?;
        for (kind, data) in [(Kind::Write, vec![1; 512]), (Kind::Trim, vec![]), (Kind::WriteZeroes, vec![])] {
            let (found, _) = connection.call(kind, 0, 512, &data)?;
            ensure!(found == errno::EPERM, "kind={kind:?} errno={found}");
        }
        connection.succeed(Kind::Read, 0, 512, &[])?;
        connection.succeed(Kind::Flush, 0, 0, &[])?;
        connection.close()
    })
}

#[test]
fn a_volume_that_is_not_there() -> anyhow::Result<()> {
    let Rig::Cluster(cluster) = Rig::cluster()? else { anyhow::bail!("a cluster was asked for") };
    ensure!(cluster.spline(&["volume", "info", "none"]).is_err());
    let gateway = cluster.gateway_socket();
    let nebd = spline_harness::binaries::find("spline-nebd")?;
    let socket = cluster.dir().join("none.sock");
    let mut process = spline_harness::Process::new(
        "nebd-none",
        nebd,
        vec![
            "--volume".into(),
            "none".into(),
            "--gateway-socket".into(),
            gateway.into(),
            "--listen-unix".into(),
            socket.clone().into(),
            "--runtime-dir".into(),
            cluster.dir().into(),
        ],
        cluster.dir(),
    );
    process.start()?;
    // Either it refuses to start, or it refuses clients; it must not show a disk.
    spline_harness::wait_until("a refusal", Duration::from_secs(30), || {
        let refused = Connection::open(&socket, "none", Duration::from_secs(1)).is_err();
        let said = process.log()?.to_lowercase();
        Ok((refused && said.contains("none") && (said.contains("error") || !process.is_running()?))
            .then_some(()))
    })
}
