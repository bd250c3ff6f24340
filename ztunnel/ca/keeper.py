"""Keeps the signing root current and its bundle published: reads what the replicas share, takes the steps that are due, tells the world.

Every replica does the same work. A step is written only if the state is still the one that was read, so two replicas that take it at once
agree afterwards on whoever was first. Invariants: nothing signs that is not stored; a store that fails for a while changes nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Protocol

import trio

from ztunnel.ca.files import RootError, locked, read_file, write_file
from ztunnel.ca.given import read_given
from ztunnel.ca.root import Root
from ztunnel.ca.succession import Periods, Succession, advance, begin
from ztunnel.mesh.errors import MeshError
from ztunnel.runtime.logs import fields

log = logging.getLogger(__name__)

ATTEMPTS = 5
"""To write a step before somebody else does, in one look."""
LOOK_SECONDS = 30.0
"""Deadline of one look."""
LOCK_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Stored:
    """What a store has."""

    document: bytes | None
    version: str
    """Of the store's own making; changes with every change."""
    wish: str = ""
    """The operator's word for a new root; empty when there never was one."""


class StateStore(Protocol):
    """Where replicas share the state."""

    async def read(self) -> Stored:
        """The present state.

        Raises:
            MeshError: it cannot be had now.
        """
        ...

    async def write(self, document: bytes, former: Stored) -> bool:
        """Replace it, unless it is not `former` any more: False.

        Raises:
            MeshError: it cannot be written now.
        """
        ...


class Publisher(Protocol):
    """Where peers find the roots that they are to trust."""

    async def publish(self, bundle_pem: bytes) -> None:
        """Make them say this.

        Raises:
            MeshError: not all of them do now.
        """
        ...


class RootSource(Protocol):
    """Where the keeper looks for what signs."""

    async def look(self, now: float) -> Root:
        """What signs now, with every root that peers are to trust.

        Raises:
            MeshError: it cannot be told; what was before goes on.
        """
        ...


@dataclass(frozen=True, slots=True)
class OwnRoots:
    """Roots that the authority makes and replaces itself."""

    store: StateStore
    trust_domain: str
    periods: Periods

    async def look(self, now: float) -> Root:
        """See `RootSource`; takes one step if one is due."""
        for _ in range(ATTEMPTS):
            stored = await self.store.read()
            if stored.document is None:
                state = begin(self.trust_domain, now, stored.wish)
            else:
                before = Succession.parse(stored.document, self.trust_domain)
                state = advance(before, stored.wish, now, self.periods)
                if state is before:
                    return state.authority
            if await self.store.write(state.dump(), stored):
                log.info("root changed", extra=fields(step=_step(state), roots=len(state.former) + 1 + (state.following is not None)))
                return state.authority
        raise RootError("others changed the state of the authority each time that it was to be written")


@dataclass(frozen=True, slots=True)
class GivenRoots:
    """What an operator puts into a directory."""

    directory: Path
    trust_domain: str

    async def look(self, now: float) -> Root:
        """See `RootSource`."""
        return read_given(self.directory, self.trust_domain, now)


class RootKeeper:
    """Looks again and again.

    Args:
        changed: told of a new signing root or bundle, after it was published once.
        poll_seconds: between two looks.
    """

    def __init__(
        self,
        source: RootSource,
        publisher: Publisher,
        clock: Callable[[], float],
        changed: Callable[[Root], None],
        poll_seconds: float = 10.0,
    ) -> None:
        self._source = source
        self._publisher = publisher
        self._clock = clock
        self._changed = changed
        self._poll_seconds = poll_seconds
        self._complaint = ""
        self.root: Root | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Never ends. "Started" at once: whether there is a root is `root`'s to say."""
        task_status.started()
        while True:
            await self.look()
            await trio.sleep(self._poll_seconds)

    async def look(self) -> None:
        """One look; what goes wrong is logged, once for each new way of going wrong."""
        try:
            with trio.fail_after(LOOK_SECONDS):
                root = await self._source.look(self._clock())
                if self.root is None or _says(root) != _says(self.root):
                    self.root = root
                    self._changed(root)
                await self._publisher.publish(root.roots_pem)
        except (MeshError, trio.TooSlowError) as error:
            text = str(error) or f"no answer within {LOOK_SECONDS:g} s"
            if text != self._complaint:
                log.error("root not looked after", extra=fields(error=text, signing=self.root is not None))
            self._complaint = text
        else:
            if self._complaint:
                log.info("root looked after again")
            self._complaint = ""


def _says(root: Root) -> tuple[bytes, bytes, bytes]:
    # Keys have no equality; certificates stand for them.
    return root.pem, root.intermediates_pem, root.roots_pem


def _step(state: Succession) -> str:
    return "announced" if state.following is not None else "signing"


@dataclass(frozen=True, slots=True)
class FileStore:
    """The state in a directory, for an authority outside of Kubernetes: `authority.json` (mode 0600); `rotate` holds the wish."""

    directory: Path

    async def read(self) -> Stored:
        """See `StateStore`."""
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            return self._read()
        except OSError as error:
            raise RootError(f"{error.filename or self.directory}: {error.strerror}") from error

    async def write(self, document: bytes, former: Stored) -> bool:
        """See `StateStore`."""
        try:
            with locked(self.directory / ".lock", LOCK_SECONDS):
                if self._read().version != former.version:
                    return False
                write_file(self._state, document, 0o600)
                return True
        except OSError as error:
            raise RootError(f"{error.filename or self.directory}: {error.strerror}") from error

    @property
    def _state(self) -> Path:
        return self.directory / "authority.json"

    def _read(self) -> Stored:
        document = read_file(self._state, secret=True)
        wish = read_file(self.directory / "rotate", secret=False) or b""
        return Stored(document, sha256(document or b"").hexdigest(), wish.decode("utf-8", "replace").strip())


@dataclass(frozen=True, slots=True)
class FilePublisher:
    """The bundle as one file."""

    file: Path

    async def publish(self, bundle_pem: bytes) -> None:
        """See `Publisher`."""
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            if read_file(self.file, secret=False) != bundle_pem:
                write_file(self.file, bundle_pem, 0o644)
        except OSError as error:
            raise RootError(f"{error.filename or self.file}: {error.strerror}") from error
