"""The seccomp profile of containers, in the OCI's form: what is not named fails with EPERM.

Named is what Python, PyTorch, Ray, HAProxy and the GPUs' user-space drivers call. Left out are,
among what a container's default profile lets through or an unprivileged user may call: tracing
other processes, keyrings, io_uring, userfaultfd, mounts and namespaces, packet and crypto sockets,
and typing into the terminal (TIOCSTI).
"""

from __future__ import annotations

import json
import socket
from typing import Any

EPERM, ENOSYS = 1, 38
_TIOCSTI = 0x5412
_NEW_NAMESPACE = 0x7E020000
"""CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET of linux/sched.h."""
_PERSONALITIES = (0x0, 0xFFFFFFFF)
"""The usual one, and the question which one it is."""
_FAMILIES = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK)

_GROUPS = {
    "files": """
        access chdir chmod close close_range copy_file_range creat dup dup2 dup3 faccessat
        faccessat2 fadvise64 fallocate fchdir fchmod fchmodat fchmodat2 fcntl fdatasync fgetxattr
        flistxattr flock fremovexattr fsetxattr fstat fstatfs fsync ftruncate futimesat getcwd
        getdents getdents64 getxattr lgetxattr link linkat listxattr llistxattr lremovexattr
        lseek lsetxattr lstat mkdir mkdirat mknod mknodat newfstatat open openat openat2 pread64
        preadv preadv2 pwrite64 pwritev pwritev2 read readahead readlink readlinkat readv
        removexattr rename renameat renameat2 rmdir sendfile setxattr splice stat statfs statx
        symlink symlinkat sync sync_file_range syncfs tee truncate umask unlink unlinkat utime
        utimensat utimes vmsplice write writev""",
    "waiting": """
        epoll_create epoll_create1 epoll_ctl epoll_pwait epoll_pwait2 epoll_wait eventfd eventfd2
        inotify_add_watch inotify_init inotify_init1 inotify_rm_watch io_cancel io_destroy
        io_getevents io_pgetevents io_setup io_submit pipe pipe2 poll ppoll pselect6 select
        signalfd signalfd4 timerfd_create timerfd_gettime timerfd_settime""",
    "memory": """
        brk get_mempolicy madvise mbind membarrier memfd_create mincore mlock mlock2 mlockall mmap
        move_pages mprotect mremap msync munlock munlockall munmap pkey_alloc pkey_free
        pkey_mprotect set_mempolicy set_mempolicy_home_node shmat shmctl shmdt shmget""",
    "processes and threads": """
        arch_prctl capget execve execveat exit exit_group fork futex futex_waitv get_robust_list
        get_thread_area getcpu getpgid getpgrp getpid getppid getpriority getrlimit getrusage
        getsid gettid ioprio_get ioprio_set kill pidfd_open pidfd_send_signal prctl prlimit64 rseq
        sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getattr
        sched_getparam sched_getscheduler sched_rr_get_interval sched_setaffinity sched_setattr
        sched_setparam sched_setscheduler sched_yield semctl semget semop semtimedop
        set_robust_list set_thread_area set_tid_address setpgid setpriority setrlimit setsid
        tgkill times tkill vfork wait4 waitid""",
    "signals and time": """
        alarm clock_getres clock_gettime clock_nanosleep getitimer gettimeofday nanosleep pause
        restart_syscall rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn
        rt_sigsuspend rt_sigtimedwait rt_tgsigqueueinfo setitimer sigaltstack time timer_create
        timer_delete timer_getoverrun timer_gettime timer_settime""",
    "network": """
        accept accept4 bind connect getpeername getsockname getsockopt listen recvfrom recvmmsg
        recvmsg sendmmsg sendmsg sendto setsockopt shutdown socketpair""",
    "who and where": """
        getegid geteuid getgid getgroups getrandom getresgid getresuid getuid sysinfo uname""",
    # The container's runtime calls these after it has loaded the profile; the capabilities they
    # need are dropped with the rest.
    "the container's runtime": """
        capset chown fchown fchownat lchown setfsgid setfsuid setgid setgroups setregid setresgid
        setresuid setreuid setuid""",
}


def profile() -> dict[str, Any]:
    """Return the profile: linux.seccomp of the OCI's runtime specification, as Docker reads it."""
    rules: list[dict[str, Any]] = [
        {"names": names.split(), "action": "SCMP_ACT_ALLOW", "comment": group}
        for group, names in _GROUPS.items()
    ]
    rules += [
        _allow("clone", "no new namespaces", _compare(0, "MASKED_EQ", _NEW_NAMESPACE, 0)),
        _allow("ioctl", "all but TIOCSTI", _compare(1, "NE", _TIOCSTI)),
        *(_allow("socket", family.name, _compare(0, "EQ", int(family))) for family in _FAMILIES),
        *(_allow("personality", "", _compare(0, "EQ", value)) for value in _PERSONALITIES),
        {
            "names": ["clone3"],
            "action": "SCMP_ACT_ERRNO",
            "errnoRet": ENOSYS,
            "comment": "its flags lie in memory, where no filter sees them; libc then calls clone",
        },
    ]
    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": EPERM,
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": rules,
    }


def render() -> str:
    """Return the profile as JSON."""
    return json.dumps(profile(), indent=2) + "\n"


def _allow(name: str, comment: str, condition: dict[str, Any]) -> dict[str, Any]:
    rule = {"names": [name], "action": "SCMP_ACT_ALLOW", "args": [condition]}
    return {**rule, "comment": comment} if comment else rule


def _compare(index: int, operator: str, value: int, value_two: int | None = None) -> dict[str, Any]:
    """Return a condition on an argument; for MASKED_EQ `value` is the mask."""
    condition: dict[str, Any] = {"index": index, "value": value, "op": f"SCMP_CMP_{operator}"}
    return condition if value_two is None else {**condition, "valueTwo": value_two}
