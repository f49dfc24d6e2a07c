use super::*;
use rustix::io::Errno;
use rustix::net::{self, AddressFamily, SocketAddrUnix, SocketType};
use std::io::{ErrorKind, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;

/// Runs `inside` in a thread that is confined as the process would be; the others are not, nor is the thread missed.
fn confined<T: Send + 'static>(reach: Reach, inside: impl FnOnce(Confinement) -> T + Send + 'static) -> T {
    let thread = std::thread::spawn(move || {
        let confinement = restrict(&places(&reach)).expect("confines");
        inside(confinement)
    });
    thread.join().expect("what is tried inside goes as expected")
}

fn call(number: libc::c_long, arguments: [libc::c_long; 3]) -> Errno {
    let [first, second, third] = arguments;
    // SAFETY: only calls that are refused before they look at their arguments are made.
    let result = unsafe { libc::syscall(number, first, second, third) };
    assert_eq!(result, -1, "call {number} is not refused");
    Errno::from_io_error(&std::io::Error::last_os_error()).expect("an errno")
}

#[test]
fn both_layers_hold_on_this_kernel() {
    let confinement = confined(Reach::default(), |confinement| {
        let status = std::fs::read_to_string("/proc/thread-self/status");
        assert_eq!(status.expect_err("out of reach").kind(), ErrorKind::PermissionDenied);
        assert!(rustix::thread::no_new_privs().expect("answers"));
        confinement
    });
    assert_eq!(confinement, Confinement { user: false, landlock: true, seccomp: true });
    let mut registry = Registry::default();
    confinement.register(&mut registry);
    let mut page = String::new();
    prometheus_client::encoding::text::encode(&mut page, &registry).expect("encodes");
    for (by, is) in [("landlock", 1), ("seccomp", 1), ("user", 0)] {
        assert!(page.contains(&format!("spline_nebd_confined{{by=\"{by}\"}} {is}\n")), "{page}");
    }
}

#[test]
fn each_layer_alone_opens_no_file() {
    let landlock = || assert_ne!(shut_files(&Places::new()).expect("restricts"), RulesetStatus::NotEnforced);
    let seccomp = || seccomp::install().expect("restricts");
    let layers: [(fn(), Errno); 2] = [(landlock, Errno::ACCESS), (seccomp, Errno::PERM)];
    for (restrict, expected) in layers {
        let thread = std::thread::spawn(move || {
            rustix::thread::set_no_new_privs(true).expect("renounces");
            restrict();
            for refused in [std::fs::read("/etc/passwd").map(drop), std::fs::read_dir("/").map(drop)] {
                let error = refused.expect_err("refused");
                assert_eq!(Errno::from_io_error(&error), Some(expected));
            }
        });
        thread.join().expect("it is refused");
    }
}

#[test]
fn files_are_out_of_reach() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let file = dir.path().join("file");
    std::fs::write(&file, "x").expect("writes");
    confined(Reach::default(), move |_| {
        let denied = |result: std::io::Result<()>| {
            assert_eq!(result.expect_err("denied").kind(), ErrorKind::PermissionDenied);
        };
        denied(std::fs::read("/etc/passwd").map(drop));
        denied(std::fs::read_dir("/").map(drop));
        denied(std::fs::read(&file).map(drop));
        denied(std::fs::File::create(&file).map(drop));
        denied(std::fs::File::create(file.with_extension("new")).map(drop));
        denied(std::fs::remove_file(&file));
        denied(std::fs::rename(&file, file.with_extension("moved")));
        denied(std::fs::hard_link(&file, file.with_extension("linked")));
        denied(std::fs::create_dir(file.with_extension("dir")));
        denied(std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o777)));
        denied(std::os::unix::fs::lchown(&file, Some(1), None));
    });
}

#[test]
fn its_own_files_are_removed_and_renamed_and_nothing_more() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let other = tempfile::tempdir().expect("temporary directory");
    let path = |name: &str| dir.path().join(name);
    for name in ["own.sock", "pid.new"] {
        std::fs::write(path(name), "x").expect("writes");
    }
    std::fs::write(other.path().join("pid.new"), "x").expect("writes");
    let reach = Reach { removed: vec![path("own.sock")], renamed: Some(other.path().join("pid")) };
    let (dir, other) = (dir.path().to_owned(), other.path().to_owned());
    confined(reach, move |_| {
        std::fs::remove_file(dir.join("own.sock")).expect("removes");
        std::fs::rename(other.join("pid.new"), other.join("pid")).expect("renames");
        std::fs::remove_file(other.join("pid")).expect("removes");
        let refused = std::fs::rename(dir.join("pid.new"), dir.join("pid")).expect_err("not there");
        assert_eq!(refused.kind(), ErrorKind::PermissionDenied);
        assert!(std::fs::write(other.join("pid"), "y").is_err(), "no file is written");
    });
}

#[test]
fn no_program_and_no_process_is_started_or_touched() {
    confined(Reach::default(), |_| {
        let started = Command::new("/bin/true").spawn().expect_err("refused");
        assert_eq!(started.kind(), ErrorKind::PermissionDenied);
        assert_eq!(call(libc::SYS_execve, [0; 3]), Errno::PERM);
        assert_eq!(call(libc::SYS_ptrace, [libc::PTRACE_TRACEME.into(), 0, 0]), Errno::PERM);
        // A copy of this process, as fork makes it.
        assert_eq!(call(libc::SYS_clone, [libc::SIGCHLD.into(), 0, 0]), Errno::PERM);
        assert_eq!(call(libc::SYS_kill, [1, 0, 0]), Errno::PERM);
        assert_eq!(call(libc::SYS_setuid, [0; 3]), Errno::PERM);
        assert_eq!(call(libc::SYS_bpf, [0; 3]), Errno::PERM);
        assert_eq!(call(libc::SYS_io_uring_setup, [0; 3]), Errno::PERM);
        // What came after this was written.
        assert_eq!(call(100_000, [0; 3]), Errno::NOSYS);
        assert_eq!(call(libc::SYS_clone3, [0; 3]), Errno::NOSYS);
    });
}

#[test]
fn only_unix_sockets_are_made_and_none_is_bound() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = dir.path().join("gateway.sock");
    let first = UnixListener::bind(&path).expect("binds");
    let bound = crate::listener::Listener::tcp("127.0.0.1:0".parse().expect("an address")).expect("binds");
    let again = path.clone();
    // Another gateway takes the place of the first: its socket is a new file under the old name.
    std::fs::remove_file(&path).expect("removes");
    let second = UnixListener::bind(&path).expect("binds");
    drop(first);
    let hidden = SocketAddrUnix::new_abstract_name(path.as_os_str().as_encoded_bytes()).expect("fits");
    let abstract_one = net::socket(AddressFamily::UNIX, SocketType::STREAM, None).expect("creates");
    net::bind(&abstract_one, &hidden).expect("binds");
    net::listen(&abstract_one, 1).expect("listens");
    confined(Reach::default(), move |_| {
        UnixStream::connect(&again).expect("the gateway is within reach");
        let socket = net::socket(AddressFamily::UNIX, SocketType::STREAM, None).expect("creates");
        assert_eq!(net::connect(&socket, &hidden), Err(Errno::PERM), "it is no file");
        for family in
            [AddressFamily::INET, AddressFamily::INET6, AddressFamily::NETLINK, AddressFamily::VSOCK]
        {
            let refused = net::socket(family, SocketType::STREAM, None).expect_err("refused");
            assert_eq!(refused, Errno::PERM, "{family:?}");
        }
        assert!(UnixListener::bind(again.with_extension("new")).is_err());
        bound.open().expect("a socket that is bound is opened");
        assert!(bound.accept().expect("accepts").is_none());
    });
    second.accept().expect("it has connected");
}

#[test]
fn what_serving_takes_still_works() {
    confined(Reach::default(), |_| {
        let memory =
            rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::ALLOW_SEALING).expect("creates");
        rustix::fs::ftruncate(&memory, 1 << 20).expect("grows");
        rustix::fs::fcntl_add_seals(&memory, rustix::fs::SealFlags::SHRINK).expect("seals");
        let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).expect("creates");
        let poller = crate::poller::Poller::new().expect("creates");
        poller
            .add(std::os::fd::AsFd::as_fd(&event), 1, rustix::event::epoll::EventFlags::IN)
            .expect("watches");
        rustix::io::write(&event, &1u64.to_ne_bytes()).expect("rings");
        let (mut one, two) = UnixStream::pair().expect("pairs");
        // A thread inherits it all; so does what it starts.
        let thread = std::thread::spawn(move || {
            assert_eq!(call(libc::SYS_execve, [0; 3]), Errno::PERM);
            assert!(std::fs::read("/etc/passwd").is_err());
            drop(two);
        });
        thread.join().expect("threads start");
        assert!(one.write_all(b"x").is_err(), "the other end is closed");
        // SAFETY: a new mapping, touched only within its length, unmapped once.
        unsafe {
            use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
            let guest = mmap(
                std::ptr::null_mut(),
                4096,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &memory,
                0,
            );
            let guest = guest.expect("maps");
            guest.cast::<u8>().write(1);
            munmap(guest, 4096).expect("unmaps");
            let code = ProtFlags::READ | ProtFlags::EXEC;
            let refused =
                mmap_anonymous(std::ptr::null_mut(), 4096, code, MapFlags::PRIVATE).expect_err("refused");
            assert_eq!(refused, Errno::PERM);
        }
    });
}
