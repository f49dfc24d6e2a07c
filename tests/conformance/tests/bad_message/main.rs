//! Bad front-ends of the vhost-user-blk device, one file for each kind: an error or a closed connection that can be made anew,
//! while another export works untouched, and nebd keeps nothing of it: no descriptor, no thread, no memory.
//!
//! One test binary for all of them: each would cost a link of its own.

mod config;
mod descriptors;
mod dirty_log;
mod features;
mod framing;
mod gone_in_flight;
mod inflight_region;
mod memory_replaced;
mod memory_slots;
mod memory_table;
mod memory_vanishes;
mod never_reads;
mod out_of_order;
mod queue_index;
mod reset_in_flight;
mod ring_address;
mod stop_in_flight;
mod vring_num;
