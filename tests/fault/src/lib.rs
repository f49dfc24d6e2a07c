//! Checks that no fault loses, repeats or invents data: a workload of numbered blocks, and the history it is judged by.
//!
//! Called by this crate's tests. Knows: the harness, NBD. Must never know: how Spline works.
//!
//! Modules: [`block`] (bytes that tell what they are) → [`history`] (what each block may hold) → [`workload`] (requests
//! at depth 32 that record what was acknowledged); [`failover`] (makes one replica serve everything).

pub mod block;
pub mod failover;
pub mod history;
pub mod workload;
