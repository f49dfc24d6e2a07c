//! The SIGBUS guard: a file that a front-end shared may be truncated while it is mapped, and touching a page that has
//! vanished must not end this process (`guest_cannot_crash_us`).
//!
//! Called by `mapping`. A page of a guarded mapping that vanished becomes a private one of zeros, and the mapping is marked as
//! damaged; what touched it goes on. Any other SIGBUS ends the process, as it does by default. Must not know: what is mapped.
//!
//! The handler takes no lock and no memory: mappings stand in a static table of atomics.

use std::ptr;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Mappings guarded at a time: several whole memory tables of 509 regions, or many of the few regions that guests have. A table that
/// is still in use by requests while new ones come takes its places until they end, so this bounds them too (`bounded`).
const SLOTS: usize = 4096;

struct Slot {
    taken: AtomicBool,
    /// First address; 0 while the slot guards nothing. Written last, cleared first.
    start: AtomicUsize,
    length: AtomicUsize,
    page: AtomicUsize,
    damaged: AtomicBool,
}

static TABLE: [Slot; SLOTS] = [const {
    Slot {
        taken: AtomicBool::new(false),
        start: AtomicUsize::new(0),
        length: AtomicUsize::new(0),
        page: AtomicUsize::new(0),
        damaged: AtomicBool::new(false),
    }
}; SLOTS];
/// Slots from here up were never taken.
static REACHED: AtomicUsize = AtomicUsize::new(0);
static INSTALL: Once = Once::new();

/// A place in the table; dropping it ends the guard, which must happen before the mapping goes.
#[derive(Debug)]
pub(super) struct Guard {
    slot: usize,
}

impl Guard {
    /// Guards `length` bytes from `start`, whose pages have `page` bytes; `None` if the table is full.
    pub(super) fn new(start: usize, length: usize, page: usize) -> Option<Self> {
        INSTALL.call_once(install);
        let slot = TABLE.iter().position(|slot| !slot.taken.swap(true, Ordering::AcqRel))?;
        REACHED.fetch_max(slot + 1, Ordering::AcqRel);
        TABLE[slot].damaged.store(false, Ordering::Release);
        TABLE[slot].length.store(length, Ordering::Release);
        TABLE[slot].page.store(page, Ordering::Release);
        TABLE[slot].start.store(start, Ordering::Release);
        Some(Self { slot })
    }

    /// Whether a page of it has vanished.
    pub(super) fn is_damaged(&self) -> bool {
        TABLE[self.slot].damaged.load(Ordering::Acquire)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        TABLE[self.slot].start.store(0, Ordering::Release);
        TABLE[self.slot].taken.store(false, Ordering::Release);
    }
}

fn install() {
    // SAFETY: the structure is plain data for which zeros are a value; the handler is async-signal-safe and has the signature
    // that SA_SIGINFO asks for.
    unsafe {
        let mut ours: libc::sigaction = std::mem::zeroed();
        ours.sa_sigaction = on_sigbus as *const () as usize;
        ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigemptyset(&raw mut ours.sa_mask);
        if libc::sigaction(libc::SIGBUS, &raw const ours, ptr::null_mut()) != 0 {
            tracing::error!(
                "SIGBUS can not be handled, a front-end that truncates its memory ends this process"
            );
        }
    }
}

extern "C" fn on_sigbus(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel gives a valid siginfo to a handler with SA_SIGINFO; errno is this thread's own; the mapping calls
    // replace only pages of a mapping that is in the table, which its owner keeps mapped while it is there.
    unsafe {
        let errno = *libc::__errno_location();
        let of_memory = (libc::BUS_ADRERR..=libc::BUS_MCEERR_AR).contains(&(*info).si_code);
        if !of_memory || !replace((*info).si_addr() as usize) {
            libc::signal(libc::SIGBUS, libc::SIG_DFL);
            if (*info).si_code <= 0 {
                // Somebody sent it: nothing will fault again when we return.
                libc::raise(libc::SIGBUS);
            }
        }
        *libc::__errno_location() = errno;
    }
}

/// Puts a page of zeros where `address` is, if it is guarded.
///
/// # Safety
/// Only for an address whose access has just raised SIGBUS.
unsafe fn replace(address: usize) -> bool {
    for slot in TABLE.iter().take(REACHED.load(Ordering::Acquire)) {
        let start = slot.start.load(Ordering::Acquire);
        let (length, page) = (slot.length.load(Ordering::Acquire), slot.page.load(Ordering::Acquire));
        let inside = start != 0 && address >= start && address - start < length;
        // If the slot changed hands meanwhile, it was not that of the access: its mapping is alive.
        if !inside || slot.start.load(Ordering::Acquire) != start || page == 0 {
            continue;
        }
        slot.damaged.store(true, Ordering::Release);
        let flags = libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let place = (address - address % page) as *mut libc::c_void;
        // SAFETY: the page lies in a mapping of ours, which starts and ends at multiples of `page`.
        let placed = unsafe { libc::mmap(place, page, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
        return placed != libc::MAP_FAILED;
    }
    false
}

#[cfg(test)]
mod tests;
