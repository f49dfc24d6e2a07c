//! The write-ahead log through its public door: against a model with crashes, against damage, against a failing disk.

#[path = "wal/damage.rs"]
mod damage;
#[path = "wal/faults.rs"]
mod faults;
#[path = "wal/impossible.rs"]
mod impossible;
#[path = "wal/model.rs"]
mod model;
#[path = "wal/sim.rs"]
mod sim;
