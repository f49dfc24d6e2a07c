//! NBD_OPT_EXPORT_NAME, the handshake of old clients, by the `nbd` crate.

use anyhow::ensure;
use nbd::client::{NbdClient, handshake};
use spline_conformance::{MIB, pattern};
use spline_harness::Rig;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::net::UnixStream;

#[test]
fn an_old_client_reads_what_it_wrote() -> anyhow::Result<()> {
    Rig::both(|rig| {
        let export = rig.serve("disk", 32 * MIB)?;
        let mut stream = UnixStream::connect(&export.socket)?;
        let shown = handshake(&mut stream, export.volume.as_bytes())?;
        ensure!(shown.size == 32 * MIB, "size={}", shown.size);
        ensure!(!shown.readonly, "read-only");
        let mut client = NbdClient::new(&mut stream, &shown);
        let data = pattern(3, 0, 128 << 10);
        client.seek(SeekFrom::Start(16 * MIB - 4096))?;
        client.write_all(&data)?;
        client.seek(SeekFrom::Start(16 * MIB - 4096))?;
        let mut found = vec![0; data.len()];
        client.read_exact(&mut found)?;
        ensure!(found == data, "data differs");
        Ok(())
    })
}
