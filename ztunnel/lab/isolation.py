"""Puts the controller into namespaces of its own before anything else runs, as root and as an ordinary user alike.

Network and mount namespace, so that nothing touches the host; a user namespace where the caller is not root, whose root it then is;
and a process namespace, whose first process the controller becomes: when it dies, by whatever signal, the kernel kills everything
that ever ran in the lab, however it was started. /proc stays the host's, therefore process ids in it are not those of `os.getpid()`.
Source: user_namespaces(7), pid_namespaces(7).
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path

from ztunnel.mesh.errors import LocalError

CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
MS_REC_PRIVATE = 0x4000 | 0x40000

_LIMITS = (
    ("/proc/sys/kernel/unprivileged_userns_clone", "0", "sysctl kernel.unprivileged_userns_clone=1"),
    ("/proc/sys/user/max_user_namespaces", "0", "sysctl user.max_user_namespaces=10000"),
    ("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1", "sysctl kernel.apparmor_restrict_unprivileged_userns=0"),
)


class NoNamespaces(LocalError):
    """This machine does not let the caller make namespaces; the text says what is missing."""


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A process that cannot be mistaken for a later one with the same number."""

    pid: int
    start_time: int

    def is_alive(self) -> bool:
        """Whether that very process still runs."""
        return start_time(self.pid) == self.start_time


def start_time(pid: int) -> int | None:
    """When a process began, in clock ticks after boot; None when there is none, or only its remains."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rsplit(b")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def host_process() -> ProcessId:
    """This process as /proc, and with it everybody outside of the lab, names it.

    Raises:
        NoNamespaces: /proc does not show it.
    """
    pid = int(os.readlink("/proc/self"))
    started = start_time(pid)
    if started is None:
        raise NoNamespaces(f"/proc does not show this process ({pid})")
    return ProcessId(pid, started)


def host_pid(pid: int) -> int | None:
    """The host's number of a child that has number `pid` here; None when it is gone. Source: proc_pid_fdinfo(5), pidfd."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    try:
        for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines():
            if line.startswith("Pid:"):
                return int(line.split()[1])
    finally:
        os.close(fd)
    return None


def enter_namespaces() -> None:
    """Leave the host: on return this is a new process, the first of the lab's process namespace; the old one has exited.

    Must be called before any thread exists.

    Raises:
        NoNamespaces: the kernel does not allow it; the text says what is missing.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    wanted = CLONE_NEWNET | CLONE_NEWNS | CLONE_NEWPID
    uid, gid = os.geteuid(), os.getegid()
    if libc.unshare(wanted) != 0:
        if libc.unshare(wanted | CLONE_NEWUSER) != 0:
            raise NoNamespaces(_missing(ctypes.get_errno()))
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    if libc.mount(b"none", b"/", None, ctypes.c_ulong(MS_REC_PRIVATE), None) != 0:
        raise NoNamespaces(f"cannot make the lab's mounts private: {os.strerror(ctypes.get_errno())}")
    if os.fork() != 0:
        os._exit(0)


def _missing(code: int) -> str:
    hints = [remedy for path, bad, remedy in _LIMITS if _reads(path) == bad]
    if not hints and os.geteuid() == 0:
        hints = ["CAP_SYS_ADMIN (in a container: --privileged, or --cap-add SYS_ADMIN,NET_ADMIN with seccomp and AppArmor unconfined)"]
    advice = "; ".join(hints) or "run as root, or allow user namespaces for this user"
    return f"cannot make the lab's namespaces ({os.strerror(code)}). Missing: {advice}"


def _reads(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
