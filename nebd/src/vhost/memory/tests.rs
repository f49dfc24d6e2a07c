use super::*;
use proptest::prelude::*;
use rustix::fs::{MemfdFlags, SealFlags};
use std::sync::atomic::Ordering;

const PAGE: u64 = 4096;

fn file(bytes: u64) -> OwnedFd {
    let fd =
        rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).expect("memfd");
    rustix::fs::ftruncate(&fd, bytes).expect("grows");
    fd
}

fn place(guest_address: u64, length: u64, user_address: u64, offset: u64) -> RegionPlace {
    RegionPlace { guest_address, length, user_address, offset }
}

/// One region of its own file for each (guest address, length), at user address 1 TiB further up.
fn memory(regions: &[(u64, u64)]) -> GuestMemory {
    let table = regions.iter().map(|(at, length)| (place(*at, *length, at + (1 << 40), 0), file(*length)));
    GuestMemory::map(table.collect()).expect("maps")
}

#[test]
fn bytes_are_found_where_they_are() {
    let fd = file(4 * PAGE);
    rustix::io::pwrite(&fd, b"here", 3 * PAGE + 10).expect("writes");
    // Neither the offset nor the length is a multiple of a page.
    let memory = GuestMemory::map(vec![(
        place(0x1000, PAGE - 3, 0x7000, 3 * PAGE + 3),
        fd.try_clone().expect("clones"),
    )])
    .expect("maps");
    let mut found = Vec::new();
    memory.locate(0x1007, 4, &mut found).expect("inside");
    assert_eq!(found, [Segment { region: 0, offset: 7, length: 4 }]);
    let mut bytes = [0; 4];
    memory.read(found[0], 0, &mut bytes);
    assert_eq!(&bytes, b"here");
    memory.write(found[0], 1, b"and");
    rustix::io::pread(&fd, &mut bytes, 3 * PAGE + 10).expect("reads");
    assert_eq!(&bytes, b"hand");
    let raw = memory.iovec(found[0]);
    assert_eq!(raw.iov_len, 4);
}

#[test]
fn reads_and_writes_of_every_alignment_agree() {
    let memory = memory(&[(0, PAGE)]);
    let all = Segment { region: 0, offset: 0, length: PAGE as u32 };
    for at in 0..17 {
        for length in 0..40_usize {
            memory.write(all, 0, &[0xee; 64]);
            let bytes: Vec<u8> = (1..=length as u8).collect();
            memory.write(all, at, &bytes);
            let mut whole = [0; 64];
            memory.read(all, 0, &mut whole);
            let mut expected = [0xee; 64];
            expected[at as usize..at as usize + length].copy_from_slice(&bytes);
            assert_eq!(whole, expected, "at={at} length={length}");
            let mut part = vec![0; length];
            memory.read(all, at, &mut part);
            assert_eq!(part, bytes);
        }
    }
}

#[test]
fn a_range_may_span_regions_that_adjoin() {
    let memory = memory(&[(0x2000, 0x1000), (0x0, 0x2000), (0x4000, 0x1000)]);
    let mut found = vec![Segment { region: 9, offset: 9, length: 9 }];
    memory.locate(0x1ff0, 0x20, &mut found).expect("adjoining");
    let spans =
        [Segment { region: 0, offset: 0x1ff0, length: 0x10 }, Segment { region: 1, offset: 0, length: 0x10 }];
    assert_eq!(found[1..], spans);
    for (address, length) in [
        (0x2ff0, 0x11),
        (0x3000, 1),
        (0x5000, 1),
        (0x4fff, 2),
        (0, 0),
        (u64::MAX, 1),
        (u64::MAX - 1, 1),
        (0, u32::MAX),
    ] {
        let before = found.clone();
        assert!(memory.locate(address, length, &mut found).is_err(), "{address:#x}+{length:#x}");
        assert_eq!(found, before);
    }
}

proptest! {
    /// What is located is exactly the range, in order, and only if every byte of it is memory.
    #[test]
    fn locating_is_exact(
        gaps in prop::collection::vec((0..3u64, 1..3u64), 1..6),
        address in 0..0x12_000u64,
        length in 0..0x5000u32,
    ) {
        let (mut regions, mut next) = (Vec::new(), 0);
        for (gap, pages) in gaps {
            regions.push((next + gap * PAGE, pages * PAGE));
            next += (gap + pages) * PAGE;
        }
        let memory = memory(&regions);
        let is_memory = |byte: u64| regions.iter().any(|(at, bytes)| (*at..at + bytes).contains(&byte));
        let whole = length > 0 && (address..address + u64::from(length)).all(is_memory);
        let mut found = Vec::new();
        prop_assert_eq!(memory.locate(address, length, &mut found).is_ok(), whole);
        let mut at = address;
        for segment in &found {
            let region = memory.regions().nth(segment.region as usize).expect("a region").place();
            prop_assert_eq!(region.guest_address + segment.offset, at);
            prop_assert!(segment.offset + u64::from(segment.length) <= region.length);
            at += u64::from(segment.length);
        }
        prop_assert_eq!(at - address, if whole { length.into() } else { 0 });
    }
}

#[test]
fn impossible_regions_are_refused() {
    let refused = |place: RegionPlace, fd: OwnedFd| match GuestMemory::map(vec![(place, fd)]) {
        Ok(_) => panic!("taken: {place:?}"),
        Err(error) => error.to_string(),
    };
    assert!(refused(place(0, 0, 0, 0), file(PAGE)).contains("zero"));
    assert!(refused(place(u64::MAX - 1, PAGE, 0, 0), file(PAGE)).contains("wraps"));
    assert!(refused(place(0, PAGE, u64::MAX - 1, 0), file(PAGE)).contains("wraps"));
    assert!(refused(place(0, PAGE, 0, u64::MAX - 1), file(PAGE)).contains("wraps"));
    assert!(refused(place(0, PAGE + 1, 0, 0), file(PAGE)).contains("behind the file"));
    assert!(refused(place(0, PAGE, 0, 1), file(PAGE)).contains("behind the file"));
    assert!(refused(place(0, u64::MAX, 0, 0), file(PAGE)).contains("behind the file"));
    let (pipe, _other) = rustix::pipe::pipe().expect("pipe");
    assert!(refused(place(0, PAGE, 0, 0), pipe).contains("nothing that can be mapped"));
    let sealed = file(PAGE);
    rustix::fs::fcntl_add_seals(&sealed, SealFlags::WRITE).expect("seals");
    assert!(refused(place(0, PAGE, 0, 0), sealed).contains("mapping failed"));
}

#[test]
fn overlaps_and_crowds_are_refused() {
    let base = memory(&[(0x4000, 0x2000)]);
    let user = 1 << 40;
    for (guest, length, user) in [
        (0x5fff, 1, 0),
        (0x4001, 1, 0),
        (0x3000, 0x4000, 0),
        (0x3000, 0x1001, 0),
        (0x9000, 0x1000, user + 0x4000),
        (0x9000, 0x1000, user + 0x5fff),
    ] {
        let added = base.with_region(place(guest, length, user, 0), file(0x4000));
        assert!(matches!(added, Err(MemoryError::Overlap(..))), "{guest:#x}+{length:#x}");
    }
    let table = |count: u64| (0..count).map(|n| (place(n * PAGE, PAGE, n * PAGE, 0), file(PAGE))).collect();
    let full = GuestMemory::map(table(REGIONS_MAX as u64)).expect("as many as allowed");
    assert!(matches!(GuestMemory::map(table(REGIONS_MAX as u64 + 1)), Err(MemoryError::TooMany)));
    let more = full.with_region(place(1 << 40, PAGE, 1 << 40, 0), file(PAGE));
    assert!(matches!(more, Err(MemoryError::TooMany)));
}

#[test]
fn regions_come_and_go_and_others_stay_mapped() {
    let first = memory(&[(0, PAGE), (2 * PAGE, PAGE)]);
    let second = first.with_region(place(PAGE, PAGE, PAGE, 0), file(PAGE)).expect("adds");
    assert_eq!(second.guest_end(), 3 * PAGE);
    let mut found = Vec::new();
    second.locate(0, 3 * PAGE as u32, &mut found).expect("no gap");
    assert_eq!(found.len(), 3);
    assert!(first.locate(0, 3 * PAGE as u32, &mut Vec::new()).is_err());
    // The same bytes by both.
    second.write(found[2], 0, b"shared");
    let mut bytes = [0; 6];
    first.read(Segment { region: 1, offset: 0, length: 6 }, 0, &mut bytes);
    assert_eq!(&bytes, b"shared");
    let gone = place(PAGE, PAGE, PAGE, 77);
    let third = second.without_region(gone).expect("the offset does not matter");
    assert_eq!(third.regions().len(), 2);
    assert!(matches!(third.without_region(gone), Err(MemoryError::Unknown(_))));
    let moved = place(0, PAGE, 1 + (1 << 40), 0);
    assert!(matches!(third.without_region(moved), Err(MemoryError::Unknown(_))));
}

#[test]
fn rings_are_found_by_the_front_ends_addresses() {
    let memory = memory(&[(0x8000, 2 * PAGE)]);
    let user = 0x8000 + (1 << 40);
    let ring = memory.ring(user + 16, 64, 16).expect("inside");
    assert_eq!((ring.length(), ring.guest_address()), (64, 0x8010));
    ring.store_u16(2, 0x0102, Ordering::Release);
    let mut bytes = [0; 2];
    ring.read(2, &mut bytes);
    assert_eq!(bytes, [2, 1], "little-endian");
    ring.store_u64(8, 7, Ordering::Relaxed);
    assert_eq!((ring.load_u64(8, Ordering::Acquire), ring.load_u32(12, Ordering::Relaxed)), (7, 0));
    ring.write(62, b"zz");
    for (address, length, align) in [
        (user + 8, 64, 16),
        (user + 2 * PAGE - 16, 32, 16),
        (user + 2 * PAGE, 16, 16),
        (user - 16, 32, 16),
        (0, 16, 16),
        (user, u64::MAX, 16),
        (user + 16, u64::MAX, 16),
        (user, 0, 16),
    ] {
        assert!(memory.ring(address, length, align).is_err(), "{address:#x}+{length:#x}");
    }
    drop(memory);
    assert_eq!(ring.load_u16(2, Ordering::Relaxed), 0x0102, "a ring keeps its memory");
}

#[test]
fn a_ring_must_be_aligned_in_our_memory_too() {
    let odd = GuestMemory::map(vec![(place(0, PAGE, 0x7000, 1), file(2 * PAGE))]).expect("maps");
    assert!(odd.ring(0x7000, 64, 16).is_err());
}

#[test]
fn the_log_has_a_bit_for_each_page_that_was_written() {
    let log_file = file(PAGE);
    let log = Arc::new(DirtyLog::map(log_file.as_fd(), 16, 8).expect("maps"));
    assert!(log.covers(64 * PAGE) && !log.covers(64 * PAGE + 1));
    let old = memory(&[(4 * PAGE, 4 * PAGE)]);
    let new = memory(&[(0, PAGE)]).with_log(Some(log));
    assert!(new.is_logged() && !old.is_logged());
    let mut found = Vec::new();
    old.locate(5 * PAGE - 1, 2, &mut found).expect("inside");
    new.log(&found, &old);
    new.log_range(15 * PAGE, 10 * PAGE);
    new.log_range(40 * PAGE, 0);
    new.log_range(63 * PAGE + 4095, 1 << 40);
    new.log_range(64 * PAGE, 1);
    new.log_range(u64::MAX, u64::MAX);
    old.log_range(33 * PAGE, 1);
    let mut bits = [0; 26];
    rustix::io::pread(&log_file, &mut bits, 15).expect("reads");
    assert_eq!(bits[..10], [0, 0b0011_0000, 0b1000_0000, 0xff, 0b0000_0001, 0, 0, 0, 0b1000_0000, 0]);
}

#[test]
fn a_page_that_vanishes_becomes_zeros() {
    let fd = file(4 * PAGE);
    let table = vec![(place(0, 4 * PAGE, 1 << 40, 0), fd.try_clone().expect("clones"))];
    let memory = GuestMemory::map(table).expect("maps");
    let healthy = self::memory(&[(0, PAGE)]);
    let all = Segment { region: 0, offset: 0, length: 4 * PAGE as u32 };
    memory.write(all, 0, &vec![7; 4 * PAGE as usize]);
    let ring = memory.ring((1 << 40) + 3 * PAGE, 64, 16).expect("inside");
    rustix::fs::ftruncate(&fd, PAGE).expect("shrinks");
    assert!(!memory.is_damaged(), "nobody has looked yet");
    assert_eq!(ring.load_u16(0, Ordering::Acquire), 0);
    assert!(memory.is_damaged() && !healthy.is_damaged());
    let mut bytes = vec![1; 4 * PAGE as usize];
    memory.read(all, 0, &mut bytes);
    assert!(bytes[..PAGE as usize].iter().all(|byte| *byte == 7));
    assert!(bytes[PAGE as usize..].iter().all(|byte| *byte == 0));
    memory.write(all, 2 * PAGE as u32, b"goes nowhere");
    ring.store_u32(4, 1, Ordering::Release);
}

#[test]
fn what_vanished_is_mended_for_the_kernel() {
    let fd = file(2 * PAGE);
    let memory =
        GuestMemory::map(vec![(place(0, 2 * PAGE, 0, 0), fd.try_clone().expect("clones"))]).expect("maps");
    rustix::fs::ftruncate(&fd, 0).expect("shrinks");
    let all = Segment { region: 0, offset: 0, length: 2 * PAGE as u32 };
    let target = file(2 * PAGE);
    let raw = memory.iovec(all);
    // SAFETY: the memory stays mapped until the end of this test; the kernel only reads it.
    let write = || unsafe { libc::pwritev(std::os::fd::AsRawFd::as_raw_fd(&target), &raw const raw, 1, 0) };
    assert_eq!(write(), -1);
    assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(libc::EFAULT));
    memory.mend(all);
    assert!(memory.is_damaged());
    assert_eq!(write(), 2 * PAGE as isize);
}

#[test]
fn huge_pages_are_mapped_whole() {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB;
    let fd = rustix::fs::memfd_create("huge", flags).expect("a kernel with huge pages");
    let huge = u64::try_from(rustix::fs::fstatfs(&fd).expect("statfs").f_bsize).expect("positive");
    assert!(huge > PAGE);
    rustix::fs::ftruncate(&fd, 2 * huge).expect("grows");
    // Starts and ends inside of a huge page each.
    let table = vec![(place(0, huge, 1 << 40, huge / 2), fd)];
    let memory = GuestMemory::map(table).expect("maps");
    let all = Segment { region: 0, offset: 0, length: huge as u32 };
    // Where no huge page is to be had, touching one is a SIGBUS: zeros take its place, a whole huge page at a time.
    for at in [0, huge as u32 / 2, huge as u32 - 8] {
        let mut bytes = [1; 8];
        memory.read(all, at, &mut bytes);
        assert_eq!(bytes, [0; 8]);
        memory.write(all, at, b"survives");
        memory.read(all, at, &mut bytes);
        assert_eq!(&bytes, b"survives");
    }
}
