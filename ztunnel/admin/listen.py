"""The sockets that operators reach: TCP ports on the node and the control socket in the file system.

Invariant: the control socket is never reachable by anybody but its owner, not even for the moment between bind and chmod; a socket
of a dead process is replaced, one that answers is left alone.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import trio

from ztunnel.mesh.errors import LocalError

BACKLOG = 64


class ListenError(LocalError):
    """A port or a socket that cannot be had; the text says which and why."""


async def open_ports(address: str, port: int, setting: str) -> list[trio.SocketListener]:
    """Listeners of one TCP port.

    Args:
        address: an IP literal, or `*` for all addresses of both families.
        setting: the port's name in the settings, for the error.
    Raises:
        ListenError: the port is taken, or the address is not ours.
    """
    try:
        return await trio.open_tcp_listeners(port, host=None if address == "*" else address, backlog=BACKLOG)
    except OSError as error:
        text = error.strerror or str(error)
        raise ListenError(f"{setting}: cannot listen on {address} port {port}: {text}; see `ss -ltnp sport = :{port}`") from error


@contextmanager
def control_socket(path: Path) -> Iterator[trio.SocketListener]:
    """The listening control socket, mode 0600; its file is removed at the end, if it is still ours.

    Raises:
        ListenError: another agent answers there, something else has the name, or the directory cannot be used.
    """
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        _remove_stale(path)
        listener = _bind(path)
        ours = path.lstat().st_ino
    except OSError as error:
        raise ListenError(f"admin.socket: cannot listen on {path}: {error.strerror or error}") from error
    try:
        yield trio.SocketListener(trio.socket.from_stdlib_socket(listener))
    finally:
        listener.close()
        _remove(path, ours)


def _remove_stale(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ListenError(f"admin.socket: {path} is not a socket; remove it or choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        # A full backlog must not hold the start up; EAGAIN means that somebody listens.
        probe.setblocking(False)
        refused = probe.connect_ex(str(path))
    if refused == errno.ECONNREFUSED:
        path.unlink(missing_ok=True)
    elif refused != errno.ENOENT:
        raise ListenError(f"admin.socket: an agent already answers on {path}; stop it, or choose another socket for this one")


def _bind(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    # The umask is the process's, but nothing else runs between these lines: no await, no thread that makes files.
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    finally:
        os.umask(before)
    listener.setblocking(False)
    return listener


def _remove(path: Path, inode: int) -> None:
    try:
        if path.lstat().st_ino == inode:
            path.unlink()
    except FileNotFoundError:
        # Somebody cleaned the directory before us: what we wanted.
        pass
