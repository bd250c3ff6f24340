"""What the L7 proxy serves to operators: readiness, metrics, and on a Unix socket its configuration and state.

GET /v1/status    what it is, whether it is ready, what is wrong
GET /v1/config    the configuration in force; keys and certificates only by their size
GET /v1/workers   connections, tunnels, clusters and endpoints of each worker
POST /v1/explain  why a request would be answered as it would be; see `questions`
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, is_dataclass
from enum import Enum

import trio

from waypoint.http.explain import explain
from waypoint.http.jwt import KeySets
from waypoint.plane import Plane
from waypoint.questions import QuestionError, read_question
from waypoint.settings import Settings
from ztunnel import __version__
from ztunnel.admin.listen import open_ports
from ztunnel.admin.readiness import Readiness
from ztunnel.admin.scrape import Scrape
from ztunnel.mesh.errors import LocalError
from ztunnel.mesh.l7.config import ProxyConfig, fingerprint
from ztunnel.runtime.http import BadRequest, Bounds, Handler, HttpServer, Request, Response
from ztunnel.runtime.metrics import Metrics
from ztunnel.runtime.unix_listener import unix_listener
from ztunnel.sources.objects import Refusal

JSON = "application/json"


@dataclass(frozen=True, slots=True)
class Control:
    """Three listeners, each with its own bound on connections."""

    settings: Settings
    plane: Plane
    readiness: Readiness
    metrics: Metrics
    config: Callable[[], ProxyConfig | None]
    refusals: Callable[[], tuple[Refusal, ...]]

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled. "Started" means that all three accept.

        Raises:
            ListenError: a port or the socket cannot be had.
        """
        admin = self.settings.admin
        with unix_listener(admin.socket, "admin.socket") as control:
            async with trio.open_nursery() as nursery:
                await nursery.start(self._server(self.handle).run, [control])
                metrics = await open_ports(admin.address, admin.metrics_port, "admin.metrics_port")
                await nursery.start(self._server(Scrape(self.metrics).handle).run, metrics)
                readiness = await open_ports(admin.address, admin.readiness_port, "admin.readiness_port")
                await nursery.start(self._server(self.readiness.handle).run, readiness)
                task_status.started()

    def _server(self, handler: Handler) -> HttpServer:
        return HttpServer(
            handler,
            Bounds(connections=self.settings.limits.admin_connections),
            on_bug=lambda: self.metrics.bugs.add(1),
            on_limit=lambda: self.metrics.limit_hits.add(1, "admin_connections"),
        )

    async def handle(self, request: Request) -> Response:
        """The answers of the Unix socket.

        Raises:
            BadRequest: 404 for another path, 405 for another method, 503 while the workers do not answer.
        """
        if request.path == "/v1/explain":
            return self._explain(request)
        if request.path not in ("/v1/status", "/v1/config", "/v1/workers"):
            raise BadRequest(404, "there are /v1/status, /v1/config, /v1/workers and /v1/explain")
        if request.method not in ("GET", "HEAD"):
            raise BadRequest(405, "it can be read only")
        if request.path == "/v1/status":
            return _json(self._status())
        if request.path == "/v1/config":
            config = self.config()
            return _json(None if config is None else dump(config))
        try:
            return _json(await self.plane.ask())
        except LocalError as error:
            raise BadRequest(503, str(error)) from error

    def _explain(self, request: Request) -> Response:
        if request.method != "POST":
            raise BadRequest(405, "it takes a POST")
        config = self.config()
        if config is None:
            raise BadRequest(503, "there is no configuration yet")
        try:
            question = read_question(request.body, self.settings.trust_domain)
        except QuestionError as error:
            raise BadRequest(400, str(error)) from error
        key_sets = KeySets()
        for source, jwks in self.plane.known_key_sets.items():
            key_sets.put(source, jwks)
        return _json(asdict(explain(config, question.address, question.request, question.client, key_sets, time.time())))

    def _status(self) -> dict[str, object]:
        return {
            "name": self.settings.name,
            "namespace": self.settings.namespace,
            "version": __version__,
            "ready": self.readiness.ready,
            "pending": list(self.readiness.pending),
            "workers": self.plane.serving,
            "restarts": self.plane.restarts,
            "problems": {str(port): problem for port, problem in self.plane.problems.items()},
            "listening": sorted(self.plane.listening),
            "limits": dict(self.plane.limits),
            "config": fingerprint(config) if (config := self.config()) is not None else "",
            "refusals": [asdict(refusal) for refusal in self.refusals()],
        }


def dump(value: object) -> object:
    """A configuration as JSON has it. Bytes, among them private keys, are told by their size only."""
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value):
        return {each.name: dump(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, dict):
        return {str(key): dump(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [dump(each) for each in value]
    return value


def _json(value: object) -> Response:
    return Response(200, json.dumps(value).encode() + b"\n", JSON)
