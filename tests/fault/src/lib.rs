//! Checks that no fault loses, repeats or invents data: a workload of numbered blocks, and the history it is judged by.
//!
//! Called by this crate's tests. Knows: the harness, NBD. Must never know: how Spline works.
//!
//! Modules: [`block`] (bytes that tell what they are) → [`history`] (what each block may hold) → [`workload`] (requests
//! at depth 32 that record what was acknowledged); [`failover`] (makes one replica serve everything), [`stalls`] (how long
//! clients waited).

pub mod block;
pub mod failover;
pub mod history;
pub mod stalls;
pub mod workload;

/// Rounds of a test: few in `make test`, as many as `SPLINE_ROUNDS` says in `make soak`.
pub fn rounds(usual: usize) -> usize {
    std::env::var("SPLINE_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(usual)
}
