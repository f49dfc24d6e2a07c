//! Which system calls are refused, and how.
//!
//! Called by [`confine`](crate::confine). The lists say what nebd never does, not all that it does: what the C library and the
//! Rust library call for memory, threads and time changes with their versions, and a nebd that an update stops would take a
//! disk away. So
//! - what is listed answers EPERM, and the kernel's log names it (`audit: type=1326`);
//! - what the kernel got after these lists were written answers ENOSYS, as an older kernel would: libraries are prepared
//!   for that, and nothing new is open by default. So does `clone3`, whose flags no filter can see: libraries then use `clone`;
//! - everything else is allowed. Nothing is killed, but a call by the numbers of another architecture.
//!
//! A filter's answer for a call whose arguments it does not look at is remembered by the kernel, so the length of the list
//! costs the IO path nothing.

use anyhow::Context;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    sock_filter,
};
use std::collections::BTreeMap;
use std::io;

/// Refused whatever the arguments.
const NEVER: &[libc::c_long] = &[
    // Other programs and processes.
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_process_mrelease,
    libc::SYS_pidfd_open,
    libc::SYS_pidfd_getfd,
    libc::SYS_pidfd_send_signal,
    libc::SYS_kcmp,
    libc::SYS_kill,
    libc::SYS_rt_sigqueueinfo,
    libc::SYS_rt_tgsigqueueinfo,
    // Who we are.
    libc::SYS_setuid,
    libc::SYS_setgid,
    libc::SYS_setreuid,
    libc::SYS_setregid,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_setfsuid,
    libc::SYS_setfsgid,
    libc::SYS_setgroups,
    libc::SYS_capset,
    libc::SYS_personality,
    // Namespaces and mounts.
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_chroot,
    libc::SYS_pivot_root,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    late::STATMOUNT,
    late::LISTMOUNT,
    late::OPEN_TREE_ATTR,
    // Files: nothing is opened any more, with or without Landlock.
    libc::SYS_openat,
    libc::SYS_openat2,
    // What of files Landlock does not rule.
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    late::FCHMODAT2,
    libc::SYS_fchown,
    libc::SYS_fchownat,
    libc::SYS_setxattr,
    libc::SYS_lsetxattr,
    libc::SYS_fsetxattr,
    libc::SYS_removexattr,
    libc::SYS_lremovexattr,
    libc::SYS_fremovexattr,
    late::SETXATTRAT,
    late::REMOVEXATTRAT,
    late::FILE_SETATTR,
    libc::SYS_utimensat,
    libc::SYS_linkat,
    libc::SYS_symlinkat,
    libc::SYS_mknodat,
    libc::SYS_mkdirat,
    libc::SYS_name_to_handle_at,
    libc::SYS_open_by_handle_at,
    libc::SYS_fanotify_init,
    libc::SYS_fanotify_mark,
    libc::SYS_inotify_init1,
    libc::SYS_quotactl,
    libc::SYS_quotactl_fd,
    // The network: every socket is bound before.
    libc::SYS_bind,
    // The kernel's larger doors.
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_syslog,
    libc::SYS_vhangup,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_adjtimex,
    libc::SYS_clock_adjtime,
    libc::SYS_io_setup,
    libc::SYS_shmget,
    libc::SYS_shmat,
    libc::SYS_shmctl,
    libc::SYS_semget,
    libc::SYS_msgget,
    libc::SYS_mq_open,
    libc::SYS_memfd_secret,
];

/// The same, where an architecture has older ways.
#[cfg(target_arch = "x86_64")]
const NEVER_HERE: &[libc::c_long] = &[
    libc::SYS_fork,
    libc::SYS_vfork,
    libc::SYS_open,
    libc::SYS_creat,
    libc::SYS_chmod,
    libc::SYS_chown,
    libc::SYS_lchown,
    libc::SYS_utime,
    libc::SYS_utimes,
    libc::SYS_futimesat,
    libc::SYS_link,
    libc::SYS_symlink,
    libc::SYS_mknod,
    libc::SYS_mkdir,
    libc::SYS_inotify_init,
    libc::SYS_iopl,
    libc::SYS_ioperm,
    libc::SYS_modify_ldt,
    libc::SYS_uselib,
    libc::SYS_ustat,
    libc::SYS__sysctl,
];
#[cfg(not(target_arch = "x86_64"))]
const NEVER_HERE: &[libc::c_long] = &[];

/// Calls that libc does not number everywhere yet; these numbers are the same on all architectures.
mod late {
    pub(super) const FCHMODAT2: libc::c_long = 452;
    pub(super) const STATMOUNT: libc::c_long = 457;
    pub(super) const LISTMOUNT: libc::c_long = 458;
    pub(super) const SETXATTRAT: libc::c_long = 463;
    pub(super) const REMOVEXATTRAT: libc::c_long = 466;
    pub(super) const OPEN_TREE_ATTR: libc::c_long = 467;
    pub(super) const FILE_SETATTR: libc::c_long = 469;
}

/// The newest call that these lists have judged: `file_setattr` of Linux 6.17.
const NEWEST: u32 = late::FILE_SETATTR as u32;

/// Confines the calling thread, and those that it starts, for good. It must not be able to gain privileges any more.
///
/// # Errors
/// If the kernel has no seccomp, or this architecture no filters here.
pub fn install() -> anyhow::Result<()> {
    // Not logged: libraries try what is new, clone3 with each thread.
    load(&unknown(), 0).context("filter of unknown calls")?;
    load(&known()?, libc::SECCOMP_FILTER_FLAG_LOG).context("filter of known calls")
}

/// EPERM for what nebd never does.
fn known() -> anyhow::Result<BpfProgram> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        NEVER.iter().chain(NEVER_HERE).map(|call| (*call, Vec::new())).collect();
    let executable = || only_if(2, SeccompCmpOp::MaskedEq(libc::PROT_EXEC as u64), libc::PROT_EXEC as u64);
    let conditional = [
        // Threads, not processes.
        (libc::SYS_clone, vec![only_if(0, SeccompCmpOp::MaskedEq(libc::CLONE_THREAD as u64), 0)?]),
        // The gateway and systemd; NBD's sockets are there already.
        (libc::SYS_socket, vec![only_if(0, SeccompCmpOp::Ne, libc::AF_UNIX as u64)?]),
        (libc::SYS_socketpair, vec![only_if(0, SeccompCmpOp::Ne, libc::AF_UNIX as u64)?]),
        // No new code.
        (libc::SYS_mmap, vec![executable()?]),
        (libc::SYS_mprotect, vec![executable()?]),
        (libc::SYS_pkey_mprotect, vec![executable()?]),
        // Typing into the terminal that started us.
        (
            libc::SYS_ioctl,
            vec![
                only_if(1, SeccompCmpOp::Eq, libc::TIOCSTI)?,
                only_if(1, SeccompCmpOp::Eq, libc::TIOCLINUX)?,
            ],
        ),
    ];
    rules.extend(conditional);
    let arch = std::env::consts::ARCH.try_into()?;
    let refused = SeccompAction::Errno(libc::EPERM as u32);
    Ok(SeccompFilter::new(rules, SeccompAction::Allow, refused, arch)?.try_into()?)
}

/// A rule for calls of which the low half of an argument compares so.
fn only_if(argument: u8, how: SeccompCmpOp, value: u64) -> anyhow::Result<SeccompRule> {
    let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, how, value)?;
    Ok(SeccompRule::new(vec![condition])?)
}

/// ENOSYS for what came later, and for `clone3`. Also the x32 calls of x86-64, whose numbers are far up.
fn unknown() -> BpfProgram {
    let op = |code: u32, jt, jf, k| sock_filter { code: code as u16, jt, jf, k };
    let answer = |value| op(libc::BPF_RET | libc::BPF_K, 0, 0, value);
    vec![
        // The call's number is the first word of seccomp_data.
        op(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        op(libc::BPF_JMP | libc::BPF_JGT | libc::BPF_K, 2, 0, NEWEST),
        op(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 1, 0, libc::SYS_clone3 as u32),
        answer(libc::SECCOMP_RET_ALLOW),
        answer(libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32),
    ]
}

/// Gives the kernel a filter. seccompiler's own call can not ask for a log of what is refused.
fn load(program: &BpfProgram, flags: libc::c_ulong) -> io::Result<()> {
    let length = program.len().try_into().map_err(|_| io::ErrorKind::InvalidInput)?;
    // seccompiler's instruction is declared as the kernel's is, and as libc's.
    let filter =
        libc::sock_fprog { len: length, filter: program.as_ptr().cast::<libc::sock_filter>().cast_mut() };
    // SAFETY: the kernel copies the program, `len` instructions that live until the call returns, and writes nothing.
    let failed = unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, std::ptr::from_ref(&filter))
    };
    if failed == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
