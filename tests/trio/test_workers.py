"""The supervisor's end of a worker: openings, messages both ways, restarts with growing waits, bounds, drains, descriptors."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import trio
import trio.testing

from tests.kit.polling import eventually_async
from tests.kit.workers import FakeWorker
from ztunnel.dataplane.channel import (
    AddPod,
    Drain,
    Drained,
    PodAdded,
    Query,
    RemovePod,
    Sockets,
)
from ztunnel.mesh.errors import LocalError
from ztunnel.mesh.identity import SpiffeId
from ztunnel.runtime import workers
from ztunnel.runtime.launcher import Launcher
from ztunnel.runtime.workers import Outgoing, ProcessWorker, Supervised, spawn_process

IDENTITY = SpiffeId("cluster.local", "default", "pod")


@dataclass
class Feed:
    """The rest of the supervisor. Implements `runtime.workers.Feed`."""

    to_open: list[Outgoing] = field(default_factory=list)
    messages: list[object] = field(default_factory=list)
    deaths: list[str] = field(default_factory=list)
    departures: int = 0
    shortage: str = ""
    """Why there is no whole opening."""

    def opening(self) -> Iterable[Outgoing]:
        yield from self.to_open or [Outgoing(Query(0))]
        if self.shortage:
            raise LocalError(self.shortage)

    def received(self, message: object) -> None:
        self.messages.append(message)

    def worker_died(self, reason: str) -> None:
        self.deaths.append(reason)

    def worker_left(self) -> None:
        self.departures += 1


class Place:
    """A supervised place, and every worker that was in it."""

    def __init__(self) -> None:
        self.feed = Feed()
        self.workers: list[FakeWorker] = []
        self.births: list[float] = []
        self.supervised = Supervised(self.feed, self._spawn)

    async def _spawn(self, theirs: socket.socket) -> FakeWorker:
        self.workers.append(FakeWorker(theirs.dup()))
        self.births.append(trio.current_time())
        return self.workers[-1]

    @property
    def worker(self) -> FakeWorker:
        return self.workers[-1]

    async def successor(self, number: int) -> None:
        """Returns when the place has seen so many workers."""
        await eventually_async(lambda: len(self.workers) == number)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[trio.Nursery]:
        async with trio.open_nursery() as nursery:
            await nursery.start(self.supervised.run)
            yield nursery
            for worker in self.workers:
                worker.leave()
            nursery.cancel_scope.cancel()


@pytest.fixture(name="place")
def fixture_place() -> Place:
    return Place()


def pipe() -> tuple[int, int]:
    return os.pipe()


def is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


# Messages


async def test_a_worker_hears_the_opening_first_and_then_what_is_sent(place: Place, mock_clock: trio.testing.MockClock) -> None:
    place.feed.to_open = [Outgoing(Query(1)), Outgoing(Query(2))]
    place.supervised.send(Query(99))
    async with place.running():
        assert place.supervised.is_serving
        place.supervised.send(Query(3))
        await trio.testing.wait_all_tasks_blocked()
        assert [each.message for each in place.worker.hear()] == [Query(1), Query(2), Query(3)]
        place.worker.say(PodAdded("u1"), PodAdded("u2"))
        await trio.testing.wait_all_tasks_blocked()
        assert place.feed.messages == [PodAdded("u1"), PodAdded("u2")]
    assert not place.supervised.is_serving


async def test_descriptors_travel_and_ours_are_closed(place: Place, mock_clock: trio.testing.MockClock) -> None:
    reading, writing = pipe()
    place.feed.to_open = [Outgoing(AddPod("u", IDENTITY), (writing,))]
    async with place.running():
        await trio.testing.wait_all_tasks_blocked()
        assert not is_open(writing)
        (received,) = place.worker.hear()
        (theirs,) = received.descriptors
        os.write(theirs, b"x")
        os.close(theirs)
        assert os.read(reading, 2) == b"x"
        assert os.read(reading, 2) == b"", "nobody else holds it"
    os.close(reading)


async def test_without_a_worker_descriptors_are_closed(place: Place, mock_clock: trio.testing.MockClock) -> None:
    reading, writing = pipe()
    place.supervised.send(Sockets("u", ipv6=False), (writing,))
    assert not is_open(writing)
    os.close(reading)


async def test_what_a_worker_did_not_read_is_closed_when_it_dies(place: Place, mock_clock: trio.testing.MockClock) -> None:
    async with place.running():
        await trio.testing.wait_all_tasks_blocked()
        place.feed.to_open = []
        ends = [pipe() for _ in range(3)]
        blob = RemovePod("x" * 1_500_000, drain=True)
        for _ in range(20):
            place.supervised.send(blob)
        for _, writing in ends:
            place.supervised.send(Sockets("u", ipv6=False), (writing,))
        await trio.testing.wait_all_tasks_blocked()
        assert all(is_open(writing) for _, writing in ends), "the channel is full"
        place.worker.leave()
        await eventually_async(lambda: place.supervised.restarts == 1)
        assert not any(is_open(writing) for _, writing in ends)
        for reading, _ in ends:
            os.close(reading)


async def test_a_worker_that_reads_nothing_is_replaced(
    place: Place, mock_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_MAX_QUEUED_BYTES", 1 << 20)
    async with place.running():
        first = place.worker
        blob = RemovePod("x" * 1_500_000, drain=True)
        for _ in range(3):
            place.supervised.send(blob)
        assert first.kills
        await place.successor(2)
        assert place.feed.deaths == ["killed"]
        await trio.testing.wait_all_tasks_blocked()
        assert [each.message for each in place.worker.hear()] == [Query(0)], "the next one begins with the opening alone"


async def test_a_worker_that_takes_no_descriptors_is_replaced(
    place: Place, mock_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that asks for sockets and never takes them would use up all descriptors of the supervisor."""
    monkeypatch.setattr(workers, "_MAX_QUEUED_DESCRIPTORS", 8)
    async with place.running():
        first = place.worker
        ends = [pipe() for _ in range(20)]
        first.say(PodAdded("u1"))
        for _, writing in ends:
            place.supervised.send(Sockets("u", ipv6=False), (writing,))
        assert first.kills
        assert sum(is_open(writing) for _, writing in ends) == 9
        await place.successor(2)
        assert place.feed.messages == [], "what it says then does not count"
        await trio.testing.wait_all_tasks_blocked()
        assert [each.message for each in place.worker.hear()] == [Query(0)]
        for reading, _ in ends:
            os.set_blocking(reading, False)
            assert os.read(reading, 1) == b"", "nobody holds the other end"
            os.close(reading)


async def test_a_worker_that_talks_nonsense_is_replaced(place: Place, mock_clock: trio.testing.MockClock) -> None:
    async with place.running():
        first = place.worker
        first.channel.sendall(b"\xff" * 64)
        await trio.testing.wait_all_tasks_blocked()
        assert first.is_hung_up_on
        first.leave("it noticed")
        await place.successor(2)
        assert place.feed.deaths == ["it noticed"]


# Dying


async def test_a_dead_worker_is_replaced_and_told_everything_again(place: Place, mock_clock: trio.testing.MockClock) -> None:
    async with place.running():
        for number in range(1, 4):
            place.worker.leave(f"death {number}")
            await place.successor(number + 1)
            await trio.testing.wait_all_tasks_blocked()
            assert [each.message for each in place.worker.hear()] == [Query(0)]
        assert place.feed.deaths == ["death 1", "death 2", "death 3"]
        assert place.supervised.restarts == 3


async def test_restarts_wait_longer_and_longer_and_not_at_all_after_a_steady_life(place: Place, mock_clock: trio.testing.MockClock) -> None:
    async with place.running():
        for number in range(10):
            place.worker.leave()
            await place.successor(number + 2)
        waits = [round(later - earlier, 2) for earlier, later in pairwise(place.births)]
        assert waits[:4] == pytest.approx([0.05, 0.1, 0.2, 0.4], abs=0.03)
        assert max(waits) == pytest.approx(5.0, abs=0.1)
        await trio.sleep(31)
        died = trio.current_time()
        place.worker.leave()
        await place.successor(12)
        assert place.births[-1] - died < 0.1


async def test_one_that_closes_its_channel_and_lives_on_is_killed(place: Place, mock_clock: trio.testing.MockClock) -> None:
    async with place.running():
        stuck = place.worker
        stuck.channel.shutdown(socket.SHUT_RDWR)
        await place.successor(2)
        assert stuck.kills == 1
        assert place.feed.deaths == ["killed (it did not end by itself)"]


async def test_one_that_cannot_be_killed_is_given_up(place: Place, mock_clock: trio.testing.MockClock) -> None:
    class Immortal(FakeWorker):
        def kill(self) -> None:
            self.kills += 1

    made: list[Immortal] = []

    async def spawn(theirs: socket.socket) -> FakeWorker:
        made.append(Immortal(theirs.dup()))
        return made[-1]

    supervised = Supervised(place.feed, spawn)
    async with trio.open_nursery() as nursery:
        await nursery.start(supervised.run)
        made[0].channel.close()
        await eventually_async(lambda: len(made) == 2)
        assert place.feed.deaths == ["did not end"]
        for worker in made:
            worker.leave()
        nursery.cancel_scope.cancel()


async def test_cancellation_hangs_up_and_waits_for_the_worker(place: Place, mock_clock: trio.testing.MockClock) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(place.supervised.run)
        worker = place.worker
        nursery.cancel_scope.cancel()
        nursery.start_soon(trio.lowlevel.checkpoint)
    assert worker.kills == 1, "it did not leave by itself"
    assert place.supervised.running is None


async def test_a_worker_that_cannot_be_started_ends_the_daemon(place: Place, mock_clock: trio.testing.MockClock) -> None:
    async def fail(_theirs: socket.socket) -> FakeWorker:
        raise FileNotFoundError("no python here")

    with pytest.raises(FileNotFoundError):
        await Supervised(place.feed, fail).run()


async def test_a_successor_that_cannot_be_started_is_tried_again(place: Place, mock_clock: trio.testing.MockClock) -> None:
    attempts = 0

    async def sometimes(theirs: socket.socket) -> FakeWorker:
        nonlocal attempts
        attempts += 1
        if attempts == 2:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        place.workers.append(FakeWorker(theirs.dup()))
        return place.workers[-1]

    place.supervised = Supervised(place.feed, sometimes)
    async with place.running():
        place.worker.leave()
        await place.successor(2)
        assert attempts == 3
        assert place.supervised.restarts == 2


# Leaving


async def test_a_successor_that_cannot_be_told_everything_is_tried_again(place: Place, mock_clock: trio.testing.MockClock) -> None:
    # What made the first one die, no descriptors left, may still be so when the next is to be given its listeners.
    async with place.running():
        place.feed.shortage = "cannot duplicate a listener: Too many open files"
        place.worker.leave()
        # A place that could not be filled lets the process that it started go; its successor comes after a while.
        for number in (2, 3):
            await place.successor(number)
            place.worker.leave()
        await place.successor(4)
        assert "Too many open files" in place.feed.deaths[-1]
        place.feed.shortage = ""
        place.worker.leave()
        await place.successor(5)
        await eventually_async(lambda: place.supervised.is_serving)


async def test_a_drain_returns_what_the_worker_says(place: Place, mock_clock: trio.testing.MockClock) -> None:
    async with place.running() as nursery:
        answers: list[Drained | None] = []

        async def drain() -> None:
            answers.append(await place.supervised.drain(10))

        nursery.start_soon(drain)
        await trio.testing.wait_all_tasks_blocked()
        assert place.worker.hear()[-1].message == Drain(10)
        place.worker.say(Drained(3))
        place.worker.leave()
        await eventually_async(lambda: answers)
        assert answers == [Drained(3)]
        await trio.sleep(10)
        assert len(place.workers) == 1, "nobody follows it"
        assert (place.feed.deaths, place.feed.departures) == ([], 1)


async def test_a_drain_does_not_wait_for_ever(place: Place, mock_clock: trio.testing.MockClock) -> None:
    async with place.running():
        began = trio.current_time()
        assert await place.supervised.drain(3) is None
        assert trio.current_time() - began == pytest.approx(5.0)


async def test_a_drain_between_two_workers_ends_at_once(place: Place, mock_clock: trio.testing.MockClock) -> None:
    async with place.running():
        place.worker.leave()
        await eventually_async(lambda: place.feed.deaths)
        assert await place.supervised.drain(60) is None
        await trio.sleep(10)
        assert len(place.workers) == 1


# Processes


async def test_a_process_says_how_it_ended() -> None:
    for code, expected in (("pass", "exited with status 0"), ("import os; os.kill(os.getpid(), 9)", "killed by SIGKILL")):
        worker = ProcessWorker(subprocess.Popen([sys.executable, "-I", "-S", "-c", code]))  # noqa: ASYNC220 - as the product does it
        assert await worker.wait() == expected
        assert await worker.wait() == expected, "and says it again"


@pytest.mark.slow
async def test_a_real_worker_starts_and_leaves_with_its_channel() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        worker = await spawn_process(theirs, Launcher(), log_format="text", log_level="info")
    ours.close()
    assert await worker.wait() == "exited with status 0"
    ours, theirs = socket.socketpair()
    with ours, theirs:
        worker = await spawn_process(theirs, Launcher(), log_format="text", log_level="info")
        assert worker.pid > 0
        worker.kill()
        assert await worker.wait() == f"killed by {signal.SIGKILL.name}"


def test_messages_to_a_worker_know_their_descriptors() -> None:
    reading, writing = pipe()
    outgoing = Outgoing(RemovePod("u", drain=True), (reading, writing))
    outgoing.close()
    outgoing.close()
    assert not is_open(reading)
