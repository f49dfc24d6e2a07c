//! nebd's link to a gateway that has no rings: everything travels over the socket.

#[path = "support/cases.rs"]
mod cases;
#[path = "support/client.rs"]
mod client;
#[path = "support/gateway.rs"]
mod gateway;
#[path = "support/operations.rs"]
mod operations;

const RING: bool = false;
