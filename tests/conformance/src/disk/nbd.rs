//! The client that speaks NBD: a connection for each queue.

use super::{Answer, Disk, Facts, Request};
use crate::raw::{INFO_BLOCK_SIZE, Raw};
use anyhow::{Context, ensure};
use spline_harness::nbd::{Connection, Kind, Receiver, Sender};
use std::path::Path;
use std::time::Duration;

const HANDSHAKE: Duration = Duration::from_secs(20);
/// Transmission flags (NBD proto.md, "Transmission flags").
const READ_ONLY: u16 = 1 << 1;
const SEND_TRIM: u16 = 1 << 5;
const SEND_WRITE_ZEROES: u16 = 1 << 6;

/// Some connections to one export.
#[derive(Debug)]
pub struct NbdDisk {
    facts: Facts,
    connections: Vec<(Sender, Receiver)>,
}

impl NbdDisk {
    /// Opens `queues` connections.
    ///
    /// # Errors
    /// If the export is refused.
    pub fn open(socket: &Path, export: &str, queues: usize) -> anyhow::Result<Self> {
        let mut raw = Raw::haggling(socket)?;
        let (size, flags, block_size) = raw.go_with_block_size(export.as_bytes(), &[INFO_BLOCK_SIZE])?;
        drop(raw);
        let facts = Facts {
            size,
            block_size: u64::from(block_size),
            read_only: flags & READ_ONLY != 0,
            discards: flags & SEND_TRIM != 0,
            zeroes: flags & SEND_WRITE_ZEROES != 0,
        };
        let connect = |_| Connection::open(socket, export, HANDSHAKE)?.split();
        Ok(Self { facts, connections: (0..queues).map(connect).collect::<anyhow::Result<_>>()? })
    }
}

impl Disk for NbdDisk {
    fn facts(&self) -> Facts {
        self.facts
    }

    fn queues(&self) -> usize {
        self.connections.len()
    }

    fn all(&mut self, requests: Vec<(usize, Request)>) -> anyhow::Result<Vec<Answer>> {
        let mut answers: Vec<Option<Answer>> = vec![None; requests.len()];
        let requests = &requests;
        std::thread::scope(|scope| -> anyhow::Result<()> {
            // Whoever only sends must not wait for whoever only receives.
            let (senders, receivers): (Vec<_>, Vec<_>) =
                self.connections.iter_mut().map(|(sender, receiver)| (sender, receiver)).unzip();
            let sending: Vec<_> = (senders.into_iter().enumerate())
                .map(|(queue, sender)| scope.spawn(move || send(sender, queue, requests)))
                .collect();
            for (queue, receiver) in receivers.into_iter().enumerate() {
                let count = requests.iter().filter(|(of, _)| *of == queue).count();
                (0..count).try_for_each(|_| receive(receiver, queue, requests, &mut answers))?;
            }
            sending
                .into_iter()
                .try_for_each(|sent| sent.join().map_err(|_| anyhow::anyhow!("a sender panicked"))?)
        })?;
        answers.into_iter().map(|answer| answer.context("no answer")).collect()
    }
}

fn send(sender: &mut Sender, queue: usize, requests: &[(usize, Request)]) -> anyhow::Result<()> {
    for (tag, (_, request)) in requests.iter().enumerate().filter(|(_, (of, _))| *of == queue) {
        let tag = tag as u64;
        match request {
            Request::Read { offset, .. } => {
                sender.send(Kind::Read, tag, *offset, request.payload() as u32, &[])?;
            }
            Request::Write { offset, pieces } => {
                let data = pieces.concat();
                sender.send(Kind::Write, tag, *offset, data.len() as u32, &data)?;
            }
            Request::Flush => sender.send(Kind::Flush, tag, 0, 0, &[])?,
            Request::Discard { offset, length } => {
                sender.send(Kind::Trim, tag, *offset, *length as u32, &[])?;
            }
            Request::Zero { offset, length, unmap } => {
                let kind = if *unmap { Kind::WriteZeroes } else { Kind::WriteZeroesNoHole };
                sender.send(kind, tag, *offset, *length as u32, &[])?;
            }
        }
    }
    Ok(())
}

fn receive(
    receiver: &mut Receiver,
    queue: usize,
    requests: &[(usize, Request)],
    answers: &mut [Option<Answer>],
) -> anyhow::Result<()> {
    let reply = receiver.reply()?.context("the connection has ended")?;
    let tag = usize::try_from(reply.cookie)?;
    let (of, request) = requests.get(tag).with_context(|| format!("nobody asked that: cookie={tag}"))?;
    ensure!(*of == queue, "answered on another connection: cookie={tag}");
    ensure!(answers[tag].is_none(), "answered twice: cookie={tag}");
    let is_read = matches!(request, Request::Read { .. }) && reply.errno == 0;
    let mut data = vec![0; if is_read { request.payload() } else { 0 }];
    receiver.data(&mut data)?;
    answers[tag] = Some(if reply.errno == 0 { Ok(data) } else { Err(reply.errno as i32) });
    Ok(())
}
