"""Who leads, on a clock that jumps: a Lease in memory with the API server's optimistic locking."""

from __future__ import annotations

from copy import deepcopy
from typing import cast

import trio
import trio.testing

from ztunnel.controller.election import Election, Periods
from ztunnel.kube.client import Json, KubeClient
from ztunnel.kube.errors import Conflict, NotFound, Unreachable
from ztunnel.kube.resources import Resource
from ztunnel.mesh.manifests.tree import put, text

PERIODS = Periods(lease=15, renew=10, retry=2)


class Leases:
    """What the client does with one Lease."""

    def __init__(self) -> None:
        self.lease: Json | None = None
        self.version = 0
        self.away = False

    async def get(self, resource: Resource, name: str, namespace: str = "") -> Json:
        await self._answer()
        if self.lease is None:
            raise NotFound("no such lease", 404)
        return deepcopy(self.lease)

    async def create(self, resource: Resource, body: Json, namespace: str = "") -> Json:
        await self._answer()
        if self.lease is not None:
            raise Conflict("it is there", 409)
        return self._keep(body)

    async def update(self, resource: Resource, body: Json, name: str, namespace: str = "") -> Json:
        await self._answer()
        if text(body, "metadata", "resourceVersion") != str(self.version):
            raise Conflict("changed meanwhile", 409)
        return self._keep(body)

    async def _answer(self) -> None:
        await trio.lowlevel.checkpoint()
        if self.away:
            raise Unreachable("away")

    def _keep(self, body: Json) -> Json:
        self.version += 1
        self.lease = deepcopy(body)
        put(self.lease, str(self.version), "metadata", "resourceVersion")
        return self.lease


class Replica:
    """An election, and when its work began and ended."""

    def __init__(self, leases: Leases, name: str) -> None:
        self.election = Election(cast(KubeClient, leases), "ns", "lease", name, PERIODS)
        self.spans: list[list[float]] = []

    async def run(self) -> None:
        await self.election.run(self._work)

    async def _work(self) -> None:
        span = [trio.current_time()]
        self.spans.append(span)
        try:
            await trio.sleep_forever()
        finally:
            span.append(trio.current_time())


async def test_the_first_leads_and_gives_back(mock_clock: trio.testing.MockClock) -> None:
    leases = Leases()
    one, two = Replica(leases, "one"), Replica(leases, "two")
    async with trio.open_nursery() as nursery:
        first = trio.CancelScope()

        async def cancellable() -> None:
            with first:
                await one.run()

        nursery.start_soon(cancellable)
        await trio.sleep(0.5)
        nursery.start_soon(two.run)
        await trio.sleep(100)
        assert (len(one.spans), two.spans) == (1, [])
        assert two.election.holder == "one"
        first.cancel()
        await trio.sleep(3)
        assert two.election.is_leader
        nursery.cancel_scope.cancel()


async def test_one_that_cannot_renew_stops_before_another_begins(mock_clock: trio.testing.MockClock) -> None:
    mine, theirs = Leases(), Leases()
    one, two = Replica(mine, "one"), Replica(theirs, "two")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.run)
        await trio.sleep(20)
        # The second sees the same lease; the first is cut off from it.
        theirs.lease, theirs.version, mine.away = deepcopy(mine.lease), mine.version, True
        nursery.start_soon(two.run)
        await trio.sleep(60)
        nursery.cancel_scope.cancel()
    assert len(one.spans) == 1
    assert one.spans[0][1] < two.spans[0][0]
    assert one.spans[0][1] <= 20 + PERIODS.renew + PERIODS.retry
