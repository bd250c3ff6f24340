"""Which of several replicas works: the one that holds a Lease, as client-go's leader election does it.

A holder renews; who has not renewed for its whole duration, as seen by the others' own clocks from when they last saw the Lease change,
has lost it. A holder that cannot renew stops working before the others may begin. Wall clocks are written for people only.
Source: client-go `tools/leaderelection`; `coordination.k8s.io/v1`.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from random import random

import trio

from ztunnel.kube.client import Json, KubeClient
from ztunnel.kube.errors import Conflict, KubeError, NotFound
from ztunnel.kube.resources import LEASES
from ztunnel.mesh.manifests.tree import integer, put, text
from ztunnel.runtime.logs import fields

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Periods:
    """Seconds. The defaults are client-go's."""

    lease: float = 15.0
    """After so long without a renewal others may take it."""
    renew: float = 10.0
    """A holder that could not renew for so long stops working."""
    retry: float = 2.0
    """Between two tries, jittered."""


@dataclass(slots=True)
class Election:
    """One replica's part in it.

    Args:
        name: of the Lease, in `namespace`.
        identity: who we are; no two replicas may have the same.
    """

    client: KubeClient
    namespace: str
    name: str
    identity: str
    periods: Periods = field(default_factory=Periods)
    is_leader: bool = field(default=False, init=False)
    holder: str = field(default="", init=False)
    """Who had the Lease when we last looked."""
    _seen: tuple[str, int, str] = field(default=("", 0, ""), init=False)
    """Holder, transitions and time of renewal as last read."""
    _seen_at: float = field(default=0.0, init=False)
    _problem: str = field(default="", init=False)

    async def run(self, work: Callable[[], Awaitable[None]]) -> None:
        """Works whenever we are the leader, for ever; the Lease is given back when cancelled."""
        try:
            while True:
                await self._until_ours()
                log.info("leading", extra=fields(lease=f"{self.namespace}/{self.name}", identity=self.identity))
                self.is_leader = True
                try:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(self._hold, nursery.cancel_scope)
                        await work()
                finally:
                    self.is_leader = False
                log.warning("no longer leading", extra=fields(lease=f"{self.namespace}/{self.name}"))
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(self.periods.retry):
                await self._give_back()

    async def _until_ours(self) -> None:
        while True:
            if await self._try():
                return
            await trio.sleep(self.periods.retry * (1 + 0.2 * random()))

    async def _hold(self, working: trio.CancelScope) -> None:
        """Renews while it can, then ends the work."""
        renewed = trio.current_time()
        while trio.current_time() < renewed + self.periods.renew:
            await trio.sleep(self.periods.retry)
            with trio.move_on_at(renewed + self.periods.renew):
                if await self._try():
                    renewed = trio.current_time()
                elif self.holder not in ("", self.identity):
                    break
        working.cancel()

    async def _try(self) -> bool:
        """Takes or renews the Lease; False: it is another's, or nobody can say."""
        try:
            taken = await self._take()
        except KubeError as error:
            if not isinstance(error, Conflict) and str(error) != self._problem:
                self._problem = str(error)
                log.warning("leader election: will try again", extra=fields(reason=error))
            return False
        self._problem = ""
        return taken

    async def _take(self) -> bool:
        try:
            lease = await self.client.get(LEASES, self.name, self.namespace)
        except NotFound:
            await self.client.create(LEASES, self._lease({}, 0), self.namespace)
            self.holder = self.identity
            return True
        holder, transitions = text(lease, "spec", "holderIdentity"), integer(lease, "spec", "leaseTransitions")
        seen = holder, transitions, text(lease, "spec", "renewTime")
        if seen != self._seen:
            self._seen, self._seen_at = seen, trio.current_time()
        self.holder = holder
        duration = integer(lease, "spec", "leaseDurationSeconds", default=int(self.periods.lease))
        if holder not in ("", self.identity) and trio.current_time() < self._seen_at + duration:
            return False
        await self.client.update(LEASES, self._lease(lease, transitions + (holder != self.identity)), self.name, self.namespace)
        self.holder = self.identity
        return True

    def _lease(self, before: Json, transitions: int) -> Json:
        """The Lease as ours; what we do not know in it stays."""
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        body: Json = before or {
            "apiVersion": LEASES.api_version,
            "kind": "Lease",
            "metadata": {"name": self.name, "namespace": self.namespace},
        }
        if text(body, "spec", "holderIdentity") != self.identity:
            put(body, now, "spec", "acquireTime")
        put(body, self.identity, "spec", "holderIdentity")
        put(body, max(1, round(self.periods.lease)), "spec", "leaseDurationSeconds")
        put(body, now, "spec", "renewTime")
        put(body, transitions, "spec", "leaseTransitions")
        return body

    async def _give_back(self) -> None:
        """So that the next one need not wait."""
        try:
            lease = await self.client.get(LEASES, self.name, self.namespace)
            if text(lease, "spec", "holderIdentity") == self.identity:
                put(lease, "", "spec", "holderIdentity")
                put(lease, 1, "spec", "leaseDurationSeconds")
                await self.client.update(LEASES, lease, self.name, self.namespace)
        except KubeError as error:
            log.info("the lease was not given back: others wait for it to run out", extra=fields(reason=error))
