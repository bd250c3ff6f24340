"""What the supervisor tells its workers and in which order, and how it waits for all of them."""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest
import trio
import trio.testing

from tests.kit.builders import index, policy, service, workload
from tests.kit.pki import FakePki
from tests.kit.polling import eventually_async
from tests.kit.proxies import SETTINGS
from tests.kit.workers import FakeWorker
from ztunnel.dataplane.channel import (
    Activity,
    AddPod,
    Answer,
    Certificate,
    Configure,
    Drained,
    Flows,
    Message,
    NeedSockets,
    PodAdded,
    PodRemoved,
    Query,
    RemovePod,
    Sockets,
    Update,
    Withdraw,
)
from ztunnel.dataplane.flow import ConnectionState, Direction, FlowEnd, FlowNews, FlowPath
from ztunnel.mesh.delta import Delta
from ztunnel.mesh.errors import LocalError
from ztunnel.mesh.rules import Action
from ztunnel.node.sockets import Listeners
from ztunnel.plane import DataPlane, Listener, WorkerAway

PKI = FakePki()
IDENTITY = PKI.identity("server")
CREDENTIALS = PKI.credentials(IDENTITY)
PATH = FlowPath(Direction.INBOUND, "u", ("10.0.0.2", 2), "", mutual_tls=False)
NEWS = (FlowNews(PATH, 1, ends=(FlowEnd(1, "10.0.0.1", 1),)),)
STATE = ConnectionState("c1", Direction.INBOUND, "TCP", "u", "", "", "", "", "", "", 0, 0, 0.0, "", "open")


class Plane:
    """A data plane whose workers are played by the test."""

    def __init__(self, count: int = 1) -> None:
        self.lives: dict[int, list[FakeWorker]] = {}
        self.index = index()
        self.plane = DataPlane(SETTINGS, self.index, self._spawn, count)
        self.plane.identity_of = {"u": IDENTITY, "v": IDENTITY}.get
        self.told: list[object] = []
        self.plane.listener = Listener(
            lambda worker, prefix, news, lost: self.told.append(("flows", worker, prefix, tuple(news), lost)),
            lambda limits, bugs: self.told.append(("limits", limits, bugs)),
            lambda worker, reason: self.told.append(("death", worker, reason)),
        )
        self.workers: list[FakeWorker] = []

    async def _spawn(self, theirs: socket.socket) -> FakeWorker:
        self.workers.append(FakeWorker(theirs.dup()))
        return self.workers[-1]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[trio.Nursery]:
        async with trio.open_nursery() as nursery:
            await nursery.start(self.plane.run)
            await self.heard()
            yield nursery
            for worker in self.workers:
                worker.leave()
            nursery.cancel_scope.cancel()
        self.plane.close()

    async def heard(self, worker: int = -1) -> list[Message]:
        """What a worker has heard since the last time; descriptors are closed."""
        await trio.testing.wait_all_tasks_blocked()
        messages: list[Message] = []
        for received in self.workers[worker].hear():
            for descriptor in received.descriptors:
                os.close(descriptor)
            assert isinstance(received.message, Message)
            messages.append(received.message)
        return messages

    async def says(self, message: Message, worker: int = -1) -> None:
        self.workers[worker].say(message)
        await trio.testing.wait_all_tasks_blocked()


def listeners() -> Listeners:
    return Listeners(*(socket.socket() for _ in range(3)))


@pytest.fixture(name="mesh")
def fixture_mesh() -> Plane:
    return Plane()


@asynccontextmanager
async def added(mesh: Plane, nursery: trio.Nursery, uid: str = "u") -> AsyncIterator[None]:
    made = listeners()
    done = trio.Event()

    async def add() -> None:
        await mesh.plane.add(uid, made)
        done.set()

    nursery.start_soon(add)
    await trio.testing.wait_all_tasks_blocked()
    assert not done.is_set()
    for number in range(len(mesh.plane.links)):
        await mesh.says(PodAdded(uid), number)
    with trio.fail_after(30):
        await done.wait()
    yield
    made.close()


# Openings


async def test_a_worker_learns_the_mesh_then_certificates_then_pods(mesh: Plane) -> None:
    server = workload("server", "10.0.0.1")
    async with mesh.running() as nursery:
        values = (server,), (service("web", behind=[server]),), (policy("p", Action.DENY),)
        mesh.index.apply(Delta(*values))
        mesh.plane.update(Delta(*values))
        mesh.plane.certificate(IDENTITY, CREDENTIALS)
        async with added(mesh, nursery):
            assert [type(each) for each in await mesh.heard()] == [Update, Certificate, AddPod]
            mesh.workers[-1].leave()
            await eventually_async(lambda: len(mesh.workers) == 2)
            opening = await mesh.heard()
    assert [type(each) for each in opening] == [Configure, Update, Certificate, AddPod]
    assert opening[0] == msgspec.structs.replace(SETTINGS, prefix="")
    assert opening[1] == Update(Delta(*values))
    assert opening[3] == AddPod("u", IDENTITY)
    assert mesh.told == [("death", 0, "it ended")]
    assert mesh.plane.restarts == 1


async def test_a_pod_that_was_let_go_and_a_certificate_that_was_withdrawn_are_not_replayed(mesh: Plane) -> None:
    async with mesh.running() as nursery:
        mesh.plane.certificate(IDENTITY, CREDENTIALS)
        mesh.plane.certificate(IDENTITY, None)
        async with added(mesh, nursery):
            assert isinstance((await mesh.heard())[1], Withdraw)
            nursery.start_soon(mesh.plane.remove, "u", False)
            await trio.testing.wait_all_tasks_blocked()
        mesh.workers[-1].leave()
        await eventually_async(lambda: len(mesh.workers) == 2)
        assert [type(each) for each in await mesh.heard()] == [Configure, Update]


async def test_several_workers_share_the_limits_and_number_their_connections_apart(mock_clock: trio.testing.MockClock) -> None:
    mesh = Plane(3)
    async with trio.open_nursery() as nursery:
        await nursery.start(mesh.plane.run)
        configured = [(await mesh.heard(number))[0] for number in range(3)]
        assert [each.prefix for each in configured if isinstance(each, Configure)] == ["w0-", "w1-", "w2-"]
        assert {each.max_connections for each in configured if isinstance(each, Configure)} == {SETTINGS.max_connections // 3}
        assert mesh.plane.serving == 3
        for worker in mesh.workers:
            worker.leave()
        nursery.cancel_scope.cancel()


# Pods


async def test_a_pod_is_served_once_every_worker_says_so(mock_clock: trio.testing.MockClock) -> None:
    mesh = Plane(2)
    async with mesh.running() as nursery:
        made, done = listeners(), trio.Event()

        async def add() -> None:
            await mesh.plane.add("u", made)
            done.set()

        nursery.start_soon(add)
        await trio.testing.wait_all_tasks_blocked()
        await mesh.says(PodAdded("u"), 0)
        await mesh.says(PodAdded("u"), 0)
        await mesh.says(PodAdded("nobody"), 1)
        assert not done.is_set()
        # The other one dies: its successor is told of the pod in its opening, and answers.
        mesh.workers[1].leave()
        await eventually_async(lambda: len(mesh.workers) == 3)
        assert AddPod("u", IDENTITY) in await mesh.heard()
        await mesh.says(PodAdded("u"))
        assert done.is_set()
        made.close()


async def test_a_pod_that_the_mesh_does_not_want_is_not_added(mesh: Plane) -> None:
    made = listeners()
    with pytest.raises(LocalError, match="not in the mesh any more"):
        await mesh.plane.add("stranger", made)
    made.close()


async def test_adding_a_pod_again_closes_the_former_copies(mesh: Plane) -> None:
    async with mesh.running() as nursery:
        async with added(mesh, nursery), added(mesh, nursery):
            messages = await mesh.heard()
            assert messages == [AddPod("u", IDENTITY)] * 2
        before = len(os.listdir("/proc/self/fd"))
        mesh.plane.close()
        assert len(os.listdir("/proc/self/fd")) == before - 3


@pytest.mark.parametrize("drain", [True, False])
async def test_letting_a_pod_go_waits_for_every_worker(mock_clock: trio.testing.MockClock, drain: bool) -> None:
    mesh = Plane(2)
    async with mesh.running() as nursery, added(mesh, nursery):
        await mesh.says(Activity({"u": 2}), 0)
        done = trio.Event()

        async def remove() -> None:
            await mesh.plane.remove("u", drain)
            done.set()

        nursery.start_soon(remove)
        assert RemovePod("u", drain) in await mesh.heard(0)
        await mesh.says(PodRemoved("u"), 0)
        assert not done.is_set()
        mesh.workers[1].leave()
        await trio.testing.wait_all_tasks_blocked()
        assert done.is_set(), "a worker that died has let it go"
        assert mesh.plane.active("u") == (2 if drain else 0)


async def test_a_pod_is_let_go_also_by_a_worker_that_has_not_answered_about_it_before(
    mesh: Plane, mock_clock: trio.testing.MockClock
) -> None:
    async with mesh.running() as nursery, added(mesh, nursery):
        await mesh.heard()
        mock_clock.autojump_threshold = 0
        for drain in (True, False):
            with trio.move_on_after(1):
                await mesh.plane.remove("u", drain)
        mock_clock.autojump_threshold = math.inf
        assert await mesh.heard() == [RemovePod("u", drain=True), RemovePod("u", drain=False)]
        for _ in range(2):
            assert mesh.plane._leaving
            await mesh.says(PodRemoved("u"))
        assert not mesh.plane._leaving


async def test_letting_go_needs_no_worker(mesh: Plane) -> None:
    await mesh.plane.remove("nobody", drain=False)
    async with mesh.running() as nursery, added(mesh, nursery):
        mesh.workers[-1].leave()
        await eventually_async(lambda: not mesh.plane.serving)
        await mesh.plane.remove("u", drain=True)
        await mesh.plane.remove("u", drain=False)


async def test_live_connections_are_added_up_and_die_with_their_worker(mock_clock: trio.testing.MockClock) -> None:
    mesh = Plane(2)
    async with mesh.running() as nursery, added(mesh, nursery):
        await mesh.says(Activity({"u": 2, "nobody": 5}), 0)
        await mesh.says(Activity({"u": 3}), 1)
        assert (mesh.plane.active("u"), mesh.plane.active("nobody")) == (5, 0)
        await mesh.says(Activity({"u": 0}), 0)
        assert mesh.plane.active("u") == 3
        mesh.workers[1].leave()
        await eventually_async(lambda: mesh.plane.active("u") == 0)


# Questions


async def test_answers_of_all_workers_are_one(mock_clock: trio.testing.MockClock) -> None:
    mesh = Plane(2)
    async with mesh.running() as nursery:
        answers: list[Answer] = []

        async def ask() -> None:
            answers.append(await mesh.plane.ask())

        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        for number in range(2):
            await mesh.says(Answer(1, (STATE,), ()), number)
        assert answers == [Answer(0, (STATE, STATE), ())]


async def test_questions_do_not_mix(mesh: Plane) -> None:
    async with mesh.running() as nursery:
        answers: dict[str, Answer] = {}

        async def ask(name: str) -> None:
            answers[name] = await mesh.plane.ask()

        for name in ("first", "second"):
            nursery.start_soon(ask, name)
            await trio.testing.wait_all_tasks_blocked()
        assert await mesh.heard() == [Query(1), Query(2)]
        await mesh.says(Answer(1, (STATE,), ()))
        assert list(answers) == ["first"]
        await mesh.says(Answer(2, (), ()))
        await mesh.says(Answer(2, (), ()))
        assert answers == {"first": Answer(0, (STATE,), ()), "second": Answer(0, (), ())}


async def test_a_worker_that_does_not_answer_is_not_waited_for_long(mesh: Plane, mock_clock: trio.testing.MockClock) -> None:
    async with mesh.running():
        began = trio.current_time()
        with pytest.raises(WorkerAway):
            await mesh.plane.ask()
        assert trio.current_time() - began == pytest.approx(2.0, abs=0.01)


async def test_without_a_worker_nobody_is_asked(mesh: Plane, mock_clock: trio.testing.MockClock) -> None:
    began = trio.current_time()
    with pytest.raises(WorkerAway):
        await mesh.plane.ask()
    assert trio.current_time() == pytest.approx(began, abs=0.01)


async def test_a_worker_that_dies_over_a_question_is_not_waited_for(mesh: Plane) -> None:
    async with mesh.running() as nursery:
        failed = trio.Event()

        async def ask() -> None:
            with pytest.raises(WorkerAway):
                await mesh.plane.ask()
            failed.set()

        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        mesh.workers[-1].leave()
        await trio.testing.wait_all_tasks_blocked()
        assert failed.is_set()


async def test_a_worker_that_drains_and_leaves_over_a_question_is_not_waited_for(mock_clock: trio.testing.MockClock) -> None:
    mesh = Plane(2)
    async with mesh.running() as nursery:
        nursery.start_soon(mesh.plane.drain, 60)
        answers: list[Answer] = []

        async def ask() -> None:
            answers.append(await mesh.plane.ask())

        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        await mesh.says(Answer(1, (STATE,), ()), 0)
        assert answers == []
        mesh.workers[1].leave()
        await trio.testing.wait_all_tasks_blocked()
        assert answers == [Answer(0, (STATE,), ())]


# News and needs


async def test_news_reach_the_listener(mesh: Plane) -> None:
    async with mesh.running():
        await mesh.says(Flows(NEWS, 2))
        await mesh.says(Activity({}, {"connections": 3}, 1))
        await mesh.says(Activity({}))
        assert mesh.told == [("flows", 0, "", NEWS, 2), ("limits", {"connections": 3}, 1)]


async def test_what_no_worker_should_say_is_logged(mesh: Plane, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        mesh.plane.received(mesh.plane.links[0], Drained(0))
    assert "unexpected message" in caplog.text


async def test_sockets_are_made_on_demand_and_within_bounds(mesh: Plane) -> None:
    asked: list[tuple[str, int, int]] = []

    def make(uid: str, family: int, count: int) -> list[socket.socket]:
        asked.append((uid, family, count))
        return [socket.socket(family) for _ in range(2)]

    mesh.plane.make_sockets = make
    async with mesh.running():
        for ipv6, count in ((False, 16), (True, 1 << 30), (False, -1)):
            await mesh.says(NeedSockets("u", ipv6, count))
        heard = mesh.workers[-1].hear()
        assert [each.message for each in heard] == [Sockets("u", ipv6=False), Sockets("u", ipv6=True), Sockets("u", ipv6=False)]
        for received in heard:
            assert len(received.descriptors) == 2
            for descriptor in received.descriptors:
                os.close(descriptor)
    assert asked == [("u", socket.AF_INET, 16), ("u", socket.AF_INET6, 128), ("u", socket.AF_INET, 1)]


async def test_sockets_that_cannot_be_made_are_an_empty_batch(mesh: Plane, caplog: pytest.LogCaptureFixture) -> None:
    async with mesh.running():
        await mesh.says(NeedSockets("u", ipv6=False, count=16))
        (received,) = mesh.workers[-1].hear()
        assert (received.message, received.descriptors) == (Sockets("u", ipv6=False), ())
    assert "cannot make sockets" in caplog.text


# Leaving


@pytest.mark.parametrize(("said", "expected"), [((Drained(1), Drained(2)), 3), ((Drained(1), None), None)])
async def test_a_drain_adds_up_what_was_cut(
    mock_clock: trio.testing.MockClock, said: tuple[Drained | None, ...], expected: int | None
) -> None:
    mesh = Plane(2)
    outcomes: list[int | None] = []
    async with mesh.running() as nursery:

        async def drain() -> None:
            outcomes.append(await mesh.plane.drain(5))

        nursery.start_soon(drain)
        await trio.testing.wait_all_tasks_blocked()
        for worker, message in zip(mesh.workers, said, strict=True):
            if message is not None:
                worker.say(message)
            worker.leave()
        await eventually_async(lambda: outcomes)
    assert outcomes == [expected]
