//! The contract between nebd and gateway: what the two say to each other over one unix stream socket.
//!
//! Called by nebd's `link` and the gateway's `link`. Codecs are pure: bytes in, bytes out; no clock, no tokio. What needs the
//! kernel stands apart: [`memory`], [`ring::shared`] and [`passing`].
//!
//! A connection starts with one [`Hello`] from nebd and one [`Welcome`] from the gateway; after an accepted hello
//! both sides send frames, a [`Header`] of 48 bytes and its payload:
//!
//! | who | message | meaning |
//! |---|---|---|
//! | nebd | `Request` | execute it; a write's payload follows |
//! | nebd | `Detach` | nebd ends for good; close the session once the requests before it are answered |
//! | gateway | `Reply` | how a request ended; a read's data or a status's extents follow; `Withdrawn` means replay it |
//! | gateway | `Resized` | the volume has a new size |
//! | gateway | `Leaving` | this gateway ends; everything unanswered is to be replayed on the next link |
//! | gateway | `Lost` | the session went to someone newer; nothing will be answered any more |
//! | nebd | `Region`, `RegionGone` | memory that requests in the ring may name, its descriptor passed along; no longer |
//! | gateway | `Renewed` | another gateway process has taken the link over; what it withdrew is sent again |
//!
//! If both sides can, `Request` and `Reply` do not travel over the socket but in a [`ring`] in shared memory, and their data lies
//! in regions that nebd has passed on. Who comes without a ring, or an older version, is served over the socket.
//!
//! A link that just drops keeps the session: nebd comes back with `Mode::Resume` and replays what was not answered,
//! oldest first, before anything new (`replay_before_new`). It names the session that it was last told of: if anybody
//! else had the volume since, it is refused as `Held` (`no_late_duplicate`). It names the volume too, by the identity that
//! the first welcome told: if the name is another volume's now, it is refused as `Replaced`. All integers are
//! little-endian.
//!
//! Knows: versions, encodings, limits of what may be said. Must never know: NBD, vhost-user, the cluster, who is on
//! either end.
//!
//! Modules in the order in which a request meets them: [`version`] → [`hello`] → [`welcome`] → [`frame`] →
//! [`ring`] → [`extents`]; [`fault`] and [`error`] serve all of them.

pub mod error;
pub mod extents;
pub mod fault;
pub mod frame;
pub mod hello;
pub mod memory;
pub mod passing;
pub mod ring;
pub mod version;
pub mod welcome;

mod fields;

#[cfg(test)]
mod tests;

pub use error::LinkError;
pub use frame::{HEADER_BYTES, Header, Message};
pub use hello::{Hello, Identity, InstanceId, Mode};
pub use version::{FEATURE_RING, LinkVersion, VersionRange};
pub use welcome::{Accepted, Refusal, Refused, VolumeTraits, Welcome};
