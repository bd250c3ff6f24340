"""Puts the test process into user, network and mount namespaces of its own.

Done once, in the process itself and before the first test, so that a breakpoint, a coverage measurement and a signal all still meet one
process. `/run` becomes a private tmpfs (named network namespaces live there); everything else of the file system stays.
An ordinary user becomes root of a new user namespace, as with `unshare -Urnm`; root keeps its user and takes only the other two.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from fcntl import ioctl
from pathlib import Path

CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000
MS_NOSUID_NODEV = 0x2 | 0x4
MS_REC_PRIVATE = 0x4000 | 0x40000
SIOCGIFFLAGS = 0x8913
SIOCSIFFLAGS = 0x8914
IFF_UP = 0x1

_libc = ctypes.CDLL(None, use_errno=True)
_outcome: list[str | None] = []  # empty: not tried yet; [None]: isolated; [text]: why not. A process is isolated once, for ever.


def isolate() -> str | None:
    """Enter new namespaces, once; later calls return the first outcome.

    Returns: None when this process now is alone on its network, otherwise why that is not possible.
    """
    if not _outcome:
        try:
            _enter()
        except OSError as error:
            _outcome.append(f"no network namespaces here: {error.strerror} ({_hint()})")
        else:
            _outcome.append(None)
    return _outcome[0]


def refusal() -> str | None:
    """Why namespace tests cannot run; None when they can or nothing has asked yet."""
    return _outcome[0] if _outcome else None


def debugging_line() -> str:
    """The command that opens a shell where the tests run, while they run (`--pdb`)."""
    user = "" if Path("/proc/self/uid_map").read_text().split() == ["0", "0", "4294967295"] else "--user --preserve-credentials "
    return f"nsenter {user}--mount --net --target {os.getpid()}"


def _enter() -> None:
    uid, gid = os.getuid(), os.getgid()
    flags = CLONE_NEWNS | CLONE_NEWNET
    if uid == 0:
        _call("unshare", _libc.unshare(flags))
    else:
        _call("unshare", _libc.unshare(flags | CLONE_NEWUSER))
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
    _call("mount", _libc.mount(b"none", b"/", None, MS_REC_PRIVATE, None))
    _call("mount", _libc.mount(b"tmpfs", b"/run", b"tmpfs", MS_NOSUID_NODEV, b"mode=0755"))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        (active,) = struct.unpack_from("H", ioctl(control, SIOCGIFFLAGS, struct.pack("16sH14x", b"lo", 0)), 16)
        ioctl(control, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", active | IFF_UP))


def _call(name: str, result: int) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def _hint() -> str:
    return "run as root, or allow user namespaces: sysctl kernel.unprivileged_userns_clone and user.max_user_namespaces"
