//! A link that keeps its socket and its ring, as bytes. Pure.

use super::fields::{Reader, Writer};
use super::{MessageError, REGIONS_MAX};
use spline_link::InstanceId;
use spline_link::ring::Position;

/// A link that was frozen. Beside it: socket, memory of the ring, bell of the gateway, bell of nebd; then descriptors that were
/// read from the socket and not looked at.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct LinkState {
    /// Number of its session.
    pub(crate) session: u32,
    /// How later messages name it.
    pub(crate) link: u32,
    /// Version that nebd speaks.
    pub(crate) version: u16,
    pub(crate) instance: InstanceId,
    /// nebd will not modify the volume.
    pub(crate) read_only: bool,
    pub(crate) position: Position,
    /// When the last request was taken, nanoseconds of the monotonic clock.
    pub(crate) stopped_ns: u64,
    /// Read from the socket and not looked at: less than a frame.
    pub(crate) partial: Vec<u8>,
}

/// Memory of nebd that a link's requests name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct RegionState {
    pub(crate) number: u32,
    /// Where it starts in its file and how long it is, bytes.
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

pub(super) fn write_link(state: &LinkState, out: &mut Writer) {
    out.u32(state.session);
    out.u32(state.link);
    out.u16(state.version);
    out.flags(&[state.read_only]);
    out.u64(state.instance.0);
    out.u64(state.position.taken);
    out.u64(state.position.answered);
    out.u64(state.stopped_ns);
    out.bytes(&state.partial);
}

pub(super) fn read_link(fields: &mut Reader<'_>) -> Result<LinkState, MessageError> {
    let (session, link, version) = (fields.u32()?, fields.u32()?, fields.u16()?);
    let [read_only] = fields.flags()?;
    let instance = InstanceId(fields.u64()?);
    let position = Position { taken: fields.u64()?, answered: fields.u64()? };
    let (stopped_ns, partial) = (fields.u64()?, fields.bytes()?.to_vec());
    Ok(LinkState { session, link, version, instance, read_only, position, stopped_ns, partial })
}

pub(super) fn write_regions(regions: &[RegionState], out: &mut Writer) {
    out.u32(regions.len() as u32);
    for region in regions {
        out.u32(region.number);
        out.u64(region.offset);
        out.u64(region.length);
    }
}

pub(super) fn read_regions(kind: u16, fields: &mut Reader<'_>) -> Result<Vec<RegionState>, MessageError> {
    let count = fields.u32()? as usize;
    if count > REGIONS_MAX {
        return Err(MessageError::Field { kind, field: "regions" });
    }
    let region = |_| Ok(RegionState { number: fields.u32()?, offset: fields.u64()?, length: fields.u64()? });
    (0..count).map(region).collect()
}
