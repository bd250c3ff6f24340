"""An API server of one kind (pods) that does what real ones do on bad days: drops, stalls, cuts, lies, forgets, refuses.

Real HTTP on loopback, in the test's own trio. What it has is in `objects`; each request first meets the oldest fault that was put in
its way, then is answered properly. It keeps history as a real one does: `forget` makes every version before now unknown (410).
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from urllib.parse import parse_qs, urlsplit

import h11
import trio

from ztunnel.kube.config import Access
from ztunnel.kube.credentials import Credentials, Files

Json = dict[str, object]
HEAD = b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nConnection: close\r\n%s\r\n"


@dataclass(slots=True)
class Asked:
    """One request, and its connection to answer on."""

    method: str
    path: str
    query: dict[str, str]
    authorization: str
    at: float
    stream: trio.SocketStream

    @property
    def is_watch(self) -> bool:
        return self.query.get("watch") == "true"

    @property
    def is_list(self) -> bool:
        return self.path.endswith("/pods") and not self.is_watch

    async def say(self, body: object, status: int = 200, headers: bytes = b"") -> None:
        """A whole answer."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        await self.stream.send_all(HEAD % (status, headers) + content)

    async def refuse(self, status: int, reason: str = "", headers: bytes = b"") -> None:
        """An answer as the API gives it."""
        body = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": f"{reason} said the server", "code": status}
        await self.say({**body, "reason": reason}, status, headers)


Fault = Callable[[Asked], Awaitable[None]]


@dataclass(slots=True)
class FakeKube:
    """The server."""

    streams: bool = False
    """It has WatchList."""
    objects: dict[str, Json] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    version: int = 100
    oldest: int = 0
    _history: list[tuple[int, str, Json]] = field(default_factory=list)
    _faults: deque[tuple[Callable[[Asked], bool], Fault]] = field(default_factory=deque)
    _news: trio.Event = field(default_factory=trio.Event)
    port: int = 0

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[FakeKube]:
        """As long as the block lasts."""
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.port = listeners[0].socket.getsockname()[1]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, self._serve, listeners)
            yield self
            nursery.cancel_scope.cancel()

    def access(self, credentials: Credentials | None = None) -> Access:
        """How it is reached."""
        return Access(f"http://127.0.0.1:{self.port}", credentials or Files())

    def put(self, name: str, **spec: object) -> None:
        """An object is made or changed."""
        kind = "MODIFIED" if name in self.objects else "ADDED"
        self.version += 1
        metadata = {"name": name, "namespace": "default", "uid": f"uid-{name}", "resourceVersion": str(self.version)}
        self.objects[name] = {"metadata": metadata, "spec": spec}
        self._tell(kind, self.objects[name])

    def drop(self, name: str) -> None:
        """An object is deleted."""
        self.version += 1
        body = self.objects.pop(name)
        self._tell("DELETED", {**body, "metadata": {**body["metadata"], "resourceVersion": str(self.version)}})  # type: ignore[dict-item]

    def forget(self) -> None:
        """All versions before now are unknown from here on."""
        self.version += 1
        self.oldest = self.version

    def next_list(self, fault: Fault) -> None:
        """In the way of the next list, or page of one, behind earlier faults."""
        self._faults.append((lambda asked: asked.is_list, fault))

    def next_watch(self, fault: Fault) -> None:
        """In the way of the next watch."""
        self._faults.append((lambda asked: asked.is_watch, fault))

    def watches(self) -> list[Asked]:
        return [each for each in self.asked if each.is_watch]

    def lists(self) -> list[Asked]:
        return [each for each in self.asked if each.is_list]

    def _tell(self, kind: str, body: Json) -> None:
        self._history.append((self.version, kind, body))
        news, self._news = self._news, trio.Event()
        news.set()

    async def _serve(self, stream: trio.SocketStream) -> None:
        try:
            async with stream:
                asked = await _read(stream)
                if asked is not None:
                    self.asked.append(asked)
                    await self._answer(asked)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            # The client has had enough.
            pass

    async def _answer(self, asked: Asked) -> None:
        for number, (concerns, fault) in enumerate(self._faults):
            if concerns(asked):
                del self._faults[number]
                await fault(asked)
                return
        if asked.path == "/api/v1":
            resources = [{"name": "pods", "kind": "Pod", "namespaced": True}, {"name": "pods/status", "kind": "Pod", "namespaced": True}]
            await asked.say({"resources": resources})
        elif asked.is_watch:
            await self._watch(asked)
        elif asked.is_list:
            await self._list(asked)
        else:
            await asked.refuse(404, "NotFound")

    async def _list(self, asked: Asked) -> None:
        start, version = 0, self.version
        if "continue" in asked.query:
            version, start = (int(part) for part in asked.query["continue"].split("-"))
            if version < self.oldest:
                await asked.refuse(410, "Expired")
                return
        names = sorted(self.objects)
        limit = int(asked.query.get("limit", len(names) or 1))
        metadata = {"resourceVersion": str(version)}
        if start + limit < len(names):
            metadata["continue"] = f"{version}-{start + limit}"
        await asked.say({"kind": "PodList", "metadata": metadata, "items": [self.objects[name] for name in names[start : start + limit]]})

    async def _watch(self, asked: Asked) -> None:
        if "sendInitialEvents" in asked.query:
            if not self.streams:
                await asked.refuse(422, "Invalid")
                return
            sent = self.version
            await asked.stream.send_all(HEAD % (200, b""))
            for name in sorted(self.objects):
                await event(asked, "ADDED", self.objects[name])
            await bookmark(asked, sent, {"k8s.io/initial-events-end": "true"})
        else:
            sent = int(asked.query["resourceVersion"])
            if sent < self.oldest:
                await asked.refuse(410, "Expired")
                return
            await asked.stream.send_all(HEAD % (200, b""))
        while True:
            news = self._news
            for version, kind, body in self._history:
                if version > sent:
                    sent = version
                    await event(asked, kind, body)
            await news.wait()


async def event(asked: Asked, kind: str, body: object) -> None:
    """One line of a watch."""
    if isinstance(body, dict) and kind in ("ADDED", "MODIFIED", "DELETED"):
        body = {"apiVersion": "v1", "kind": "Pod", **body}
    await asked.stream.send_all(json.dumps({"type": kind, "object": body}).encode() + b"\n")


async def bookmark(asked: Asked, version: int, annotations: dict[str, str] | None = None) -> None:
    """A line that says how far the client is."""
    metadata: Json = {"resourceVersion": str(version), "annotations": annotations or {}}
    await event(asked, "BOOKMARK", {"kind": "Pod", "metadata": metadata})


async def _read(stream: trio.SocketStream) -> Asked | None:
    http = h11.Connection(h11.SERVER)
    request: h11.Request | None = None
    while True:
        got = http.next_event()
        if got is h11.NEED_DATA:
            http.receive_data(await stream.receive_some(65536))
        elif isinstance(got, h11.Request):
            request = got
        elif isinstance(got, h11.EndOfMessage) and request is not None:
            break
        elif isinstance(got, h11.ConnectionClosed):
            return None
    parts = urlsplit(request.target.decode())
    headers = dict(request.headers)
    query = {key: values[0] for key, values in parse_qs(parts.query).items()}
    authorization = headers.get(b"authorization", b"").decode()
    return Asked(request.method.decode(), parts.path, query, authorization, trio.current_time(), stream)
