//! Gives freed memory back to the system: a quiet nebd stays under 8 MiB, whatever it did before.
//!
//! Called by the event loop when nothing has happened for a while. The only `unsafe` of this crate.

/// Returns free pages of the allocator.
pub fn trim() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: malloc_trim takes no pointers and locks what it touches; it may be called at any time.
    unsafe {
        libc::malloc_trim(0);
    }
}
