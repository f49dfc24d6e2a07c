//! A small state machine: numbered registers in memory, checkpointed to one file.
//!
//! A command's meta is the register (u64), its payload the value. The answer is how many distinct writes the register
//! has had, which a replay must not change: each write carries its entry's position.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use spline_raft::{
    Answer, Checkpoint, CheckpointJob, LogCommand, LogPosition, SnapshotSink, SnapshotSource, StateMachine,
};

/// Register → (writes so far, index of the last one, value).
pub(crate) type Registers = BTreeMap<u64, (u64, u64, Bytes)>;

/// What the test looks into while the group runs.
#[derive(Clone, Default)]
pub(crate) struct Shared(pub(crate) Arc<Mutex<Registers>>, Arc<Ends>);

/// How the next command that is applied here is the last one.
#[derive(Default)]
struct Ends {
    by_panic: AtomicBool,
    by_error: AtomicBool,
}

impl Shared {
    /// The next command that is applied here panics.
    pub(crate) fn panic_next(&self) {
        self.1.by_panic.store(true, Ordering::Relaxed);
    }

    /// The next command that is applied here fails.
    pub(crate) fn fail_next(&self) {
        self.1.by_error.store(true, Ordering::Relaxed);
    }

    pub(crate) fn value(&self, register: u64) -> Option<Bytes> {
        self.0.lock().unwrap().get(&register).map(|(_, _, value)| value.clone())
    }

    pub(crate) fn writes(&self, register: u64) -> u64 {
        self.0.lock().unwrap().get(&register).map_or(0, |(writes, _, _)| *writes)
    }
}

pub(crate) struct Machine {
    pub(crate) shared: Shared,
    path: PathBuf,
    last: Checkpoint,
}

impl Machine {
    /// Loads the last checkpoint of `path`, if there is one.
    pub(crate) fn open(path: &Path) -> Machine {
        let shared = Shared::default();
        let last = match std::fs::read(path) {
            Ok(bytes) => {
                let (checkpoint, registers) = decode(&bytes);
                *shared.0.lock().unwrap() = registers;
                checkpoint
            }
            Err(_) => Checkpoint::default(),
        };
        Machine { shared, path: path.to_owned(), last }
    }
}

impl StateMachine for Machine {
    fn checkpoint(&self) -> Checkpoint {
        self.last.clone()
    }

    async fn apply(&mut self, batch: Vec<(LogPosition, LogCommand)>) -> io::Result<Vec<Answer>> {
        assert!(!self.shared.1.by_panic.load(Ordering::Relaxed), "this replica was told to panic");
        if self.shared.1.by_error.load(Ordering::Relaxed) {
            return Err(io::Error::other("this replica was told to fail"));
        }
        let mut registers = self.shared.0.lock().unwrap();
        // The entry that is being applied, and the registers that it was newer than.
        let (mut entry, mut newer) = (None, BTreeSet::new());
        let answer = |(at, command): (LogPosition, LogCommand)| {
            if entry.replace(at) != Some(at) {
                newer.clear();
            }
            let register = command.meta.as_ref().get_u64_le();
            let (writes, last, value) = registers.entry(register).or_default();
            // Idempotent: what the checkpoint already holds is not counted again.
            if at.index > *last || newer.contains(&register) {
                (*writes, *last, *value) = (*writes + 1, at.index, command.payload);
                newer.insert(register);
            }
            Bytes::copy_from_slice(&writes.to_le_bytes())
        };
        Ok(batch.into_iter().map(answer).collect())
    }

    fn begin_checkpoint(&mut self) -> Box<dyn CheckpointJob> {
        Box::new(Job { registers: self.shared.0.lock().unwrap().clone(), path: self.path.clone() })
    }

    fn snapshot_source(&self) -> io::Result<(Checkpoint, Box<dyn SnapshotSource>)> {
        let (checkpoint, _) = decode(&std::fs::read(&self.path)?);
        let items =
            self.shared.0.lock().unwrap().iter().map(|(key, value)| encode_one(*key, value)).collect();
        Ok((checkpoint, Box::new(Source { items })))
    }

    fn snapshot_sink(&mut self) -> io::Result<Box<dyn SnapshotSink>> {
        Ok(Box::new(Sink { shared: self.shared.clone(), received: Registers::new() }))
    }

    async fn installed(&mut self, checkpoint: Checkpoint) -> io::Result<()> {
        write(&self.path, &checkpoint, &self.shared.0.lock().unwrap())
    }
}

struct Job {
    registers: Registers,
    path: PathBuf,
}

impl CheckpointJob for Job {
    fn run(self: Box<Self>, checkpoint: Checkpoint) -> BoxFuture<'static, io::Result<()>> {
        async move { write(&self.path, &checkpoint, &self.registers) }.boxed()
    }
}

/// One register per item.
struct Source {
    items: Vec<Bytes>,
}

impl SnapshotSource for Source {
    fn manifest(&self) -> Bytes {
        Bytes::copy_from_slice(&(self.items.len() as u32).to_le_bytes())
    }

    fn read(&mut self, item: u32) -> BoxFuture<'_, io::Result<Bytes>> {
        let data = self.items[item as usize].clone();
        async move { Ok(data) }.boxed()
    }
}

struct Sink {
    shared: Shared,
    received: Registers,
}

impl SnapshotSink for Sink {
    fn begin(&mut self, manifest: Bytes) -> BoxFuture<'_, io::Result<Vec<u32>>> {
        async move { Ok((0..manifest.as_ref().get_u32_le()).collect()) }.boxed()
    }

    fn write(&mut self, _item: u32, mut data: Bytes) -> BoxFuture<'_, io::Result<()>> {
        let (key, value) = decode_one(&mut data);
        self.received.insert(key, value);
        async move { Ok(()) }.boxed()
    }

    fn finish(self: Box<Self>) -> BoxFuture<'static, io::Result<()>> {
        *self.shared.0.lock().unwrap() = self.received;
        async move { Ok(()) }.boxed()
    }
}

fn encode_one(key: u64, (writes, last, value): &(u64, u64, Bytes)) -> Bytes {
    let mut out = BytesMut::new();
    [key, *writes, *last, value.len() as u64].into_iter().for_each(|n| out.put_u64_le(n));
    out.put_slice(value);
    out.freeze()
}

fn decode_one(bytes: &mut Bytes) -> (u64, (u64, u64, Bytes)) {
    let (key, writes, last, length) =
        (bytes.get_u64_le(), bytes.get_u64_le(), bytes.get_u64_le(), bytes.get_u64_le() as usize);
    (key, (writes, last, bytes.split_to(length)))
}

fn write(path: &Path, checkpoint: &Checkpoint, registers: &Registers) -> io::Result<()> {
    let mut out = BytesMut::new();
    let at = checkpoint.position.unwrap_or_default();
    out.put_u8(checkpoint.position.is_some().into());
    [at.term, at.node, at.index, checkpoint.membership.len() as u64]
        .into_iter()
        .for_each(|n| out.put_u64_le(n));
    out.put_slice(&checkpoint.membership);
    registers.iter().for_each(|(key, value)| out.put_slice(&encode_one(*key, value)));
    let new = path.with_extension("new");
    std::fs::write(&new, &out)?;
    std::fs::rename(new, path)
}

fn decode(bytes: &[u8]) -> (Checkpoint, Registers) {
    let mut bytes = Bytes::copy_from_slice(bytes);
    let present = bytes.get_u8() == 1;
    let at = LogPosition { term: bytes.get_u64_le(), node: bytes.get_u64_le(), index: bytes.get_u64_le() };
    let length = bytes.get_u64_le() as usize;
    let membership = bytes.split_to(length);
    let mut registers = Registers::new();
    while !bytes.is_empty() {
        let (key, value) = decode_one(&mut bytes);
        registers.insert(key, value);
    }
    (Checkpoint { position: present.then_some(at), membership }, registers)
}
