//! Bad inputs to the NBD server, one file each: the answer that NBD proto.md demands or a closed connection, while
//! another connection works untouched, nebd does not grow, and nothing of the bad connection is left behind.
//!
//! One test binary for all of them: each would cost a link of its own.

mod abort;
mod bad_option_magic;
mod bad_request_magic;
mod block_status_contexts;
mod client_flags;
mod disconnect_in_flight;
mod dont_fragment;
mod duplicate_handles;
mod export_names;
mod fua_on_read;
mod half_closed;
mod never_reads;
mod offset_overflow;
mod oldstyle;
mod one_byte_at_a_time;
mod option_length;
mod option_order;
mod past_the_end;
mod read_only;
mod starttls;
mod too_long;
mod unaligned;
mod unknown_command;
mod unknown_flags;
mod zero_length;
