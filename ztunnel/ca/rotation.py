"""Keeps one valid certificate per wanted identity: issues at once, renews at half-life, retries, forgets.

The rules are the pure functions at the top; `Rotation` is the trio shell around them. Invariants: the sink holds credentials for
an identity only while they are valid; a failing authority never takes a valid certificate away; two attempts for the same identity
never run at once, and never more than AT_ONCE altogether.
"""

from __future__ import annotations

import math
import random
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import trio

from ztunnel.ca.request import IssueError, Validity, validity
from ztunnel.hbone.handshake import Credentials
from ztunnel.mesh.errors import MeshError
from ztunnel.mesh.identity import SpiffeId

ATTEMPT_SECONDS = 10.0
"""Deadline of one request to the authority."""
FIRST_RETRY_SECONDS = 1.0
LONGEST_RETRY_SECONDS = 150.0
"""Back-off after failures: doubling from the first to the longest. Source: Istio ztunnel `identity/manager.rs`."""
AT_ONCE = 8
"""Requests under way. An authority that is slow for one identity does not hold up the others. Source: as Istio ztunnel's."""
SHORTEST_WAIT_SECONDS = 1.0
"""An authority that gives certificates past their half-life is asked again after this, not in a loop."""
LONGEST_SLEEP_SECONDS = 60.0
"""The wall clock may be set while we sleep; it is looked at again at least this often."""
JITTER = 0.1
"""Renewals spread over this part of a certificate's life around its middle, retries over twice this around their delay, so that
agents which started together do not ask together."""

Sink = Callable[[SpiffeId, Credentials | None], Awaitable[None]]
"""Told of new credentials, and with None that an identity's last ones are expired or no longer wanted."""


class Issuer(Protocol):
    """An authority, embedded or remote."""

    async def obtain(self, identity: SpiffeId, now: float) -> Credentials:
        """Fresh credentials.

        Raises:
            MeshError: there are none; the text says why.
        """
        ...


class CertificateState(Enum):
    """What an operator is told about one identity."""

    PENDING = "Pending"
    VALID = "Valid"
    FAILING = "Failing"
    """Still valid, but the last renewal failed."""
    UNAVAILABLE = "Unavailable"
    """No valid certificate: handshakes for this identity fail."""


@dataclass(frozen=True, slots=True)
class CertificateStatus:
    """One identity's certificate. Times are seconds since the epoch; 0 and serial 0 when there is none."""

    identity: SpiffeId
    state: CertificateState
    not_before: float = 0.0
    not_after: float = 0.0
    serial: int = 0
    error: str = ""


def next_renewal(not_before: float, not_after: float, jitter: float) -> float:
    """When to renew: half of the certificate's life, moved by up to half of JITTER of its life either way.

    Args:
        jitter: uniform in [0, 1).
    """
    return not_before + (not_after - not_before) * (0.5 + JITTER * (jitter - 0.5))


def retry_delay(failures: int, jitter: float) -> float:
    """Seconds to wait after that many failures in a row (1 or more), ±20 %.

    Args:
        jitter: uniform in [0, 1).
    """
    doubled: float = min(FIRST_RETRY_SECONDS * 2 ** min(failures - 1, 16), LONGEST_RETRY_SECONDS)
    return doubled * (1 + 2 * JITTER * (2 * jitter - 1))


@dataclass(slots=True)
class _Entry:
    due: float
    """When to ask the authority next; wall clock."""
    leaf: Validity | None = None
    """None: the sink has nothing for this identity."""
    failures: int = 0
    error: str = ""


class Rotation:
    """Certificates of the identities that the node needs.

    Args:
        issuer: asked for AT_ONCE identities at a time, each within ATTEMPT_SECONDS.
        sink: awaited in order, never twice at once.
        clock: the wall clock in seconds since the epoch, because certificates are about wall-clock time.
        jitter: uniform in [0, 1).
    """

    def __init__(self, issuer: Issuer, sink: Sink, clock: Callable[[], float], jitter: Callable[[], float] = random.random) -> None:
        self._issuer = issuer
        self._sink = sink
        self._clock = clock
        self._jitter = jitter
        self._entries: dict[SpiffeId, _Entry] = {}
        self._one_at_a_time = trio.Lock()
        self._sinking = trio.Lock()
        self._changed = trio.Event()

    async def want(self, identities: Iterable[SpiffeId]) -> None:
        """From now on keep exactly these identities' certificates.

        Returns when each new one was asked for once and every unwanted one was taken from the sink. Cancelled, it leaves the new
        ones due: `run` goes on with them.
        """
        wanted = set(identities)
        async with self._one_at_a_time:
            for identity in sorted(self._entries.keys() - wanted, key=str):
                entry = self._entries.pop(identity)
                if entry.leaf is not None:
                    await self._sink(identity, None)
            for identity in wanted - self._entries.keys():
                self._entries[identity] = _Entry(due=-math.inf)
            try:
                await self._attempt_due()
            finally:
                self._changed.set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Renew for as long as this runs; `want` may be called before, and from any task."""
        task_status.started()
        while True:
            self._changed = trio.Event()
            async with self._one_at_a_time:
                await self._attempt_due()
                await self._withdraw_expired()
            with trio.move_on_after(self._wait()):
                await self._changed.wait()

    def hasten(self, within_seconds: float) -> None:
        """Renew every certificate within this time, spread over it: what peers are to trust has changed."""
        now = self._clock()
        for entry in self._entries.values():
            entry.due = min(entry.due, now + self._jitter() * within_seconds)
        self._changed.set()

    def status(self) -> list[CertificateStatus]:
        """Every wanted identity, sorted."""
        now = self._clock()
        return [_status_of(identity, entry, now) for identity, entry in sorted(self._entries.items(), key=lambda item: str(item[0]))]

    def _wait(self) -> float:
        moments = [entry.due for entry in self._entries.values()]
        moments += [entry.leaf.not_after for entry in self._entries.values() if entry.leaf is not None]
        soonest = min(moments, default=math.inf) - self._clock()
        return min(max(soonest, 0.0), LONGEST_SLEEP_SECONDS)

    async def _attempt_due(self) -> None:
        now = self._clock()
        due = [(identity, entry) for identity, entry in sorted(self._entries.items(), key=lambda item: str(item[0])) if entry.due <= now]
        # One list for all: a task that has done its one takes the next.
        remaining = iter(due)

        async def attempt_some() -> None:
            for identity, entry in remaining:
                await self._attempt(identity, entry)

        async with trio.open_nursery() as nursery:
            for _ in range(min(AT_ONCE, len(due))):
                nursery.start_soon(attempt_some)

    async def _attempt(self, identity: SpiffeId, entry: _Entry) -> None:
        try:
            with trio.fail_after(ATTEMPT_SECONDS):
                credentials = await self._issuer.obtain(identity, self._clock())
            leaf = validity(credentials)
            if leaf.not_after <= self._clock():
                raise IssueError("the authority gave a certificate that has already expired; compare the clocks")
        except (MeshError, trio.TooSlowError) as error:
            entry.failures += 1
            entry.error = str(error) or f"the authority did not answer within {ATTEMPT_SECONDS:g} s"
            entry.due = self._clock() + retry_delay(entry.failures, self._jitter())
            return
        async with self._sinking:
            await self._sink(identity, credentials)
        entry.leaf, entry.failures, entry.error = leaf, 0, ""
        entry.due = max(next_renewal(leaf.not_before, leaf.not_after, self._jitter()), self._clock() + SHORTEST_WAIT_SECONDS)

    async def _withdraw_expired(self) -> None:
        """Fail closed: what cannot be renewed in time is taken away, so that a handshake fails here and says why."""
        now = self._clock()
        for identity, entry in sorted(self._entries.items(), key=lambda item: str(item[0])):
            if entry.leaf is not None and entry.leaf.not_after <= now:
                entry.leaf = None
                await self._sink(identity, None)


def _status_of(identity: SpiffeId, entry: _Entry, now: float) -> CertificateStatus:
    leaf = entry.leaf
    if leaf is None or leaf.not_after <= now:
        state = CertificateState.UNAVAILABLE if entry.failures else CertificateState.PENDING
        return CertificateStatus(identity, state, error=entry.error)
    state = CertificateState.FAILING if entry.failures else CertificateState.VALID
    return CertificateStatus(identity, state, leaf.not_before, leaf.not_after, leaf.serial, entry.error)
