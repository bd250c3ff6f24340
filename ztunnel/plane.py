"""The supervisor's view of its data plane: what every worker must know, and what all of them together answer.

Each worker has a `Link`, which is its `runtime.workers.Feed`; what concerns all goes to all. Implements `node.pods.PodSink`.
Our own copies of the listeners are kept for workers that have to be replaced: connections wait in the backlog meanwhile.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import msgspec
import trio

from ztunnel.dataplane.channel import (
    Activity,
    AddPod,
    Answer,
    Certificate,
    Configure,
    Drained,
    Flows,
    NeedSockets,
    PodAdded,
    PodRemoved,
    Query,
    RemovePod,
    Sockets,
    Update,
    Withdraw,
)
from ztunnel.dataplane.flow import FlowNews
from ztunnel.hbone.handshake import Credentials
from ztunnel.mesh.delta import Delta
from ztunnel.mesh.errors import LocalError
from ztunnel.mesh.identity import SpiffeId
from ztunnel.mesh.index import Index
from ztunnel.node.sockets import Listeners
from ztunnel.runtime.logs import fields
from ztunnel.runtime.workers import Outgoing, Spawn, Supervised

log = logging.getLogger(__name__)

_ANSWER_SECONDS = 2.0
_SOCKETS_PER_MESSAGE = 128

ToAll = Update | Certificate | Withdraw | RemovePod | Query


class WorkerAway(LocalError):
    """The data plane did not answer: it is being replaced, or it is stuck."""


@dataclass(slots=True)
class _Held:
    """A pod that the workers serve."""

    identity: SpiffeId
    listeners: list[int]
    waiting: set[int]
    """Workers that have not said yet that they serve it."""
    added: trio.Event = field(default_factory=trio.Event)

    def close(self) -> None:
        for descriptor in self.listeners:
            os.close(descriptor)
        self.listeners = []


@dataclass(slots=True)
class _Leaving:
    """A pod that the workers are told to let go."""

    waiting: set[int]
    removed: trio.Event = field(default_factory=trio.Event)


@dataclass(slots=True)
class _Question:
    """A query on its way."""

    waiting: set[int]
    answers: list[Answer] = field(default_factory=list)
    answered: trio.Event = field(default_factory=trio.Event)


class Link:
    """One worker's place in the data plane. Implements `runtime.workers.Feed`."""

    def __init__(self, plane: DataPlane, number: int, prefix: str, spawn: Spawn) -> None:
        self._plane = plane
        self.number = number
        self.prefix = prefix
        """Stands before the names of its connections and tunnels, where there are several workers."""
        self.active: dict[str, int] = {}
        """Live connections by pod, in this worker."""
        self.worker = Supervised(self, spawn)

    def opening(self) -> Iterator[Outgoing]:
        """Everything that a fresh worker must know, in the order in which it needs it."""
        return self._plane.opening(self)

    def received(self, message: object) -> None:
        self._plane.received(self, message)

    def worker_died(self, reason: str) -> None:
        self._plane.worker_died(self, reason)

    def worker_left(self) -> None:
        self._plane.worker_left(self)


@dataclass(slots=True)
class Listener:
    """Who is told what the workers tell. Set by the composition root."""

    flows: Callable[[int, str, Iterable[FlowNews], int], None] = lambda _worker, _prefix, _news, _lost: None
    """A worker's number, what stands before its connections' names, its news, and how many records it lost."""
    limits: Callable[[dict[str, int], int], None] = lambda _limits, _bugs: None
    death: Callable[[int, str], None] = lambda _worker, _reason: None


class DataPlane:
    """All workers. `identity_of` and `make_sockets` are the node's, set by the composition root."""

    def __init__(self, configure: Configure, index: Index, spawn: Spawn, workers: int) -> None:
        self._configure = configure
        self._index = index
        self._pods: dict[str, _Held] = {}
        self._leaving: dict[str, list[_Leaving]] = {}
        """By pod, in the order in which the workers were told, which is that of their acknowledgements."""
        self._credentials: dict[SpiffeId, Credentials] = {}
        self._questions: dict[int, _Question] = {}
        self._asked = 0
        self.listener = Listener()
        self.identity_of: Callable[[str], SpiffeId | None] = lambda _uid: None
        self.make_sockets: Callable[[str, int, int], list[socket.socket]] = _no_sockets
        self.links = [Link(self, number, f"w{number}-" if workers > 1 else "", spawn) for number in range(workers)]

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keeps the workers alive. Started once each first one has been sent its opening."""
        async with trio.open_nursery() as nursery:
            for link in self.links:
                await nursery.start(link.worker.run)
            task_status.started()

    async def drain(self, seconds: float) -> int | None:
        """Ends all connections within `seconds`; how many were cut then, None if that is not known."""
        outcomes: list[Drained | None] = []

        async def drain(link: Link) -> None:
            outcomes.append(await link.worker.drain(seconds))

        async with trio.open_nursery() as nursery:
            for link in self.links:
                nursery.start_soon(drain, link)
        known = [outcome.cut for outcome in outcomes if outcome is not None]
        return sum(known) if len(known) == len(self.links) else None

    @property
    def serving(self) -> int:
        """Workers that are there."""
        return sum(link.worker.is_serving for link in self.links)

    @property
    def restarts(self) -> int:
        """Workers that had to be replaced, since the start."""
        return sum(link.worker.restarts for link in self.links)

    # What the supervisor tells

    def update(self, delta: Delta) -> None:
        """The mesh changed; `index` has it already."""
        self._tell(Update(delta))

    def certificate(self, identity: SpiffeId, credentials: Credentials | None) -> None:
        """New credentials for an identity, or none any more."""
        if credentials is None:
            self._credentials.pop(identity, None)
            self._tell(Withdraw(identity))
        else:
            self._credentials[identity] = credentials
            self._tell(_certificate(credentials))

    async def ask(self) -> Answer:
        """The live connections and tunnels of all workers that answer within two seconds.

        Raises:
            WorkerAway: none does.
        """
        waiting = self._serving_numbers()
        self._asked += 1
        number = self._asked
        question = self._questions[number] = _Question(waiting)
        try:
            self._tell(Query(number))
            with trio.move_on_after(_ANSWER_SECONDS if waiting else 0):
                await question.answered.wait()
        finally:
            del self._questions[number]
        if not question.answers:
            raise WorkerAway("the data plane does not answer")
        connections = tuple(state for answer in question.answers for state in answer.connections)
        return Answer(0, connections, tuple(state for answer in question.answers for state in answer.tunnels))

    # PodSink

    async def add(self, uid: str, listeners: Listeners) -> None:
        """Serve a pod. Returns when every worker does.

        Raises:
            LocalError: it has left the mesh meanwhile.
        """
        identity = self.identity_of(uid)
        if identity is None:
            raise LocalError(f"pod {uid} is not in the mesh any more")
        own = list(_dup(each.fileno() for each in listeners))
        former = self._pods.pop(uid, None)
        if former is not None:
            former.close()
        held = self._pods[uid] = _Held(identity, own, {link.number for link in self.links})
        for link in self.links:
            link.worker.send(AddPod(uid, identity), _dup(own))
        await held.added.wait()

    async def remove(self, uid: str, drain: bool) -> None:
        """Let a pod go. Returns when every worker has."""
        held = self._pods.get(uid)
        if held is None:
            return
        if not drain:
            del self._pods[uid]
            held.close()
        waiting = self._serving_numbers()
        if not waiting:
            return
        leaving = _Leaving(waiting)
        self._leaving.setdefault(uid, []).append(leaving)
        self._tell(RemovePod(uid, drain))
        await leaving.removed.wait()
        if not drain:
            for link in self.links:
                link.active.pop(uid, None)

    def active(self, uid: str) -> int:
        """Live connections of a pod, at most a moment old."""
        return sum(link.active.get(uid, 0) for link in self.links)

    # What the workers tell

    def opening(self, link: Link) -> Iterator[Outgoing]:
        """See `Link.opening`."""
        index = self._index
        share = max(1, self._configure.max_connections // len(self.links))
        yield Outgoing(_configure_one(self._configure, link.prefix, share))
        yield Outgoing(Update(Delta(tuple(index.workloads()), tuple(index.services()), tuple(index.policies()))))
        for credentials in self._credentials.values():
            yield Outgoing(_certificate(credentials))
        for uid, held in self._pods.items():
            yield Outgoing(AddPod(uid, held.identity), _dup(held.listeners))

    def received(self, link: Link, message: object) -> None:
        """See `Link.received`."""
        match message:
            case Flows():
                self.listener.flows(link.number, link.prefix, message.news, message.lost)
            case NeedSockets():
                self._give_sockets(link, message)
            case Activity():
                self._take_activity(link, message)
            case PodAdded():
                self._added(link, message.uid)
            case PodRemoved():
                self._removed(link, message.uid)
            case Answer():
                self._answered(link, message)
            case _:
                log.error("unexpected message of a worker", extra=fields(type=type(message).__name__))

    def worker_died(self, link: Link, reason: str) -> None:
        """Its connections died with it."""
        self.worker_left(link)
        self.listener.death(link.number, reason)

    def worker_left(self, link: Link) -> None:
        """It has no connections any more, and what it was asked it will not do."""
        link.active.clear()
        for uid, requests in list(self._leaving.items()):
            for _ in list(requests):
                self._removed(link, uid)
        for question in self._questions.values():
            _settle(question.waiting, link, question.answered)

    def close(self) -> None:
        """Gives up our copies of all listeners."""
        for held in self._pods.values():
            held.close()
        self._pods.clear()

    def _serving_numbers(self) -> set[int]:
        return {link.number for link in self.links if link.worker.is_serving}

    def _tell(self, message: ToAll) -> None:
        for link in self.links:
            link.worker.send(message)

    def _added(self, link: Link, uid: str) -> None:
        if held := self._pods.get(uid):
            _settle(held.waiting, link, held.added)

    def _removed(self, link: Link, uid: str) -> None:
        requests = self._leaving.get(uid, [])
        oldest = next((each for each in requests if link.number in each.waiting), None)
        if oldest is not None and _settle(oldest.waiting, link, oldest.removed):
            requests.remove(oldest)
            if not requests:
                del self._leaving[uid]

    def _answered(self, link: Link, answer: Answer) -> None:
        if question := self._questions.get(answer.id):
            question.answers.append(answer)
            _settle(question.waiting, link, question.answered)

    def _give_sockets(self, link: Link, request: NeedSockets) -> None:
        family = socket.AF_INET6 if request.ipv6 else socket.AF_INET
        try:
            sockets = self.make_sockets(request.uid, family, min(max(request.count, 1), _SOCKETS_PER_MESSAGE))
        except LocalError as error:
            log.warning("cannot make sockets for a worker", extra=fields(uid=request.uid, error=error))
            sockets = []
        link.worker.send(Sockets(request.uid, request.ipv6), tuple(sock.detach() for sock in sockets))

    def _take_activity(self, link: Link, activity: Activity) -> None:
        for uid, count in activity.active.items():
            if count and uid in self._pods:
                link.active[uid] = count
            else:
                link.active.pop(uid, None)
        if activity.limits or activity.bugs:
            self.listener.limits(activity.limits, activity.bugs)


def _configure_one(configure: Configure, prefix: str, connections: int) -> Configure:
    """The configuration of one worker of several."""
    return msgspec.structs.replace(configure, prefix=prefix, max_connections=connections)


def _settle(waiting: set[int], link: Link, done: trio.Event) -> bool:
    """One worker fewer to wait for. True: none is left, and whoever waits is woken."""
    waiting.discard(link.number)
    if not waiting:
        done.set()
    return not waiting


def _certificate(credentials: Credentials) -> Certificate:
    return Certificate(credentials.identity, credentials.chain_pem, credentials.key_pem, credentials.roots_pem)


def _dup(descriptors: Iterable[int]) -> tuple[int, ...]:
    made: list[int] = []
    try:
        # extend() keeps what was made before an error.
        made.extend(os.dup(descriptor) for descriptor in descriptors)
    except OSError as error:
        for descriptor in made:
            os.close(descriptor)
        raise LocalError(f"cannot duplicate a listener: {error.strerror}") from error
    return tuple(made)


def _no_sockets(uid: str, _family: int, _count: int) -> list[socket.socket]:
    raise LocalError(f"no sockets for pod {uid}: the agent is not composed")
