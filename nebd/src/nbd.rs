//! The NBD server: proto.md of NetworkBlockDevice/nbd, fixed newstyle, without TLS and extended headers.
//!
//! Called by the event loop. Modules in the order in which a client meets them: [`connection`] → [`handshake`] → [`transmission`] → [`reply`] → [`errno`]; [`protocol`] holds the numbers.
//!
//! Knows: NBD. Must not know: the link's encoding, the gateway, the cluster. Handshake, transmission and reply are
//! state machines over bytes and touch no socket (`guest_cannot_crash_us`).

pub mod connection;
pub mod errno;
pub mod handshake;
pub mod protocol;
pub mod reply;
pub mod transmission;
