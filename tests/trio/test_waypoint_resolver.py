"""Names that clusters use are kept fresh, those that requests name are looked up once, and a failure takes nothing away."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio
import trio.testing

from waypoint.resolver import REFRESH, RETRY, Resolver, look_up


class Zone:
    """A DNS that the test writes, and what was delivered of it."""

    def __init__(self) -> None:
        self.records: dict[str, tuple[str, ...] | None] = {}
        self.asked: list[str] = []
        self.told: list[tuple[str, int, tuple[str, ...]]] = []

    async def lookup(self, name: str) -> tuple[str, ...]:
        self.asked.append(name)
        await trio.lowlevel.checkpoint()
        found = self.records.get(name)
        if found is None:
            raise OSError("no such name")
        return found

    @asynccontextmanager
    async def served(self) -> AsyncIterator[Resolver]:
        resolver = Resolver(lambda *told: self.told.append(told), self.lookup)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(resolver.run)
            yield resolver
            nursery.cancel_scope.cancel()


async def test_a_wanted_name_is_delivered_when_it_changes(mock_clock: trio.testing.MockClock) -> None:
    zone = Zone()
    zone.records["a"] = ("10.0.0.1",)
    async with zone.served() as resolver:
        resolver.want([("a", 80)])
        await trio.testing.wait_all_tasks_blocked()
        assert zone.told == [("a", 80, ("10.0.0.1",))]
        await trio.sleep(REFRESH * 2.5)
        assert len(zone.asked) >= 3
        assert len(zone.told) == 1
        zone.records["a"] = ("10.0.0.2", "10.0.0.3")
        await trio.sleep(REFRESH * 1.2)
        assert zone.told[1:] == [("a", 80, ("10.0.0.2", "10.0.0.3"))]
        resolver.want([])
        asked = len(zone.asked)
        await trio.sleep(REFRESH * 3)
        assert len(zone.asked) == asked


async def test_what_was_known_stays_while_a_name_cannot_be_resolved(mock_clock: trio.testing.MockClock) -> None:
    zone = Zone()
    async with zone.served() as resolver:
        resolver.want([("a", 80)])
        await trio.sleep(RETRY * 2.5)
        assert zone.told == []
        assert len(zone.asked) >= 2
        zone.records["a"] = ("10.0.0.1",)
        await trio.sleep(RETRY * 1.5)
        zone.records["a"] = None
        await trio.sleep(REFRESH * 1.2)
        assert zone.told == [("a", 80, ("10.0.0.1",))]


async def test_a_name_that_is_asked_for_once_is_answered_whatever_comes_of_it(mock_clock: trio.testing.MockClock) -> None:
    zone = Zone()
    zone.records["a"] = ("10.0.0.1",)
    async with zone.served() as resolver:
        resolver.ask("a")
        resolver.ask("unknown")
        await trio.testing.wait_all_tasks_blocked()
        assert sorted(zone.told) == [("a", 0, ("10.0.0.1",)), ("unknown", 0, ())]
        await trio.sleep(REFRESH * 3)
        assert sorted(zone.asked) == ["a", "unknown"]


async def test_the_hosts_resolver_knows_addresses() -> None:
    assert await look_up("127.0.0.1") == ("127.0.0.1",)
