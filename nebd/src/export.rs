//! The export: what a guest is told of the volume, whichever protocol it speaks.
//!
//! Called by the NBD handshake and transmission; filled from the gateway's welcome. Must not know: sockets, requests.

use spline_link::{Accepted, VolumeTraits};
use spline_types::Geometry;

/// Name, shape and abilities of the one volume that this nebd serves.
#[derive(Clone, Debug)]
pub struct Export {
    /// The name that clients ask for; the empty name is served too, as the default export.
    pub name: String,
    /// One line for humans; may be empty.
    pub description: String,
    /// Size and block size; the size may grow while clients are connected.
    pub geometry: Geometry,
    /// What the engine behind it can do.
    pub traits: VolumeTraits,
    /// Writes are refused: by our config, or because the volume is read-only.
    pub read_only: bool,
}

impl Export {
    /// Whether `name` asks for this export.
    pub fn answers_to(&self, name: &str) -> bool {
        name.is_empty() || name == self.name
    }

    /// Takes over what a gateway says of the volume. `read_only` is what our config wants.
    pub fn update(&mut self, accepted: &Accepted, read_only: bool) {
        self.geometry = accepted.geometry;
        self.traits = accepted.traits;
        self.read_only = read_only || accepted.traits.read_only;
    }
}
