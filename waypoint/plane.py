"""The supervisor's view of its workers: what each must know, and what they answer.

Listeners are made here and given to the workers as descriptors; our own copies are for workers that have to be replaced: connections wait
in the backlog meanwhile.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import msgspec
import trio

from waypoint.data.changes import difference
from waypoint.data.channel import (
    ChangeConfig,
    ConfigureWaypoint,
    Counted,
    KeySetFetched,
    Listen,
    Resolved,
    ServeConfig,
    ToSupervisor,
    Unlisten,
    WantAddresses,
    WorkerActivity,
    WorkerState,
)
from waypoint.telemetry.exposition import MAX_SERIES, RequestMetrics
from ztunnel.dataplane.channel import Certificate, Drained, Query, Withdraw
from ztunnel.hbone.handshake import Credentials
from ztunnel.mesh.errors import LocalError
from ztunnel.mesh.identity import SpiffeId
from ztunnel.mesh.l7.config import ProxyConfig
from ztunnel.runtime.logs import fields
from ztunnel.runtime.unix_listener import ListenError
from ztunnel.runtime.workers import Outgoing, Spawn, Supervised

log = logging.getLogger(__name__)

BACKLOG = 4096
_ANSWER_SECONDS = 2.0

ToAll = ServeConfig | ChangeConfig | Certificate | Withdraw | KeySetFetched | Resolved | Unlisten | Query


@dataclass(slots=True)
class _Question:
    """A query on its way."""

    waiting: set[int]
    answers: list[dict[str, object]] = field(default_factory=list)
    answered: trio.Event = field(default_factory=trio.Event)


class Link:
    """One worker's place. Implements `runtime.workers.Feed`."""

    def __init__(self, plane: Plane, number: int, spawn: Spawn) -> None:
        self._plane = plane
        self.number = number
        self.worker = Supervised(self, spawn, ToSupervisor)

    def opening(self) -> Iterator[Outgoing]:
        """Everything that a fresh worker must know."""
        return self._plane.opening(self)

    def received(self, message: object) -> None:
        self._plane.received(self, message)

    def worker_died(self, reason: str) -> None:
        self._plane.worker_left(self)

    def worker_left(self) -> None:
        self._plane.worker_left(self)


class Plane:
    """All workers."""

    def __init__(self, configure: ConfigureWaypoint, address: str, spawn: Spawn, workers: int, max_series: int = MAX_SERIES) -> None:
        """`address`: where listeners are made, an IP literal or `*`."""
        self._write: Callable[[bytes], object] = write_standard_output
        self.requests = RequestMetrics(max_series)
        """What the workers counted."""
        self._configure = configure
        self._address = address
        self._listeners: dict[int, list[socket.socket]] = {}
        """By the port that messages name them by: 0 for HBONE."""
        self._config: ProxyConfig | None = None
        self._credentials: Credentials | None = None
        self._key_sets: dict[str, str] = {}
        self._resolved: dict[tuple[str, int], tuple[str, ...]] = {}
        self._questions: dict[int, _Question] = {}
        self._asked = 0
        self.problems: dict[int, str] = {}
        """Ports of a gateway that cannot be opened, and why."""
        self.limits: dict[str, int] = {}
        """Limits that were hit, and how often; `bugs` is one of them."""
        self.want_addresses: Callable[[str], None] = lambda _name: None
        """Who looks names up. Set by the composition root."""
        self.links = [Link(self, number, spawn) for number in range(workers)]

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

    def listen(self, number: int, port: int) -> int:
        """Opens a port and gives it to the workers as `number`; the port that it is, if `port` was 0.

        Raises:
            ListenError: it cannot be had.
        """
        listeners = open_listeners(self._address, port)
        self.unlisten(number)
        self._listeners[number] = listeners
        for link in self.links:
            link.worker.send(Listen(number), _dup(listeners))
        chosen: int = listeners[0].getsockname()[1]
        return chosen

    def unlisten(self, number: int) -> None:
        """Closes a port."""
        for listener in self._listeners.pop(number, []):
            listener.close()
            self._tell(Unlisten(number))

    @property
    def listening(self) -> frozenset[int]:
        """Numbers that are open."""
        return frozenset(self._listeners)

    def serve(self, config: ProxyConfig) -> None:
        """What to do from now on. A gateway's ports are opened and closed with it; one that cannot be had is tried again with the next
        change, and `problems` says why."""
        if config != self._config:
            before, self._config = self._config, config
            self._tell(ServeConfig(config) if before is None else difference(before, config))
        self.open_ports()

    def open_ports(self) -> None:
        """Opens and closes what the configuration says and is not so yet."""
        servers = () if self._config is None else self._config.servers
        wanted = {server.port for server in servers if not server.problem}
        for port in self._listeners.keys() - wanted - {0}:
            self.unlisten(port)
        self.problems = {}
        for port in sorted(wanted - self._listeners.keys()):
            try:
                self.listen(port, port)
            except ListenError as error:
                self.problems[port] = str(error)
                log.error("a gateway's port cannot be opened", extra=fields(port=port, error=error))

    def certificate(self, identity: SpiffeId, credentials: Credentials | None) -> None:
        """New credentials, or none any more."""
        self._credentials = credentials
        self._tell(Withdraw(identity) if credentials is None else _certificate(credentials))

    def key_set(self, source: str, jwks: str) -> None:
        """Keys of a token issuer."""
        self._key_sets[source] = jwks
        self._tell(KeySetFetched(source, jwks))

    def resolved(self, name: str, port: int, addresses: tuple[str, ...]) -> None:
        """What DNS says of a name; port 0: of one that a worker wanted."""
        if port:
            self._resolved[name, port] = addresses
        self._tell(Resolved(name, port, addresses))

    @property
    def known_key_sets(self) -> dict[str, str]:
        """Keys of token issuers, by source."""
        return dict(self._key_sets)

    async def ask(self) -> list[dict[str, object]]:
        """The state of all workers that answer within two seconds.

        Raises:
            LocalError: none does.
        """
        waiting = {link.number for link in self.links if link.worker.is_serving}
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
            raise LocalError("the workers do not answer")
        return question.answers

    # What the workers tell

    def opening(self, link: Link) -> Iterator[Outgoing]:
        """See `Link.opening`."""
        prefix = f"w{link.number}-" if len(self.links) > 1 else ""
        yield Outgoing(msgspec.structs.replace(self._configure, prefix=prefix))
        if self._credentials is not None:
            yield Outgoing(_certificate(self._credentials))
        for source, jwks in self._key_sets.items():
            yield Outgoing(KeySetFetched(source, jwks))
        for (name, port), addresses in self._resolved.items():
            yield Outgoing(Resolved(name, port, addresses))
        if self._config is not None:
            yield Outgoing(ServeConfig(self._config))
        for number, listeners in self._listeners.items():
            yield Outgoing(Listen(number), _dup(listeners))

    def received(self, link: Link, message: object) -> None:
        """See `Link.received`."""
        match message:
            case WorkerActivity():
                for name, hits in message.limits.items():
                    self.limits[name] = self.limits.get(name, 0) + hits
                if message.bugs:
                    self.limits["bugs"] = self.limits.get("bugs", 0) + message.bugs
            case Counted():
                self.requests.add(message.increments)
                self.requests.add_shadow({(each.policy, each.action, each.result): each.count for each in message.shadow})
                if message.lines:
                    self._write(message.lines)
                if message.dropped:
                    self.limits["telemetry"] = self.limits.get("telemetry", 0) + message.dropped
            case WantAddresses():
                self.want_addresses(message.name)
            case WorkerState():
                if question := self._questions.get(message.id):
                    question.answers.append(json.loads(message.state))
                    _settle(question, link)
            case _:
                log.error("unexpected message of a worker", extra=fields(type=type(message).__name__))

    def worker_left(self, link: Link) -> None:
        """What it was asked it will not answer."""
        for question in self._questions.values():
            _settle(question, link)

    def close(self) -> None:
        """Gives up our copies of all listeners."""
        for listeners in self._listeners.values():
            for listener in listeners:
                listener.close()
        self._listeners.clear()

    def _tell(self, message: ToAll) -> None:
        for link in self.links:
            link.worker.send(message)


def open_listeners(address: str, port: int) -> list[socket.socket]:
    """Listeners of a TCP port, one for each family that this host has.

    Raises:
        ListenError: the port is taken, or the address is not ours.
    """
    wanted = [(socket.AF_INET6, "::"), (socket.AF_INET, "0.0.0.0")]  # noqa: S104 - `*` means every address
    if address != "*":
        wanted = [(socket.AF_INET6 if ":" in address else socket.AF_INET, address)]
    made: list[socket.socket] = []
    for family, each in wanted:
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind((each, made[0].getsockname()[1] if made else port))
            listener.listen(BACKLOG)
        except OSError as error:
            listener.close()
            if family == socket.AF_INET6 and address == "*" and error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                continue  # a host without IPv6
            for other in made:
                other.close()
            raise ListenError(f"cannot listen on {address} port {port}: {error.strerror}; see `ss -ltnp sport = :{port}`") from error
        made.append(listener)
    return made


def write_standard_output(lines: bytes) -> None:
    """Lines of access logs; a reader that does not keep up holds us up, one that is gone does not."""
    try:
        sys.stdout.buffer.write(lines)
        sys.stdout.buffer.flush()
    except (BrokenPipeError, ValueError):
        pass


def _settle(question: _Question, link: Link) -> None:
    question.waiting.discard(link.number)
    if not question.waiting:
        question.answered.set()


def _certificate(credentials: Credentials) -> Certificate:
    return Certificate(credentials.identity, credentials.chain_pem, credentials.key_pem, credentials.roots_pem)


def _dup(listeners: list[socket.socket]) -> tuple[int, ...]:
    return tuple(os.dup(listener.fileno()) for listener in listeners)
