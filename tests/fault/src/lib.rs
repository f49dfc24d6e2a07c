//! Checks that no fault loses, repeats or invents data: a workload of numbered blocks, and the history it is judged by.
//!
//! Called by this crate's tests. Knows: the harness, NBD, a guest's queues. Must never know: how Spline works.
//!
//! Modules: [`block`] (bytes that tell what they are) → [`history`] (what each block may hold) → [`workload`] (requests
//! at depth 32 that record what was acknowledged), [`guest`] (the same from a guest's queue); [`schedule`]
//! (what happens meanwhile, at random); [`failover`] (makes one replica serve everything);
//! [`broken`] (builds that fail in an upgrade).

pub mod block;
pub mod broken;
pub mod failover;
pub mod guest;
pub mod history;
pub mod schedule;
pub mod workload;
