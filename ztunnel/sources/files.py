"""Watches a directory of Kubernetes manifests and hands on the mesh that they add up to.

Polling, not inotify: a look costs a directory listing and one stat per file, works on every file system (ConfigMap volumes swap
symbolic links, network mounts send no events), and needs no bookkeeping that could miss a change. A change is read once two looks
agree on it, so that a file caught between two writes of its editor is not believed, and a file that is being replaced is not gone.

Invariants: what cannot be read keeps its former objects in force, and denies everything if there are none because the agent has just
started; parsing gives way to other tasks; the sink is told everything
that was found first before `run` says that it has started.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from itertools import chain
from pathlib import Path

import trio

from ztunnel.mesh.derive import Derivation, MeshOptions, MeshState
from ztunnel.mesh.errors import ConfigError
from ztunnel.mesh.manifests.metadata import ObjectKey
from ztunnel.mesh.manifests.parse import KubeObject
from ztunnel.runtime.documents import PAUSE, DocumentError, read_json, read_yaml_in_turns
from ztunnel.sources.objects import Judged, Refusal, Sink, changed, combine, judge, unreadable

SUFFIXES = (".yaml", ".yml", ".json")
TRUST_SECONDS = 1.0
"""A file that was read within this time of its first sight may change again without its time stamp or size changing (kernels stamp
in steps of milliseconds); until then its content is compared as well."""
OBJECTS_PER_TURN = 32
"""Objects read before other tasks get a turn; a few milliseconds at most."""

_KEPT = "what it said before stays in force"
_UNKNOWN = "it may hold policies, so everything is denied until it can be read"


@dataclass(frozen=True, slots=True)
class FileLimits:
    """Bounds on what a directory can make us hold; defaults as in the settings."""

    file_bytes: int = 16 << 20
    files: int = 10_000
    documents: int = 100_000
    """In one file."""


@dataclass(frozen=True, slots=True)
class _Signature:
    """Equal as long as a file is not written to or replaced, as far as its directory entry tells."""

    modified_ns: int
    size: int
    inode: int
    device: int


@dataclass(slots=True)
class _File:
    """What is known of one file."""

    signature: _Signature
    first_seen: float
    digest: bytes = b""
    trusted: bool = False
    missing: bool = False
    judged: list[Judged] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    """Of its documents."""
    problem: Refusal | None = None
    """Why its present content is not what `judged` says."""


class FileSource:
    """The mesh in one directory. Not recursive; names that begin with a dot and other suffixes are not looked at.

    Args:
        directory: must exist when `run` starts.
        interval_seconds: between two looks; a change is in force after one to two of them.
    """

    def __init__(self, directory: Path, options: MeshOptions, limits: FileLimits = FileLimits(), interval_seconds: float = 0.25) -> None:
        self._directory = directory
        self._derivation = Derivation(options)
        self._limits = limits
        self._interval = interval_seconds
        self._files: dict[str, _File] = {}
        self._pending: dict[str, _Signature] = {}
        self._objects: dict[ObjectKey, KubeObject] = {}
        self._state = MeshState()
        self._directory_refusals: list[Refusal] = []
        self._refusals: tuple[Refusal, ...] = ()

    @property
    def objects(self) -> Mapping[ObjectKey, KubeObject]:
        """What there is, as of the sink's last call."""
        return self._objects

    async def run(self, sink: Sink, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Tell the sink what is there, then every change of it, for ever.

        Raises:
            ConfigError: the directory cannot be listed at the start. Later that is a refusal, and everything stays in force.
        """
        await self._look(first=True)
        if self._directory_refusals:
            raise ConfigError([f"sources.files: {refusal.file}: {refusal.reason}" for refusal in self._directory_refusals])
        self._combine()
        await sink(self._state, self._refusals)
        task_status.started()
        while True:
            await trio.sleep(self._interval)
            if await self._look(first=False):
                state, refusals = self._state, self._refusals
                self._combine()
                if state is not self._state or refusals != self._refusals:
                    await sink(self._state, self._refusals)

    async def _look(self, *, first: bool) -> bool:
        """Bring `_files` up to the directory. True: something may be different."""
        former = self._directory_refusals
        found = self._list()
        changed = self._directory_refusals != former
        if found is None:
            return changed
        for name in [name for name in self._files if name not in found]:
            changed |= self._lose(name)
        for name, signature in found.items():
            changed |= await self._visit(name, signature, first=first)
        self._pending = {name: signature for name, signature in self._pending.items() if name in found}
        return changed

    def _list(self) -> dict[str, _Signature] | None:
        """The manifest files, by name; None: it cannot be known, and `_directory_refusals` says why."""
        found: dict[str, _Signature] = {}
        try:
            with os.scandir(self._directory) as entries:
                for entry in entries:
                    if entry.name.startswith((".", "#")) or not entry.name.endswith(SUFFIXES):
                        continue
                    signature = _signature(entry)
                    if signature is not None:
                        found[entry.name] = signature
                    if len(found) > self._limits.files:
                        reason = f"more than {self._limits.files} manifest files (limits.manifest_files); {_KEPT}"
                        self._directory_refusals = [Refusal(str(self._directory), "", "", reason)]
                        return None
        except OSError as error:
            reason = f"cannot be listed: {error.strerror}"
            self._directory_refusals = [Refusal(str(self._directory), "", "", reason)]
            return None
        self._directory_refusals = []
        return dict(sorted(found.items()))

    def _lose(self, name: str) -> bool:
        file = self._files[name]
        if file.missing:
            del self._files[name]
            return True
        file.missing = True
        return False

    async def _visit(self, name: str, signature: _Signature, *, first: bool) -> bool:
        file = self._files.get(name)
        if file is not None:
            file.missing = False
        if file is not None and file.signature == signature:
            self._pending.pop(name, None)
            if file.trusted:
                return False
            return await self._read(name, file)
        if not first and self._pending.get(name) != signature:
            self._pending[name] = signature
            return False
        self._pending.pop(name, None)
        if file is None:
            file = self._files[name] = _File(signature, trio.current_time())
        file.signature, file.first_seen, file.trusted = signature, trio.current_time(), False
        changed = await self._read(name, file)
        if first and file.problem is not None:
            # Later a file that cannot be read keeps what it said before; now nobody knows what that was.
            file.problem = replace(file.problem, reason=file.problem.reason.replace(_KEPT, _UNKNOWN))
            file.judged = [unreadable(file.problem.file, file.problem.reason)]
        return changed

    async def _read(self, name: str, file: _File) -> bool:
        """Read one file. True: what it says has changed."""
        file.trusted = trio.current_time() - file.first_seen >= TRUST_SECONDS
        shown = _shown(name)
        try:
            content = _content(os.path.join(self._directory, name), self._limits.file_bytes)
        except OSError as error:
            return _keep(file, b"", Refusal(shown, "", "", f"cannot be read: {error.strerror}; {_KEPT}"))
        if content is None:
            return _keep(file, b"", Refusal(shown, "", "", f"larger than {self._limits.file_bytes} bytes (limits.manifest_bytes); {_KEPT}"))
        digest = sha256(content).digest()
        if digest == file.digest:
            return False
        try:
            judged, refusals = await self._parse(name, content)
        except DocumentError as error:
            return _keep(file, digest, Refusal(shown, "", "", f"{error}; {_KEPT}"))
        lost = next((each for each in refusals if each.unknown), None)
        if lost is not None and file.judged:
            # It stands where an object stood that it may have been meant to change, e.g. a policy that would be missed.
            return _keep(file, digest, replace(lost, reason=f"{lost.reason}; {_KEPT}"))
        file.digest, file.judged, file.refusals, file.problem = digest, judged, refusals, None
        return True

    async def _parse(self, name: str, content: bytes) -> tuple[list[Judged], list[Refusal]]:
        judged: list[Judged] = []
        refusals: list[Refusal] = []
        bodies = read_json(content) if name.endswith(".json") else read_yaml_in_turns(content)
        number = seen = 0
        for body in bodies:
            if body is PAUSE:
                await trio.lowlevel.checkpoint()
                continue
            number += 1
            for found, refusal in judge(body, _shown(name), number):
                seen += 1
                if seen % OBJECTS_PER_TURN == 0:
                    await trio.lowlevel.checkpoint()
                if found is not None:
                    judged.append(found)
                if refusal is not None:
                    refusals.append(refusal)
                if len(judged) + len(refusals) > self._limits.documents:
                    raise DocumentError(f"more than {self._limits.documents} objects (limits.manifest_documents)")
        return judged, refusals

    def _combine(self) -> None:
        files = [file for _, file in sorted(self._files.items())]
        combined = combine(chain.from_iterable(file.judged for file in files), self._objects)
        if changes := dict(changed(self._objects, combined.objects)):
            self._objects = combined.objects
            self._state = self._derivation.update(changes)
        of_documents = chain.from_iterable(file.refusals for file in files)
        of_files = (file.problem for file in files if file.problem is not None)
        self._refusals = tuple(sorted({*self._directory_refusals, *of_files, *of_documents, *combined.refusals}))


def _signature(entry: os.DirEntry[str]) -> _Signature | None:
    """None for what is not a regular file. Links are followed: that is how ConfigMap volumes are made."""
    try:
        status = entry.stat()
    except FileNotFoundError:
        return None
    except OSError:
        # A link in a circle, for one. Reading it will say what is wrong, and it must not hide the other files.
        return _Signature(0, 0, 0, 0)
    return _Signature(status.st_mtime_ns, status.st_size, status.st_ino, status.st_dev) if stat.S_ISREG(status.st_mode) else None


def _content(path: str, limit: int) -> bytes | None:
    """The file's bytes, None if there are more than `limit`."""
    # O_NONBLOCK: a pipe that took the file's name since it was listed must not stop the daemon.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(0, "not a regular file")
        # As much at a time as there is: room for all that there may be is 16 MiB, to be got and given back for each small file.
        parts, left = [], limit + 1
        while left > 0 and (part := os.read(descriptor, min(status.st_size + 1, left))):
            parts.append(part)
            left -= len(part)
    finally:
        os.close(descriptor)
    return b"".join(parts) if left > 0 else None


def _shown(name: str) -> str:
    """A file's name as text that can be encoded: it may end up in a policy's reason, and names on disk are any bytes."""
    return name.encode("utf-8", "backslashreplace").decode()


def _keep(file: _File, digest: bytes, problem: Refusal) -> bool:
    """Leave a file's objects in force and say why. Without a digest its content is looked at again whatever it is."""
    changed = file.problem != problem
    file.digest, file.problem = digest, problem
    return changed
