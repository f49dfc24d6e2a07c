//! A byte buffer whose memory suits O_DIRECT.
//!
//! Called by the committer (batches), recovery and reads. Knows nothing of formats.

/// Alignment of the memory, in bytes: enough for every direct-IO device.
pub const ALIGNMENT: usize = 4096;

/// A growable buffer whose first byte lies at a multiple of [`ALIGNMENT`].
#[derive(Default)]
pub struct AlignedBuffer {
    bytes: Vec<u8>,
    start: usize,
    length: usize,
}

impl AlignedBuffer {
    /// A buffer of `length` zero bytes.
    pub fn zeroed(length: usize) -> AlignedBuffer {
        let mut buffer = AlignedBuffer::default();
        buffer.resize(length);
        buffer
    }

    /// Bytes it can hold without growing.
    pub fn capacity(&self) -> usize {
        self.bytes.len().saturating_sub(ALIGNMENT)
    }

    /// Forgets the content and keeps the memory.
    pub fn clear(&mut self) {
        self.length = 0;
    }

    /// Appends `source`.
    pub fn extend(&mut self, source: &[u8]) {
        let at = self.length;
        self.reserve(at + source.len());
        self.length += source.len();
        self.as_mut()[at..].copy_from_slice(source);
    }

    /// Cuts to `length` or appends zeros up to it.
    pub fn resize(&mut self, length: usize) {
        let at = self.length.min(length);
        self.reserve(length);
        self.length = length;
        self.as_mut()[at..].fill(0);
    }

    fn reserve(&mut self, length: usize) {
        if length <= self.capacity() {
            return;
        }
        let grown = length.next_multiple_of(ALIGNMENT).max(self.capacity() * 2);
        let bytes = vec![0; grown + ALIGNMENT];
        let start = bytes.as_ptr().align_offset(ALIGNMENT);
        let old = std::mem::replace(self, AlignedBuffer { bytes, start, length: self.length });
        self.as_mut().copy_from_slice(old.as_ref());
    }
}

impl AsRef<[u8]> for AlignedBuffer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.length]
    }
}

impl AsMut<[u8]> for AlignedBuffer {
    fn as_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.length]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grows_aligned_and_keeps_content() {
        let mut buffer = AlignedBuffer::default();
        for i in 0..10_000u32 {
            buffer.extend(&i.to_le_bytes());
            assert_eq!(buffer.as_ref().as_ptr() as usize % ALIGNMENT, 0);
        }
        assert!((0..10_000u32).all(|i| buffer.as_ref()[i as usize * 4..][..4] == i.to_le_bytes()));
        buffer.resize(2);
        buffer.resize(6);
        assert_eq!(buffer.as_ref(), [0, 0, 0, 0, 0, 0]);
    }
}
