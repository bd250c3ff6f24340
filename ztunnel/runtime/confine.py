"""Takes from a worker every privilege that it does not need: it moves bytes between descriptors that it was given, nothing else.

In order: an unprivileged user where there is one to become, no capability in any set, no new privileges by exec, and a system-call
filter that refuses what a proxy never does: opening files, new sockets and listeners, new processes, threads and programs, signals
to others and changes of their limits, namespaces, mounts, tracing, modules. A worker that is taken over holds the keys and
connections of its pods and can reach for nothing more.

What cannot be done here (no second user in a user namespace, no seccomp in the kernel) is left out and told, because a mesh that runs
beats one that does not; the same holds for machines whose system-call numbers are not in the table below.
Source: capabilities(7), prctl(2), seccomp(2).
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from dataclasses import dataclass

_PR_CAPBSET_DROP = 24
_PR_SET_DUMPABLE = 4
_PR_SET_NO_NEW_PRIVS = 38
_PR_SET_SECCOMP = 22
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_SECCOMP_MODE_FILTER = 2
_LINUX_CAPABILITY_VERSION_3 = 0x20080522
_NOBODY = 65534

_ALLOW = 0x7FFF0000
_REFUSE = 0x00050000 | errno.EPERM
_KILL = 0x80000000
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_NUMBER_AT, _ARCHITECTURE_AT = 0, 4
_X32_BIT = 0x40000000

_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_REFUSED: dict[str, dict[str, int]] = {
    "x86_64": {
        "open": 2, "openat": 257, "openat2": 437, "socket": 41, "listen": 50, "clone": 56, "fork": 57, "vfork": 58,
        "execve": 59, "kill": 62, "ptrace": 101,
        "mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161, "setns": 308, "unshare": 272, "init_module": 175,
        "finit_module": 313, "delete_module": 176, "kexec_load": 246, "bpf": 321, "perf_event_open": 298, "userfaultfd": 323,
        "process_vm_readv": 310, "process_vm_writev": 311, "execveat": 322, "clone3": 435, "pidfd_getfd": 438, "pidfd_send_signal": 424,
        "open_tree": 428, "move_mount": 429, "fsopen": 430, "io_uring_setup": 425, "keyctl": 250, "add_key": 248, "reboot": 169,
        "swapon": 167, "personality": 135, "symlink": 88, "rename": 82, "unlink": 87, "mkdir": 83, "chmod": 90, "chown": 92,
        "truncate": 76, "creat": 85, "renameat2": 316, "unlinkat": 263, "mkdirat": 258, "fchmodat": 268, "fchownat": 260, "linkat": 265,
        "symlinkat": 266, "mknodat": 259, "mknod": 133, "link": 86, "rmdir": 84, "lchown": 94, "chdir": 80, "utimensat": 280,
        "fchmodat2": 452, "setxattr": 188, "lsetxattr": 189, "removexattr": 197, "lremovexattr": 198, "open_by_handle_at": 304,
        "name_to_handle_at": 303, "fsconfig": 431, "fsmount": 432, "fspick": 433, "mount_setattr": 442, "tkill": 200, "tgkill": 234,
        "rt_sigqueueinfo": 129, "rt_tgsigqueueinfo": 297, "pidfd_open": 434, "process_madvise": 440, "kcmp": 312, "prlimit64": 302,
        "setrlimit": 160, "setpriority": 141, "ioprio_set": 251, "sched_setscheduler": 144, "sched_setparam": 142, "sched_setattr": 314,
        "sched_setaffinity": 203, "migrate_pages": 256, "move_pages": 279, "socketpair": 53, "shmget": 29, "msgget": 68, "semget": 64,
        "mq_open": 240, "memfd_create": 319, "inotify_init": 253, "inotify_init1": 294, "fanotify_init": 300, "io_uring_enter": 426,
        "fchmod": 91, "fchown": 93, "ftruncate": 77, "fallocate": 285, "fsetxattr": 190, "fremovexattr": 199,
        "io_uring_register": 427, "request_key": 249, "kexec_file_load": 320, "syslog": 103, "acct": 163, "quotactl": 179, "swapoff": 168,
    },
    "aarch64": {
        "openat": 56, "openat2": 437, "socket": 198, "listen": 201, "clone": 220, "execve": 221, "kill": 129, "ptrace": 117, "mount": 40,
        "umount2": 39, "pivot_root": 41, "chroot": 51, "setns": 268, "unshare": 97, "init_module": 105, "finit_module": 273,
        "delete_module": 106, "kexec_load": 104, "bpf": 280, "perf_event_open": 241, "userfaultfd": 282, "process_vm_readv": 270,
        "process_vm_writev": 271, "execveat": 281, "clone3": 435, "pidfd_getfd": 438, "pidfd_send_signal": 424, "open_tree": 428,
        "move_mount": 429, "fsopen": 430, "io_uring_setup": 425, "keyctl": 219, "add_key": 217, "reboot": 142, "swapon": 224,
        "personality": 92, "renameat2": 276, "unlinkat": 35, "mkdirat": 34, "fchmodat": 53, "fchownat": 54, "linkat": 37,
        "symlinkat": 36, "mknodat": 33, "truncate": 45, "chdir": 49, "utimensat": 88, "fchmodat2": 452, "setxattr": 5, "lsetxattr": 6,
        "removexattr": 14, "lremovexattr": 15, "open_by_handle_at": 265, "name_to_handle_at": 264, "fsconfig": 431, "fsmount": 432,
        "fspick": 433, "mount_setattr": 442, "tkill": 130, "tgkill": 131, "rt_sigqueueinfo": 138, "rt_tgsigqueueinfo": 240,
        "pidfd_open": 434, "process_madvise": 440, "kcmp": 272, "prlimit64": 261, "setrlimit": 164, "setpriority": 140, "ioprio_set": 30,
        "sched_setscheduler": 119, "sched_setparam": 118, "sched_setattr": 274, "sched_setaffinity": 122, "migrate_pages": 238,
        "move_pages": 239, "socketpair": 199, "shmget": 194, "msgget": 186, "semget": 190, "mq_open": 180, "memfd_create": 279,
        "inotify_init1": 26, "fanotify_init": 262, "io_uring_enter": 426, "io_uring_register": 427, "request_key": 218,
        "fchmod": 52, "fchown": 55, "ftruncate": 46, "fallocate": 47, "fsetxattr": 7, "fremovexattr": 16,
        "kexec_file_load": 294, "syslog": 116, "acct": 89, "quotactl": 60, "swapoff": 225,
    },
}  # fmt: skip
"""Numbers of the system calls that a worker never makes, by machine. Source: the kernel's `syscall_64.tbl` and `asm-generic/unistd.h`."""


@dataclass(frozen=True, slots=True)
class Confinement:
    """What was taken, for the log. `missing` names what could not be."""

    user: int
    filtered: bool
    missing: tuple[str, ...]


def confine(allowed: frozenset[str] = frozenset()) -> Confinement:
    """Gives up all privileges of this process, for good. Everything that must be imported or opened has been.

    Args:
        allowed: system calls of the table that this process makes all the same, `socket` for one that dials by itself.
    Raises:
        OSError: the kernel refuses to take a privilege away that it would take: nothing should go on then.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    missing: list[str] = []
    _drop_bounding_set(libc)
    if not _become_nobody():
        missing.append("an unprivileged user")
    _clear_capabilities(libc)
    _prctl(libc, _PR_SET_NO_NEW_PRIVS, 1)
    hide_memory()
    filtered = _filter(libc, allowed)
    if not filtered:
        missing.append("a system-call filter")
    return Confinement(os.geteuid(), filtered, tuple(missing))


def hide_memory() -> None:
    """No core dump of this process, and nobody of its user may read its memory: it holds private keys.

    Raises:
        OSError: the kernel refuses.
    """
    _prctl(ctypes.CDLL(None, use_errno=True), _PR_SET_DUMPABLE, 0)


def _become_nobody() -> bool:
    """False where there is nobody to become: not root, or a user namespace that has one user only."""
    if os.geteuid() != 0:
        return True
    try:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EPERM):
            raise
        return False
    return True


def _drop_bounding_set(libc: ctypes.CDLL) -> None:
    for capability in range(64):
        if libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
            # EINVAL: past the kernel's last capability. EPERM: there is no CAP_SETPCAP to do it with, and so nothing to lose by exec.
            return


def _clear_capabilities(libc: ctypes.CDLL) -> None:
    libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    header = struct.pack("=Ii", _LINUX_CAPABILITY_VERSION_3, 0)
    if libc.capset(header, bytes(24)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"capset: {os.strerror(code)}")


def _filter(libc: ctypes.CDLL, allowed: frozenset[str]) -> bool:
    """False where the kernel has no seccomp, or this machine's system-call numbers are not known here."""
    program = seccomp_program(platform.machine(), allowed)
    if not program:
        return False
    buffer = ctypes.create_string_buffer(program, len(program))

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]

    installed = Program(len(program) // 8, ctypes.cast(buffer, ctypes.c_void_p))
    if libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(installed), 0, 0) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS):
        return False
    raise OSError(code, f"seccomp: {os.strerror(code)}")


def seccomp_program(machine: str, allowed: frozenset[str] = frozenset()) -> bytes:
    """The classic BPF program for a machine: refuse the calls of the table with EPERM, allow the rest. Empty for an unknown machine.

    A call in another architecture's numbering (32-bit on a 64-bit kernel) kills the process: it could only be an escape.
    """
    if machine not in _ARCHITECTURES:
        return b""
    numbers = sorted(number for name, number in _REFUSED[machine].items() if name not in allowed)
    instructions = [
        (_LOAD, 0, 0, _ARCHITECTURE_AT),
        (_EQUAL, 1, 0, _ARCHITECTURES[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER_AT),
        (_AT_LEAST, len(numbers) + 1, 0, _X32_BIT),
    ]
    instructions += [(_EQUAL, len(numbers) - index, 0, number) for index, number in enumerate(numbers)]
    instructions += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _REFUSE)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in instructions)


def _prctl(libc: ctypes.CDLL, option: int, value: int) -> None:
    if libc.prctl(option, value, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl {option}: {os.strerror(code)}")
