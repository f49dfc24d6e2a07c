//! The rules of the tree, as code: who may depend on whom, what may stand in a source file, which licences come in.
//!
//! Called by this crate's tests only. Each checker is pure: data in, complaints out; so each is tested on made-up data,
//! and `tests/workspace.rs` runs all of them on the real tree.
//!
//! Modules: [`graph`] reads `cargo metadata`; [`layers`], [`licences`] judge it; [`source`] judges files.

pub mod graph;
pub mod layers;
pub mod licences;
pub mod source;
