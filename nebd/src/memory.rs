//! The allocator's manners: freed buffers are kept while there is work, and given back when there is none.
//!
//! Called by `main` at the start, and by the event loop when nothing has happened for a while: a quiet nebd stays
//! under 8 MiB, whatever it did before. One of the few places with `unsafe`.

/// Freed bytes that the allocator keeps, and size from which it maps each buffer anew: the largest request, so that
/// a stream of large requests does not fault in its pages again and again. glibc allows no more than 32 MiB.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const KEPT_BYTES: libc::c_int = 32 << 20;

/// Lets the allocator keep what is freed until [`trim`]. To be called before other threads start.
pub fn keep() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: mallopt takes no pointers; these parameters only tune later calls. Its failure changes nothing.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_THRESHOLD, KEPT_BYTES);
        libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT_BYTES);
    }
}

/// Returns free pages of the allocator.
pub fn trim() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: malloc_trim takes no pointers and locks what it touches; it may be called at any time.
    unsafe {
        libc::malloc_trim(0);
    }
}
