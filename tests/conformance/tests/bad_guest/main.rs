//! Bad guests of the vhost-user-blk device, one file for each kind: the error that virtio demands, or a broken queue that can
//! be made anew, while another export works untouched, and nebd keeps nothing of it.
//!
//! One test binary for all of them: each would cost a link of its own.

mod available_index;
mod bells;
mod chain_length;
mod discard_segments;
mod enabling;
mod framing;
mod head;
mod header_changed;
mod identity;
mod indirect;
mod lengths;
mod next_out_of_range;
mod on_another_device;
mod order_of_buffers;
mod outside_memory;
mod past_the_end;
mod read_only;
mod same_head_twice;
mod status_byte;
mod unknown_type;
mod used_ring_as_data;
