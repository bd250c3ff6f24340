"""A listening Unix socket in the file system, for whoever may ask the agent: the command line, the CNI plugin.

Invariant: it is never reachable by anybody but its owner, not even for the moment between bind and chmod; a socket of a dead process is
replaced, one that answers is left alone.
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


@contextmanager
def unix_listener(path: Path, setting: str) -> Iterator[trio.SocketListener]:
    """The listening socket, mode 0600; its file is removed at the end, if it is still ours.

    Args:
        setting: the path's name in the settings, for the error.
    Raises:
        ListenError: another agent answers there, something else has the name, or the directory cannot be used.
    """
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        _remove_stale(path, setting)
        listener = _bind(path)
        ours = path.lstat().st_ino
    except OSError as error:
        raise ListenError(f"{setting}: cannot listen on {path}: {error.strerror or error}") from error
    try:
        yield trio.SocketListener(trio.socket.from_stdlib_socket(listener))
    finally:
        listener.close()
        _remove(path, ours)


def _remove_stale(path: Path, setting: str) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ListenError(f"{setting}: {path} is not a socket; remove it or choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        # A full backlog must not hold the start up; EAGAIN means that somebody listens.
        probe.setblocking(False)
        refused = probe.connect_ex(str(path))
    if refused == errno.ECONNREFUSED:
        path.unlink(missing_ok=True)
    elif refused != errno.ENOENT:
        raise ListenError(f"{setting}: an agent already answers on {path}; stop it, or choose another socket for this one")


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
