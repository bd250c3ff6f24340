"""Network namespaces: the only caller of setns(2) and unshare(2) in this project.

Invariant: a thread that outlives a call is in the namespace it was in before. There are two ways in:

- `inside(fd)`: a hop of the calling thread, for making sockets. The block is synchronous: no `await`, no thread start and no
  subprocess in it. A thread that cannot return would go on to act in the pod's namespace, so the process ends instead.
- `run_inside(fd, fn, ...)`: a throw-away thread, for everything that keeps state per thread (netlink libraries, /proc/sys/net).
  Under trio always `trio.to_thread.run_sync(run_inside, fd, fn, ...)`: trio's pooled threads themselves never enter a namespace.

A socket belongs for ever to the namespace it was created in, and keeps that namespace alive.
Source: setns(2), network_namespaces(7). Python has `os.setns` only from 3.12 on, hence ctypes.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn, ParamSpec, TypeVar

from ztunnel.mesh.errors import LocalError

CLONE_NEWNET = 0x40000000
CLONE_NEWCGROUP = 0x02000000
NS_GET_NSTYPE = 0xB703  # ioctl_ns(2)
MS_BIND = 0x1000
MNT_DETACH = 0x2
# Not /proc/self: that is the main thread's namespace, whoever asks.
CURRENT = "/proc/thread-self/ns/net"

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_void_p)
_libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)

P = ParamSpec("P")
T = TypeVar("T")


class NetnsError(LocalError):
    """A network namespace that cannot be made, opened or entered."""


@dataclass(frozen=True, slots=True)
class NetnsId:
    """Which namespace this is: two file descriptors are the same namespace if and only if these agree."""

    device: int
    inode: int


def identity(fd: int) -> NetnsId:
    """The identity of an open namespace."""
    found = os.fstat(fd)
    return NetnsId(found.st_dev, found.st_ino)


def identity_at(path: str) -> NetnsId | None:
    """The identity of the namespace that `path` leads to, or None when there is nothing to be seen (any more)."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return NetnsId(found.st_dev, found.st_ino)


def open_current() -> int:
    """A new file descriptor of the calling thread's namespace; the caller closes it.

    Raises: NetnsError when file descriptors are used up.
    """
    try:
        return os.open(CURRENT, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise NetnsError(f"cannot open the current namespace: {error.strerror}") from error


def open_path(path: str) -> int:
    """A new file descriptor of the namespace at `path` (bind mount, symbolic link or /proc file); the caller closes it.

    Raises: NetnsError when there is nothing, when it may not be opened, or when it is not a network namespace.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise NetnsError(f"cannot open namespace {path}: {error.strerror}") from error
    try:
        kind = fcntl.ioctl(fd, NS_GET_NSTYPE)
    except OSError:
        kind = 0  # ENOTTY: a plain file, e.g. an unmounted leftover of a bind mount
    if kind != CLONE_NEWNET:
        os.close(fd)
        raise NetnsError(f"{path} is not a network namespace")
    return fd


@contextmanager
def inside(fd: int) -> Iterator[None]:
    """The calling thread is in namespace `fd` during the block. Nothing in the block may wait, start a thread or a process.

    Raises: NetnsError when the namespace cannot be entered. A failure to return ends the process.
    """
    home = open_current()
    try:
        _enter(fd)
        try:
            yield
        finally:
            _return(home)
    finally:
        os.close(home)


def run_inside(fd: int, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The result of `fn`, run to its end in a new thread that is in namespace `fd` and dies with the call.

    Raises: NetnsError when the namespace cannot be entered; whatever `fn` raises.
    """

    def body() -> T:
        _enter(fd)
        return fn(*args, **kwargs)

    return _in_new_thread(body)


def run_inside_with_cgroups(fd: int, cgroups_fd: int, fn: Callable[[], T]) -> T:
    """`run_inside` for the host's namespaces: also in a namespace of control groups, where nf_tables counts a group's depth from its root.

    Raises: NetnsError when one of them cannot be entered; whatever `fn` raises.
    """

    def body() -> T:
        _enter(fd)
        _check(_libc.setns(cgroups_fd, CLONE_NEWCGROUP), "enter the namespace of control groups")
        return fn()

    return _in_new_thread(body)


def new() -> int:
    """A file descriptor of a new, empty namespace (its `lo` is down); it lives as long as something refers to it.

    Raises: NetnsError without CAP_SYS_ADMIN or when the limit of namespaces is reached.
    """

    def body() -> int:
        _check(_libc.unshare(CLONE_NEWNET), "make a network namespace")
        return open_current()

    return _in_new_thread(body)


def pin(fd: int, path: str) -> None:
    """Bind-mount namespace `fd` at `path`, which is created and must not exist: it then outlives this process.

    Raises: NetnsError when the mount fails; nothing is left at `path` then.
    """
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444))
    except OSError as error:
        raise NetnsError(f"cannot create {path}: {error.strerror}") from error
    try:
        _check(_libc.mount(f"/proc/self/fd/{fd}".encode(), os.fsencode(path), b"none", MS_BIND, None), f"mount a namespace at {path}")
    except NetnsError:
        os.unlink(path)
        raise


def unpin(path: str) -> None:
    """Undo `pin`. A path that is not there, or no longer mounted, is no error."""
    _libc.umount2(os.fsencode(path), MNT_DETACH)
    try:
        os.unlink(path)
    except FileNotFoundError:
        return


def _in_new_thread(body: Callable[[], T]) -> T:
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(body())
        except BaseException as error:  # noqa: BLE001 - handed over whole to the thread that waits; nothing is swallowed
            future.set_exception(error)

    thread = threading.Thread(target=run, name="netns")
    try:
        thread.start()
    except RuntimeError as error:  # the limit of tasks is reached
        raise NetnsError(f"cannot enter a network namespace: {error}") from error
    thread.join()
    return future.result()


def _enter(fd: int) -> None:
    _check(_libc.setns(fd, CLONE_NEWNET), "enter the network namespace")


def _return(home: int) -> None:
    try:
        _check(_libc.setns(home, CLONE_NEWNET), "return from a network namespace")
    except NetnsError as error:
        _die(str(error))


def _die(reason: str) -> NoReturn:
    """End the process now: no handler, no cleanup, nothing more may run in the wrong namespace."""
    os.write(2, f"fatal: {reason}; the process ends rather than act in a pod's namespace\n".encode())
    os._exit(70)


def _check(result: int, action: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise NetnsError(f"cannot {action}: {os.strerror(number)}")
