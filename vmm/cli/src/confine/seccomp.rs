//! The system calls a guest's process makes, and no other.
//!
//! Two lists. What only a network thread or the main thread does (sockets, opening files, making threads) is not on the
//! list of a vCPU's thread, whose `ioctl`s must moreover be KVM's own. The lists are what `strace` sees the end-to-end
//! tests do, and what glibc and the Rust runtime do in rarer cases (a signal, a large allocation, a panic's message). A
//! call outside ends the process: a VMM that does what it never does is not to be trusted with the next instruction.
//! `--seccomp log` only reports it in the kernel's log, to find out what a new environment needs.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

use crate::args::Seccomp;
use crate::exit::Failure;

/// What a thread is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Class {
    /// Runs guest code.
    Vcpu,
    /// Everything else: network, API, devices, encoding.
    Host,
}

/// What every thread may do: memory, locks, signals, time, reading and writing what is open, ending.
const EVERY: &[libc::c_long] = &[
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    // A driver that resets its device does so on a vCPU's thread, and with it ends what the device was connected to.
    libc::SYS_epoll_ctl,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_fstat,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_lseek,
    libc::SYS_madvise,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_read,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_sendto,
    libc::SYS_set_robust_list,
    libc::SYS_shutdown,
    libc::SYS_sigaltstack,
    libc::SYS_tgkill,
    libc::SYS_write,
    libc::SYS_writev,
];

/// What the others may do beside that.
const HOST: &[libc::c_long] = &[
    libc::SYS_accept4,
    libc::SYS_access,
    libc::SYS_arch_prctl,
    libc::SYS_bind,
    libc::SYS_capget,
    libc::SYS_capset,
    libc::SYS_chmod,
    libc::SYS_clone,
    libc::SYS_clone3,
    libc::SYS_connect,
    libc::SYS_copy_file_range,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_wait,
    libc::SYS_eventfd2,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_fadvise64,
    libc::SYS_fallocate,
    libc::SYS_fchmod,
    libc::SYS_fcntl,
    libc::SYS_fdatasync,
    libc::SYS_flock,
    libc::SYS_fstatfs,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_getcwd,
    libc::SYS_getdents64,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getpeername,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_getuid,
    libc::SYS_ioctl,
    libc::SYS_landlock_add_rule,
    libc::SYS_landlock_create_ruleset,
    libc::SYS_landlock_restrict_self,
    libc::SYS_linkat,
    libc::SYS_listen,
    libc::SYS_membarrier,
    libc::SYS_memfd_create,
    libc::SYS_mincore,
    libc::SYS_mkdir,
    libc::SYS_mkdirat,
    libc::SYS_newfstatat,
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_pipe2,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_prctl,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_prlimit64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmmsg,
    libc::SYS_recvmsg,
    libc::SYS_rename,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_rmdir,
    libc::SYS_sched_setaffinity,
    libc::SYS_seccomp,
    libc::SYS_sendmmsg,
    libc::SYS_sendmsg,
    libc::SYS_set_tid_address,
    libc::SYS_setgroups,
    libc::SYS_setresgid,
    libc::SYS_setresuid,
    libc::SYS_setsockopt,
    libc::SYS_sigaltstack,
    libc::SYS_signalfd4,
    libc::SYS_socket,
    libc::SYS_socketpair,
    libc::SYS_statfs,
    libc::SYS_statx,
    libc::SYS_sync_file_range,
    libc::SYS_syncfs,
    libc::SYS_sysinfo,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_uname,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    libc::SYS_userfaultfd,
];

/// Confine the calling thread, and those it makes.
pub(super) fn apply(class: Class, how: Seccomp) -> Result<(), Failure> {
    let otherwise = match how {
        Seccomp::Off => return Ok(()),
        Seccomp::On => SeccompAction::KillProcess,
        Seccomp::Log => SeccompAction::Log,
    };
    let program = program(class, otherwise).map_err(|error| Failure::failed(format!("seccomp: {error}")))?;
    seccompiler::apply_filter(&program).map_err(|error| Failure::failed(format!("seccomp: {error}")))
}

fn program(class: Class, otherwise: SeccompAction) -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = EVERY.iter().map(|call| (*call, Vec::new())).collect();
    match class {
        Class::Host => rules.extend(HOST.iter().map(|call| (*call, Vec::new()))),
        Class::Vcpu => {
            rules.insert(libc::SYS_ioctl, vec![SeccompRule::new(vec![kvms_own()?])?]);
        }
    }
    let here = TargetArch::try_from(std::env::consts::ARCH)?;
    SeccompFilter::new(rules, otherwise, SeccompAction::Allow, here)?.try_into()
}

/// An ioctl's second argument says whose it is in its second byte; KVM's is 0xae (linux/kvm.h, `KVMIO`).
fn kvms_own() -> Result<SeccompCondition, seccompiler::BackendError> {
    const WHOSE: u64 = 0xff00;
    const KVM: u64 = 0xae00;
    SeccompCondition::new(1, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(WHOSE), KVM)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_class_has_a_filter_the_kernel_could_take() {
        for class in [Class::Vcpu, Class::Host] {
            let program = program(class, SeccompAction::KillProcess).unwrap();
            assert!((40..4096).contains(&program.len()), "{class:?}: {}", program.len());
        }
    }

    #[test]
    fn a_vcpu_cannot_open_connect_or_start_anything() {
        for call in [
            libc::SYS_openat,
            libc::SYS_socket,
            libc::SYS_connect,
            libc::SYS_clone3,
            libc::SYS_unlink,
            libc::SYS_prctl,
        ] {
            assert!(HOST.contains(&call) && !EVERY.contains(&call), "{call}");
        }
        for call in [
            libc::SYS_execve,
            libc::SYS_ptrace,
            libc::SYS_mount,
            libc::SYS_bpf,
            libc::SYS_fork,
        ] {
            assert!(!HOST.contains(&call) && !EVERY.contains(&call), "{call}");
        }
    }
}
