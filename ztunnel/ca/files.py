"""Files of an authority: secrets that were nobody else's to read, writes that are whole or not there, a lock among processes."""

from __future__ import annotations

import fcntl
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ztunnel.mesh.errors import LocalError

MAX_FILE_BYTES = 256 << 10


class RootError(LocalError):
    """The root on disk cannot be used; the text names the file, the reason and the way out."""


def read_file(file: Path, *, secret: bool) -> bytes | None:
    """The file's content, None if there is none. A secret must be ours and nobody else's to read."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with os.fdopen(descriptor, "rb") as opened:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_FILE_BYTES:
            raise RootError(f"{file}: not a file of ours")
        if secret and (status.st_mode & 0o077 or status.st_uid != os.geteuid()):
            mode = stat.S_IMODE(status.st_mode)
            raise RootError(
                f"{file}: mode {mode:04o}, owner {status.st_uid}: others may have read this key; make a new root (remove both files), "
                f"or if you are sure that nobody did: chmod 600 {file}"
            )
        return opened.read()


def write_file(file: Path, content: bytes, mode: int) -> None:
    """The file appears whole or not at all, also after a power cut."""
    temporary = file.with_name(f".{file.name}.new")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "wb") as opened:
        # The process's umask may have taken bits away from the certificate, which is meant to be readable.
        os.fchmod(descriptor, mode)
        opened.write(content)
        opened.flush()
        os.fsync(descriptor)
    temporary.rename(file)
    folder = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def locked(file: Path, seconds: float) -> Iterator[None]:
    """Nobody else has this lock; blocks for so many seconds at most.

    Raises:
        RootError: it is not given back.
    """
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise RootError(f"{file}: held by another process for over {seconds:g} s; see `fuser {file}`") from None
                time.sleep(0.01)
        yield
    finally:
        os.close(descriptor)
