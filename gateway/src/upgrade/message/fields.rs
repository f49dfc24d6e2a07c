//! Fields of a message, written and read one after the other. Pure.

use super::MessageError;

/// Collects the bytes of a packet.
pub(super) struct Writer(Vec<u8>);

impl Writer {
    /// With room for a header, to be put later.
    pub(super) fn new(header: usize) -> Self {
        Self(vec![0; header])
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn u16(&mut self, value: u16) {
        self.0.extend(value.to_le_bytes());
    }

    pub(super) fn u32(&mut self, value: u32) {
        self.0.extend(value.to_le_bytes());
    }

    pub(super) fn u64(&mut self, value: u64) {
        self.0.extend(value.to_le_bytes());
    }

    /// One bit each, the first the lowest, in 32.
    pub(super) fn flags(&mut self, flags: &[bool]) {
        self.u32(flags.iter().rev().fold(0, |bits, flag| bits << 1 | u32::from(*flag)));
    }

    /// Its length in 16 bits, then its bytes. Paths and names are far shorter than that.
    pub(super) fn text(&mut self, text: &str) {
        self.bytes(text.as_bytes());
    }

    /// As a text.
    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        let length = bytes.len().min(u16::MAX.into());
        self.u16(length as u16);
        self.0.extend(&bytes[..length]);
    }

    /// Overwrites what lies at `at`.
    pub(super) fn put(&mut self, at: usize, bytes: &[u8]) {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    pub(super) fn finish(self) -> Vec<u8> {
        self.0
    }
}

/// Takes the bytes of a packet apart.
pub(super) struct Reader<'a> {
    kind: u16,
    rest: &'a [u8],
    whole: usize,
}

impl<'a> Reader<'a> {
    pub(super) const fn new(kind: u16, bytes: &'a [u8]) -> Self {
        Self { kind, rest: bytes, whole: bytes.len() }
    }

    const fn wrong_length(&self) -> MessageError {
        MessageError::Length { kind: self.kind, bytes: self.whole }
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], MessageError> {
        let (taken, rest) = self.rest.split_at_checked(count).ok_or(self.wrong_length())?;
        self.rest = rest;
        Ok(taken)
    }

    pub(super) fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], MessageError> {
        let kind = self.kind;
        self.take(N)?.try_into().map_err(|_| MessageError::Field { kind, field })
    }

    pub(super) fn u16(&mut self) -> Result<u16, MessageError> {
        Ok(u16::from_le_bytes(self.array("number")?))
    }

    pub(super) fn u32(&mut self) -> Result<u32, MessageError> {
        Ok(u32::from_le_bytes(self.array("number")?))
    }

    pub(super) fn u64(&mut self) -> Result<u64, MessageError> {
        Ok(u64::from_le_bytes(self.array("number")?))
    }

    /// Refused if a bit is set that has no meaning yet.
    pub(super) fn flags<const N: usize>(&mut self) -> Result<[bool; N], MessageError> {
        let bits = self.u32()?;
        if u64::from(bits) >> N != 0 {
            return Err(MessageError::Field { kind: self.kind, field: "flags" });
        }
        Ok(std::array::from_fn(|at| bits >> at & 1 == 1))
    }

    pub(super) fn text(&mut self) -> Result<String, MessageError> {
        let kind = self.kind;
        let text = std::str::from_utf8(self.bytes()?);
        text.map(str::to_owned).map_err(|_| MessageError::Field { kind, field: "text" })
    }

    pub(super) fn bytes(&mut self) -> Result<&'a [u8], MessageError> {
        let length = self.u16()?;
        self.take(length.into())
    }

    /// Refused if something is left.
    pub(super) const fn end(self) -> Result<(), MessageError> {
        if self.rest.is_empty() { Ok(()) } else { Err(self.wrong_length()) }
    }
}
