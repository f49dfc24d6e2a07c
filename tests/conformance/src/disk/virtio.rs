//! The client that is a guest's driver: the `blkio` crate, a virtqueue for each queue.

use super::{Answer, Disk, Facts, Request};
use anyhow::{Context, ensure};
use spline_harness::virtio::{Slot, VirtioDisk, Wish};
use std::path::Path;
use std::time::Duration;

/// Memory for requests: more than any test has in flight.
const MEMORY: usize = 64 << 20;
/// Descriptors of a queue: fewer than some tests have in flight, so that the driver keeps the ring full.
const QUEUE_SIZE: u16 = 128;
/// Longest wait for an answer, however busy the machine is.
const PATIENCE: Duration = Duration::from_secs(60);

/// A device and its queues.
#[derive(Debug)]
pub struct GuestDisk {
    device: VirtioDisk,
    read_only: bool,
    queues: usize,
}

impl GuestDisk {
    /// Connects with `queues` virtqueues; `read_only`: takes a disk that refuses writes.
    ///
    /// # Errors
    /// What the device or the driver refuses.
    pub fn open(socket: &Path, queues: usize, read_only: bool) -> anyhow::Result<Self> {
        let wish = Wish { queues, queue_size: QUEUE_SIZE, read_only, memory: MEMORY };
        Ok(Self { device: VirtioDisk::open(socket, wish)?, read_only, queues })
    }

    /// What the device says of itself.
    pub fn device(&self) -> &VirtioDisk {
        &self.device
    }

    fn ask(&mut self, queue: usize, tag: usize, request: &Request, slot: &Slot) {
        match request {
            Request::Read { offset, .. } => self.device.read(queue, *offset, slot, tag),
            Request::Write { offset, .. } => self.device.write(queue, *offset, slot, tag),
            Request::Flush => self.device.flush(queue, tag),
            Request::Discard { offset, length } => self.device.discard(queue, (*offset, *length), tag),
            Request::Zero { offset, length, unmap } => {
                self.device.zero(queue, (*offset, *length), *unmap, tag);
            }
        }
    }

    /// Places of the requests in the memory, the writes' filled in.
    fn slots(&self, requests: &[(usize, Request)]) -> anyhow::Result<Vec<(usize, Slot)>> {
        let mut at = 0;
        let mut slots = Vec::new();
        for (_, request) in requests {
            let lengths: Vec<usize> = match request {
                Request::Read { pieces, .. } => pieces.clone(),
                Request::Write { pieces, .. } => {
                    self.device.fill(at, &pieces.concat())?;
                    pieces.iter().map(Vec::len).collect()
                }
                _ => Vec::new(),
            };
            slots.push((at, self.device.slot(at, &lengths)?));
            at += request.payload();
        }
        Ok(slots)
    }
}

impl Disk for GuestDisk {
    fn facts(&self) -> Facts {
        let facts = self.device.facts();
        Facts {
            size: facts.size,
            block_size: facts.block_size,
            read_only: self.read_only,
            discards: facts.discard_max > 0,
            zeroes: facts.zeroes_max > 0,
        }
    }

    fn queues(&self) -> usize {
        self.queues
    }

    fn all(&mut self, requests: Vec<(usize, Request)>) -> anyhow::Result<Vec<Answer>> {
        let slots = self.slots(&requests)?;
        let mut waiting = vec![0; self.queues];
        for (tag, ((queue, request), (_, slot))) in requests.iter().zip(&slots).enumerate() {
            self.ask(*queue, tag, request, slot);
            waiting[*queue] += 1;
        }
        // Every queue is told before one is waited for.
        let mut answered = Vec::new();
        for queue in 0..self.queues {
            self.device.reap(queue, 0, PATIENCE, &mut answered)?;
        }
        for answer in &answered {
            waiting[requests[answer.tag].0] -= 1;
        }
        for (queue, waiting) in waiting.into_iter().enumerate() {
            let wanted = answered.len() + waiting;
            while answered.len() < wanted {
                self.device.reap(queue, 1, PATIENCE, &mut answered)?;
            }
        }
        let mut answers: Vec<Option<Answer>> = vec![None; requests.len()];
        for answer in answered {
            let (_, request) = requests.get(answer.tag).context("nobody asked that")?;
            ensure!(answers[answer.tag].is_none(), "answered twice: request={}", answer.tag);
            let is_read = matches!(request, Request::Read { .. }) && answer.result == 0;
            let mut data = vec![0; if is_read { request.payload() } else { 0 }];
            self.device.take(slots[answer.tag].0, &mut data)?;
            answers[answer.tag] = Some(if answer.result == 0 { Ok(data) } else { Err(answer.result) });
        }
        answers.into_iter().map(|answer| answer.context("no answer")).collect()
    }
}
