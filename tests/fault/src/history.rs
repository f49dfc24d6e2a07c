//! What each block may hold: a register per block, judged for linearizability, writes of unknown outcome included.
//!
//! Pure. A block has at most one request at a time, so its history is a sequence: a read must show the last
//! acknowledged write, or one of unknown outcome sent after it (`acked_is_durable`); once a read has shown a value, or
//! a later write is acknowledged, older ones must never come back (`no_late_duplicate`).

/// The state of one block.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct Register {
    /// The write that is known to have taken effect last; 0: none.
    known: u64,
    /// Later writes that were sent and never answered: each may have taken effect, or not, or may yet.
    unknown: Vec<u64>,
    /// The newest version that was sent.
    sent: u64,
    /// A write is under way.
    writing: bool,
}

/// The state of all blocks.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct History {
    registers: Vec<Register>,
}

impl History {
    /// `blocks` blocks that were never written.
    pub fn new(blocks: usize) -> Self {
        Self { registers: vec![Register::default(); blocks] }
    }

    /// Number of blocks.
    pub fn blocks(&self) -> usize {
        self.registers.len()
    }

    /// A write of `block` begins; answers its version.
    pub fn begin_write(&mut self, block: usize) -> u64 {
        let register = &mut self.registers[block];
        assert!(!register.writing, "one request per block at a time");
        register.sent += 1;
        register.writing = true;
        register.sent
    }

    /// The write under way of `block` was acknowledged.
    pub fn acknowledged(&mut self, block: usize) {
        let register = &mut self.registers[block];
        assert!(register.writing, "answered without a request");
        register.writing = false;
        register.known = register.sent;
        register.unknown.clear();
    }

    /// The connection ended before the write under way of `block` was answered.
    pub fn lost(&mut self, block: usize) {
        let register = &mut self.registers[block];
        register.writing = false;
        register.unknown.push(register.sent);
    }

    /// A read of `block`, with no write under way, showed `version`.
    ///
    /// # Errors
    /// If no order of what happened explains it.
    pub fn read(&mut self, block: usize, version: u64) -> Result<(), String> {
        let register = &mut self.registers[block];
        if version != register.known && !register.unknown.contains(&version) {
            let what = match version {
                v if v > register.sent => "a write that was never sent",
                v if v < register.known => {
                    "an older write: a newer one that was acknowledged or seen is lost"
                }
                _ => "a write that a newer one had replaced",
            };
            return Err(format!("block shows {what}: block={block} version={version} register={register:?}"));
        }
        // What has been seen stays: a write of unknown outcome that comes only now would undo it. The connection it was
        // sent on is closed and the next one was served, so it is dead or done.
        register.known = version;
        register.unknown.clear();
        Ok(())
    }
}

#[cfg(test)]
mod tests;
