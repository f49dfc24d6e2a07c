//! `spline volume …`
//!
//! Called by `main`. Must not know generated types or how a table is drawn.

use crate::args;
use crate::mds::{MdsClient, Volume};
use crate::output::{Output, ago, pairs, table, unix_ms};
use spline_types::{ByteSize, VolumeName};
use std::io::{BufRead, IsTerminal, Write};

/// Carries out one command on volumes.
///
/// # Errors
/// What the metadata server says, or that it does not answer.
pub async fn run(command: args::Volume, mds: &[String], output: Output) -> anyhow::Result<()> {
    let client = MdsClient::connect(mds).await?;
    let changed = |volume: &Volume| format!("{}  {}\n", volume.name, ByteSize(volume.size_bytes));
    match command {
        args::Volume::Create { name, size, block_size, on_unavailable } => {
            let block_size = match block_size {
                args::BlockSizeArg::B512 => 512,
                args::BlockSizeArg::B4096 => 4096,
            };
            output.print(&client.create(&name, size, block_size, on_unavailable).await?, changed)
        }
        args::Volume::Ls => output.print(&client.list().await?, |volumes| list(volumes)),
        args::Volume::Info { name } => {
            output.print(&client.get(&name).await?, |volume| info(volume, unix_ms()))
        }
        args::Volume::Resize { name, size } => output.print(&client.resize(&name, size).await?, changed),
        args::Volume::Rename { name, new_name } => {
            output.print(&client.rename(&name, &new_name).await?, changed)
        }
        args::Volume::Rm { name, yes } => remove(&client, &name, yes, output).await,
    }
}

async fn remove(client: &MdsClient, name: &VolumeName, yes: bool, output: Output) -> anyhow::Result<()> {
    let volume = client.get(name).await?;
    if !yes && std::io::stdin().is_terminal() && !confirmed(&volume)? {
        anyhow::bail!("not deleted: volume={name}");
    }
    client.delete(name).await?;
    output.print(&serde_json::json!({ "deleted": name.as_str() }), |_| format!("deleted {name}\n"))
}

fn confirmed(volume: &Volume) -> anyhow::Result<bool> {
    let (size, stored) = (ByteSize(volume.size_bytes), ByteSize(volume.bytes_stored));
    eprint!("delete volume {} ({size}, {stored} stored) and all its data? [y/N] ", volume.name);
    std::io::stderr().flush()?;
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

fn list(volumes: &[Volume]) -> String {
    if volumes.is_empty() {
        return "no volumes; create one with: spline volume create NAME SIZE\n".into();
    }
    table(
        &["name", "size", "stored", "block", "on-unavailable", "open by"],
        &[1, 2, 3],
        volumes.iter().map(|volume| {
            vec![
                volume.name.clone(),
                ByteSize(volume.size_bytes).to_string(),
                ByteSize(volume.bytes_stored).to_string(),
                volume.block_size.to_string(),
                volume.on_unavailable.clone(),
                volume.session.as_ref().map_or_else(|| "-".into(), |session| session.gateway.clone()),
            ]
        }),
    )
}

fn info(volume: &Volume, now_ms: u64) -> String {
    let mut rows = vec![
        ("name", volume.name.clone()),
        ("id", volume.id.to_string()),
        ("size", format!("{} ({} bytes)", ByteSize(volume.size_bytes), volume.size_bytes)),
        ("stored", format!("{} in {} segments", ByteSize(volume.bytes_stored), volume.segments_allocated)),
        ("block size", volume.block_size.to_string()),
        ("on-unavailable", volume.on_unavailable.clone()),
        ("created", ago(now_ms.saturating_sub(volume.created_unix_ms))),
    ];
    match &volume.session {
        None => rows.push(("open by", "nobody".into())),
        Some(session) => {
            rows.push(("open by", session.gateway.clone()));
            rows.push(("epoch", session.epoch.to_string()));
            rows.push(("open since", ago(now_ms.saturating_sub(session.since_unix_ms))));
            rows.push(("lease left", format!("{} ms", session.lease_left_ms)));
        }
    }
    pairs(&rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mds::Session;

    fn example() -> Volume {
        Volume {
            id: 7,
            name: "disk0".into(),
            size_bytes: 10 << 30,
            block_size: 4096,
            created_unix_ms: 1000,
            on_unavailable: "wait".into(),
            segments_allocated: 2,
            bytes_stored: 3 << 19,
            session: None,
        }
    }

    #[test]
    fn people_see_who_has_a_volume_open() {
        let session =
            Session { epoch: 4, gateway: "host:/g.sock".into(), since_unix_ms: 2000, lease_left_ms: 900 };
        let volume = Volume { session: Some(session), ..example() };
        let text = info(&volume, 62_000);
        assert!(text.contains("open by         host:/g.sock\n"), "{text}");
        assert!(text.contains("epoch           4\n") && text.contains("60 s ago"), "{text}");
        assert!(info(&example(), 62_000).contains("nobody"));
        let text = list(&[example(), volume]);
        assert_eq!(text.lines().count(), 3, "{text}");
        assert!(text.contains("1.5 MiB"), "{text}");
    }
}
