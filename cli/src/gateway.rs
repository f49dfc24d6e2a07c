//! `spline gateway …`
//!
//! Called by `main`. Must not know generated types or how a table is drawn.

pub mod admin;

use crate::args;
use crate::output::{Output, ago, table, unix_ms};
use admin::{Admin, GatewayStatus, Upgraded};
use anyhow::Context;
use spline_types::ByteSize;

/// Carries out one command on a gateway.
///
/// # Errors
/// What the gateway says, or that it does not answer.
pub async fn run(command: args::Gateway, output: Output) -> anyhow::Result<()> {
    match command {
        args::Gateway::Status { at } => {
            let status = Admin::connect(&at.admin).await?.status().await?;
            output.print(&status, |status| human(status, unix_ms()))
        }
        args::Gateway::Upgrade { binary, at } => {
            // The gateway has another current directory.
            let binary = binary.map(std::path::absolute).transpose().context("path of the new binary")?;
            let upgraded = Admin::connect(&at.admin).await?.upgrade(binary.as_deref()).await?;
            output.print(&upgraded, told)
        }
    }
}

fn told(upgraded: &Upgraded) -> String {
    let Upgraded { version, pid, sessions, took_ms, links, pause_us } = upgraded;
    format!(
        "gateway upgraded: version={version} pid={pid} sessions={sessions} links={links} pause_us={pause_us} took_ms={took_ms}"
    )
}

fn human(status: &GatewayStatus, now_ms: u64) -> String {
    let GatewayStatus { id, version, pid, since_unix_ms, sessions, busy, .. } = status;
    let since = ago(now_ms.saturating_sub(*since_unix_ms));
    let count = sessions.len();
    let mut text = format!("gateway {id}: version {version}, pid {pid}, started {since}, {count} volumes\n");
    if !busy.is_empty() {
        text += &format!("being opened or closed: {}\n", busy.join(", "));
    }
    if sessions.is_empty() {
        return text;
    }
    text.push('\n');
    text += &table(
        &["volume", "engine", "state", "epoch", "size", "links", "in flight", "bytes", "since"],
        &[3, 4, 5, 6, 7, 8],
        sessions.iter().map(|session| {
            let only = if session.read_only { ", read-only" } else { "" };
            vec![
                session.volume.clone(),
                session.engine.clone(),
                format!("{}{only}", session.state),
                session.epoch.to_string(),
                ByteSize(session.size_bytes).to_string(),
                links(session.links, session.ring_links),
                session.inflight_requests.to_string(),
                ByteSize(session.inflight_bytes).to_string(),
                ago(now_ms.saturating_sub(session.since_unix_ms)),
            ]
        }),
    );
    text
}

/// How many links there are, by kind.
fn links(all: u32, rings: u32) -> String {
    match (rings, all.saturating_sub(rings)) {
        (0, 0) => "-".to_owned(),
        (0, sockets) => format!("{sockets} socket"),
        (rings, 0) => format!("{rings} ring"),
        (rings, sockets) => format!("{rings} ring, {sockets} socket"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use admin::VolumeSession;

    #[test]
    fn a_status_is_a_line_and_a_table() {
        let session = VolumeSession {
            volume: "disk".into(),
            engine: "cluster".into(),
            epoch: 7,
            size_bytes: 1 << 30,
            links: 3,
            ring_links: 2,
            inflight_requests: 4,
            inflight_bytes: 16384,
            state: "serving".into(),
            read_only: false,
            since_unix_ms: 61_000,
        };
        let mut status = GatewayStatus {
            id: "g".into(),
            version: "0.1.0".into(),
            pid: 12,
            binary: "/usr/bin/spline-gateway".into(),
            since_unix_ms: 1000,
            sessions: vec![session],
            busy: Vec::new(),
        };
        let text = human(&status, 122_000);
        assert!(
            text.starts_with("gateway g: version 0.1.0, pid 12, started 2 min ago, 1 volumes\n"),
            "{text}"
        );
        assert!(text.contains("2 ring, 1 socket") && text.contains("61 s ago"), "{text}");
        status.sessions[0].read_only = true;
        status.sessions[0].state = "fenced".into();
        status.busy = vec!["a".into(), "b".into()];
        let text = human(&status, 122_000);
        assert!(
            text.contains("fenced, read-only") && text.contains("\nbeing opened or closed: a, b\n"),
            "{text}"
        );
        status.sessions.clear();
        status.busy.clear();
        assert_eq!(human(&status, 122_000).lines().count(), 1);
        assert_eq!((links(2, 2), links(1, 0), links(0, 0)), ("2 ring".into(), "1 socket".into(), "-".into()));
    }
}
