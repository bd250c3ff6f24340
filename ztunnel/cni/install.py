"""Puts the plugin on the host and into its CNI configuration, keeps it there, and takes it out again.

The directory is looked at several times a second: whoever rewrites a list (a network plugin's own upgrade, an operator) takes us out of
it, and until the next look new pods start uncaptured; the agent takes them in when it hears of them, as those of before its time. Every
write is a rename, so that the runtime never reads half a file. What a file said before we touched it is kept beside it, and comes back at
removal if nobody has written there since.

Invariant: the program is there before a list names it, and goes only after none does.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import trio

from ztunnel.cni.conflist import LIST, SUFFIXES, TYPE, BadConfiguration, Edit, Json, installed, list_of, removed
from ztunnel.runtime.logs import fields

log = logging.getLogger(__name__)

POLL_SECONDS = 0.25
FIGHT_EDITS, FIGHT_SECONDS = 10, 60.0
"""So many edits in so short a time are a quarrel with another program, which a person must settle."""
_MOST_BYTES = 1 << 20
_MOST_FILES = 256
_FORMER, _OURS = ".before-ztunnel", ".by-ztunnel"
"""Suffixes of hidden files, which runtimes do not read: what a file said before us, and what we made of it."""
_NEW = ".ztunnel-new"


@dataclass(frozen=True, slots=True)
class Host:
    """Where things are on the host, as the agent sees it."""

    program: Path
    """The plugin to install."""
    bin_directory: Path
    conf_directory: Path


class Installer:
    """Keeps the plugin installed.

    Args:
        entry: its configuration in the list.
    """

    def __init__(self, host: Host, entry: Json) -> None:
        self._host = host
        self._entry = entry
        self._target = host.bin_directory / TYPE
        self._program: tuple[int, int, int] | None = None
        self._edits: deque[float] = deque(maxlen=FIGHT_EDITS)
        self.problem = ""
        """Why the plugin is not installed, or cannot be now; empty when it is."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled; "started" behind the first attempt."""
        self._look()
        task_status.started()
        while True:
            await trio.sleep(POLL_SECONDS)
            self._look()

    def remove(self) -> None:
        """Everything as it was; also when the agent before us installed it."""
        try:
            self._restore()
            self._target.unlink(missing_ok=True)
            log.info("CNI plugin removed")
        except OSError as error:
            log.error("cannot remove the CNI plugin", extra=fields(problem=error))

    def _look(self) -> None:
        try:
            self._copy_program()
            files = self._files()
            edit = installed(files, self._entry)
            if edit:
                self._apply(edit, files)
                self._edits.append(trio.current_time())
                if not self._is_fighting():
                    log.info("CNI plugin installed", extra=fields(files=", ".join(edit.write)))
            problem = "" if files else f"no network configuration in {self._host.conf_directory} yet"
            if self._is_fighting():
                problem = f"another program keeps taking us out of {self._host.conf_directory} (Cilium: set cni.exclusive=false)"
        except (OSError, BadConfiguration) as error:
            problem = str(error)
        if problem != self.problem:
            if problem:
                log.warning("CNI plugin is not installed", extra=fields(problem=problem))
            self.problem = problem

    def _is_fighting(self) -> bool:
        return len(self._edits) == FIGHT_EDITS and self._edits[0] > trio.current_time() - FIGHT_SECONDS

    def _copy_program(self) -> None:
        found = _stamp(self._target)
        if found is not None and found == self._program:
            return
        content = self._host.program.read_bytes()
        if found is None or self._target.is_symlink() or self._target.read_bytes() != content:
            _replace(self._target, content, 0o755)
        self._program = _stamp(self._target)

    def _files(self) -> dict[str, bytes]:
        """What the runtime would read. A directory that is not there yet holds nothing."""
        try:
            names = [name for name in os.listdir(self._host.conf_directory) if name.endswith(SUFFIXES)]
        except FileNotFoundError:
            return {}
        if len(names) > _MOST_FILES:
            raise BadConfiguration(f"{self._host.conf_directory}: more than {_MOST_FILES} files")
        found = {}
        for name in names:
            content = _read(self._host.conf_directory / name)
            if content is not None:
                found[name] = content
        return found

    def _apply(self, edit: Edit, files: dict[str, bytes]) -> None:
        directory = self._host.conf_directory
        for name, content in edit.write.items():
            former = next((each for each in edit.remove if list_of(each) == name), name)
            if TYPE.encode() not in files[former]:
                _replace(_beside(directory / former, _FORMER), files[former], 0o600)
            mode = (directory / former).stat().st_mode & 0o777
            _replace(_beside(directory / name, _OURS), content, 0o600)
            _replace(directory / name, content, mode)
        for name in edit.remove:
            (directory / name).unlink(missing_ok=True)

    def _restore(self) -> None:
        directory = self._host.conf_directory
        files = self._files()
        for name, content in list(files.items()):
            ours = _beside(directory / name, _OURS)
            if _read(ours) != content:
                continue  # somebody has written there since: only our plugin goes
            original = next((each for each in (name, name.removesuffix(LIST)) if _beside(directory / each, _FORMER).exists()), None)
            if original is not None:
                os.replace(_beside(directory / original, _FORMER), directory / original)
                if original != name:
                    (directory / name).unlink()
                del files[name]
        edit = removed(files)
        for name, content in edit.write.items():
            _replace(directory / name, content, (directory / name).stat().st_mode & 0o777)
        for each in directory.glob(".*"):
            if each.name.endswith((_FORMER, _OURS, _NEW)):
                each.unlink(missing_ok=True)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}{suffix}")


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _read(path: Path) -> bytes | None:
    """None when it is gone, or no file.

    Raises: BadConfiguration when it is too large.
    """
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except (FileNotFoundError, IsADirectoryError):
        return None
    if len(content) > _MOST_BYTES:
        raise BadConfiguration(f"{path.name}: larger than 1 MiB")
    return content


def _replace(path: Path, content: bytes, mode: int) -> None:
    """All of it or nothing, and on disk before it has the name: a list that is empty after a power cut is a node without a network."""
    temporary = path.with_name(f".{path.name}{_NEW}")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with open(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fchmod(file.fileno(), mode)
        os.fsync(file.fileno())
    os.replace(temporary, path)
