"""All objects of one kind, listed once and then followed: what a store is told is what the API server has, again and again.

The walk: find the kind (not installed: wait for it), get the whole set (as a stream of initial events where the server can do that,
else in pages), then watch from that version on. A watch that ends in good order or breaks goes on where it was; a version that the
server has forgotten (410) means the whole set again, of which the store is told as one. Nothing that the server does ends it:
whatever fails is tried again after a wait that grows, jitters and heeds Retry-After.

Invariants: the store hears of a whole set only when it is complete; as long as the server is away, or answers nonsense, the store is
told nothing and what it has stays. A kind that was there and is gone is believed gone only when the server has said so
several times, because a server that has just started may not know all of its kinds yet.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from enum import Enum
from random import random
from typing import Generic, NamedTuple, Protocol, TypeVar

import trio

from ztunnel.kube.backoff import Backoff
from ztunnel.kube.client import KubeClient, decoded
from ztunnel.kube.discovery import Discovery, Kind
from ztunnel.kube.errors import ApiRefused, BadAnswer, Gone, KubeError, NotFound, refused
from ztunnel.kube.resources import Resource
from ztunnel.runtime.logs import fields

log = logging.getLogger(__name__)

T = TypeVar("T")
Contra = TypeVar("Contra")

INITIAL_EVENTS_END = "k8s.io/initial-events-end"
Body = dict[str, object]


class Name(NamedTuple):
    """Of an object within its kind."""

    namespace: str
    name: str


class Store(Protocol[T]):
    """Who is told. None of these may raise or take long."""

    def read(self, body: Body) -> T:
        """What is kept of an object; the body itself is let go."""
        ...

    def replaced(self, items: dict[Name, T]) -> None:
        """The whole set."""
        ...

    def changed(self, name: Name, item: T | None) -> None:
        """One object is now so, or gone."""
        ...


class Phase(Enum):
    """How far a reflector is."""

    SEEKING = "seeking"
    """Nobody knows yet whether the kind is installed."""
    ABSENT = "not installed"
    LISTING = "listing"
    """Its set is not complete yet."""
    FOLLOWING = "following"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Waits and sizes. The defaults are those of a cluster; tests have shorter ones."""

    page: int = 500
    """Objects of one answer. Source: client-go."""
    watch_seconds: float = 300.0
    """A watch is asked to end after this and up to twice this: so that servers that were restarted get their share again."""
    idle_seconds: float = 180.0
    """Silence after which a watch is stalled. Servers send a bookmark about once a minute; one that sends none costs a request more."""
    absent_seconds: float = 30.0
    """Between two looks for a kind that is not installed."""
    broken_streams: int = 3
    """So many sets that broke off as streams, and they are read in pages."""
    gone_looks: int = 3
    """So often in a row must a kind that was there be gone."""
    healthy_seconds: float = 60.0
    """A watch that held this long was a success, and the next failure waits as the first."""
    short_seconds: float = 1.0
    """One that ended in good order before this is followed by a wait all the same."""
    backoff_first: float = 0.8
    backoff_most: float = 30.0
    items_per_turn: int = 50
    """Objects read before others get a turn: a few milliseconds."""


@dataclass(slots=True)
class Counts:
    """What it took, since the start; for metrics."""

    lists: int = 0
    watches: int = 0
    events: int = 0
    failures: int = 0


@dataclass(slots=True)
class Reflector(Generic[T]):
    """Follows one kind for a store.

    Attributes:
        phase: how far it is.
        problem: why it is no further, or empty; for the operator.
    """

    client: KubeClient
    discovery: Discovery
    kind: Kind
    store: Store[T]
    pace: Pace = field(default_factory=Pace)
    on_phase: Callable[[], None] = lambda: None
    """Called after `phase` or `problem` changed."""
    random: Callable[[], float] = random
    namespace: str = ""
    """Only the objects of this one; empty: of all."""
    name: str = ""
    """Only the object of this name; empty: all. Rights can be narrowed to it."""
    phase: Phase = field(default=Phase.SEEKING, init=False)
    problem: str = field(default="", init=False)
    counts: Counts = field(default_factory=Counts, init=False)
    _resource: Resource | None = field(default=None, init=False)
    _version: str = field(default="", init=False)
    """Up to which the store knows; empty: it knows nothing that could be gone on from."""
    _streams: bool = field(default=True, init=False)
    """Whether the server can send the whole set as a stream (WatchList); found out by trying."""
    _broken_streams: int = field(default=0, init=False)
    _in_pages: bool = field(default=True, init=False)
    _complete: bool = field(default=False, init=False)
    """The store has been told of a whole set once."""

    @property
    def resource(self) -> Resource | None:
        """The kind as the server has it; None while it has none or nobody knows."""
        return self._resource

    async def run(self) -> None:
        """Follow, for ever."""
        backoff = Backoff(self.random, self.pace.backoff_first, self.pace.backoff_most)
        missing = 0
        while True:
            began = trio.current_time()
            try:
                if self._resource is None:
                    self._resource = await self.discovery.find(self.kind)
                if self._resource is None:
                    missing += 1
                    await self._absent(missing)
                    continue
                missing = 0
                await self._follow(self._resource)
                failure = None
            except KubeError as error:
                failure = error
            lasted = trio.current_time() - began
            if lasted >= self.pace.healthy_seconds:
                backoff.succeeded()
            if failure is not None:
                await self._failed(failure, backoff)
            elif lasted < self.pace.short_seconds:
                # A server that ends each watch at once must not be asked in a loop.
                await trio.sleep(backoff.next())

    async def _absent(self, looks: int) -> None:
        """The kind is not installed, the server says."""
        if not self._complete or looks >= self.pace.gone_looks:
            if self._complete:
                log.warning("kind is gone: its objects are no longer in force", extra=fields(kind=self.kind))
                self._complete, self._version = False, ""
                self.store.replaced({})
            self._enter(Phase.ABSENT)
        else:
            self._enter(self.phase, f"the API server has no {self.kind} any more; what there was stays in force for now")
        await trio.sleep(self.pace.absent_seconds * (0.75 + 0.5 * self.random()))

    async def _failed(self, error: KubeError, backoff: Backoff) -> None:
        self.counts.failures += 1
        if isinstance(error, NotFound):
            # Not installed any more, or in another version now.
            self._resource = None
        elif isinstance(error, Gone):
            # Where we were is forgotten: the whole set anew.
            self._version = ""
        wait = backoff.next(error.retry_after if isinstance(error, ApiRefused) else None)
        if str(error) != self.problem:
            log.warning("kubernetes: will try again", extra=fields(kind=self.kind, seconds=f"{wait:.1f}", reason=error))
        self._enter(self.phase, str(error))
        await trio.sleep(wait)

    def _enter(self, phase: Phase, problem: str = "") -> None:
        if (phase, problem) != (self.phase, self.problem):
            self.phase, self.problem = phase, problem
            self.on_phase()

    # ------------------------------------------------------------------------------------------------------ following

    async def _follow(self, resource: Resource) -> None:
        """One watch, to its end in good order; before it the whole set if that is not known.

        Raises:
            KubeError: the watch is over.
        """
        if not self._version:
            if not self._complete:
                self._enter(Phase.LISTING, self.problem)
            if self._streams:
                await self._stream(resource)
            if self._streams or self._version:
                return
            await self._list(resource)
        await self._watch(resource)

    async def _watch(self, resource: Resource) -> None:
        params = {"resourceVersion": self._version, "allowWatchBookmarks": "true", "timeoutSeconds": self._watch_seconds()}
        self.counts.watches += 1
        async with self.client.watch(resource, self._selected(params), self.namespace, idle_seconds=self.pace.idle_seconds) as lines:
            await self._take(resource, lines)

    async def _take(self, resource: Resource, lines: AsyncIterator[bytes]) -> None:
        """The events of a watch, as they come."""
        self._enter(Phase.FOLLOWING)
        async with aclosing(self._events(resource, lines)) as events:
            async for kind, body in events:
                if kind != "BOOKMARK":
                    self.counts.events += 1
                    name = _name(body, resource)
                    self.store.changed(name, None if kind == "DELETED" else self.store.read(body))
                self._version = _version(body, resource)

    async def _events(self, resource: Resource, lines: AsyncIterator[bytes]) -> AsyncGenerator[tuple[str, Body], None]:
        """What lines say, one by one, until the server ends the watch.

        Raises:
            BadAnswer: a line that is no event. ApiRefused: an event that is a refusal.
        """
        number = 0
        async for line in lines:
            event = decoded(line, resource.words("watch"))
            kind, body = event.get("type"), event.get("object")
            if not isinstance(body, dict) or kind not in ("ADDED", "MODIFIED", "DELETED", "BOOKMARK", "ERROR"):
                raise BadAnswer(f"cannot {resource.words('watch')}: an event of an unknown form")
            if kind == "ERROR":
                raise _told(body, resource)
            yield kind, _typed(body, resource)
            number += 1
            if number % self.pace.items_per_turn == 0:
                await trio.lowlevel.checkpoint()

    # --------------------------------------------------------------------------------------------------- the whole set

    async def _stream(self, resource: Resource) -> None:
        """The whole set as initial events, and on from there in the same watch. Source: KEP-3157."""
        params = {
            "sendInitialEvents": "true",
            "resourceVersionMatch": "NotOlderThan",
            "allowWatchBookmarks": "true",
            "timeoutSeconds": self._watch_seconds(),
        }
        self.counts.watches += 1
        try:
            async with self.client.watch(resource, self._selected(params), self.namespace, idle_seconds=self.pace.idle_seconds) as lines:
                await self._take_whole(resource, lines)
                await self._take(resource, lines)
        except KubeError as error:
            if self._version:
                raise
            self._broken_streams += 1
            if isinstance(error, ApiRefused) and error.status in (400, 422):
                # An older server, which knows no such watch.
                self._streams = False
                return
            # Also one that takes the wish for an ordinary watch, or something between us that lets no long answer through.
            self._streams = self._broken_streams < self.pace.broken_streams
            raise

    async def _take_whole(self, resource: Resource, lines: AsyncIterator[bytes]) -> None:
        items: dict[Name, T] = {}
        async with aclosing(self._events(resource, lines)) as events:
            async for kind, body in events:
                if kind == "BOOKMARK":
                    if _ends_initial_events(body):
                        self._tell_whole(items, _version(body, resource))
                        return
                elif kind == "DELETED":
                    items.pop(_name(body, resource), None)
                else:
                    items[_name(body, resource)] = self.store.read(body)
        raise BadAnswer(f"cannot {resource.words('watch')}: the server ended its initial events before they were complete")

    async def _list(self, resource: Resource) -> None:
        """The whole set in pages."""
        items: dict[Name, T] = {}
        params = self._selected({"limit": str(self.pace.page)} if self._in_pages else {})
        self.counts.lists += 1
        while True:
            try:
                page = await self.client.list(resource, self.namespace, params)
            except Gone:
                # The pages took so long that the server has forgotten what the first one was of.
                self._in_pages = False
                raise
            listed = page.get("items")
            if not isinstance(listed, list):
                if listed is not None:
                    raise BadAnswer(f"cannot {resource.words('list')}: the answer has no list of items")
                listed = []
            for number, body in enumerate(listed, 1):
                if not isinstance(body, dict):
                    raise BadAnswer(f"cannot {resource.words('list')}: an item is no object")
                items[_name(body, resource)] = self.store.read(_typed(body, resource))
                if number % self.pace.items_per_turn == 0:
                    await trio.lowlevel.checkpoint()
            token = _metadata(page).get("continue")
            if not token or not isinstance(token, str):
                break
            params = self._selected({"limit": str(self.pace.page), "continue": token})
        self._tell_whole(items, _version(page, resource))

    def _tell_whole(self, items: dict[Name, T], version: str) -> None:
        self._version, self._complete = version, True
        self.store.replaced(items)
        self._enter(Phase.FOLLOWING)

    def _selected(self, params: dict[str, str]) -> dict[str, str]:
        return {**params, "fieldSelector": f"metadata.name={self.name}"} if self.name else params

    def _watch_seconds(self) -> str:
        return str(max(1, int(self.pace.watch_seconds * (1 + self.random()))))


def _told(body: Body, resource: Resource) -> ApiRefused:
    code, message, reason = body.get("code"), body.get("message"), body.get("reason")
    status = code if isinstance(code, int) and 400 <= code <= 599 else 500
    return refused(resource.words("watch"), status, str(message)[:500], reason if isinstance(reason, str) else "")


def _typed(body: Body, resource: Resource) -> Body:
    """Items of a list do not say what they are."""
    body.setdefault("apiVersion", resource.api_version)
    body.setdefault("kind", resource.kind)
    return body


def _metadata(body: Mapping[str, object]) -> Mapping[str, object]:
    metadata = body.get("metadata")
    return metadata if isinstance(metadata, dict) else {}


def _name(body: Body, resource: Resource) -> Name:
    metadata = _metadata(body)
    name, namespace = metadata.get("name"), metadata.get("namespace", "")
    if not isinstance(name, str) or not isinstance(namespace, str) or not name:
        raise BadAnswer(f"cannot {resource.words('watch')}: an object without a name")
    return Name(namespace, name)


def _version(body: Body, resource: Resource) -> str:
    version = _metadata(body).get("resourceVersion")
    if not isinstance(version, str) or not version:
        raise BadAnswer(f"cannot {resource.words('watch')}: an answer without a resourceVersion")
    return version


def _ends_initial_events(body: Body) -> bool:
    annotations = _metadata(body).get("annotations")
    return isinstance(annotations, dict) and annotations.get(INITIAL_EVENTS_END) == "true"
