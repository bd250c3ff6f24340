"""The control API on the agent's Unix socket: JSON listings for the command line, and the log level.

    GET  /v1/status /v1/connections /v1/tunnels /v1/workloads /v1/services /v1/policies /v1/certificates /v1/log-level
    POST /v1/log-level   {"level": "debug"}

Only its socket's mode says who may ask. Nothing here changes traffic.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict

from ztunnel.admin.views import VERSION, AdminView, CertificateRow, ConnectionRow, PolicyRow, ServiceRow, TunnelRow, WorkloadRow
from ztunnel.runtime.http import BadRequest, Request, Response
from ztunnel.runtime.logs import LEVELS, level_name, set_level

Row = CertificateRow | ConnectionRow | PolicyRow | ServiceRow | TunnelRow | WorkloadRow

_PREFIX = "/v1/"


class ControlApi:
    """Answers from one view.

    Args:
        node: named in every answer, so that those of several nodes can be laid together.
    """

    def __init__(self, view: AdminView, node: str) -> None:
        self._view = view
        self._node = node
        self._listings: dict[str, Callable[[], Awaitable[Sequence[Row]]]] = {
            "connections": view.connections,
            "tunnels": view.tunnels,
            "workloads": _later(view.workloads),
            "services": _later(view.services),
            "policies": _later(view.policies),
            "certificates": _later(view.certificates),
        }

    async def handle(self, request: Request) -> Response:
        """One answer.

        Raises:
            BadRequest: 404 for another path, 405 for another method, 400 for a log level that is none.
        """
        name = request.path.removeprefix(_PREFIX) if request.path.startswith(_PREFIX) else ""
        if name == "log-level":
            return self._log_level(request)
        if name != "status" and name not in self._listings:
            raise BadRequest(
                404, f"nothing at {request.path[:100]!r}; there are {', '.join(sorted({*self._listings, 'status', 'log-level'}))}"
            )
        if request.method not in ("GET", "HEAD"):
            raise BadRequest(405, f"{_PREFIX}{name} can be read only")
        if name == "status":
            return await self._status()
        rows = await self._listings[name]()
        return _json({"version": VERSION, "node": self._node, "items": [asdict(row) for row in rows]})

    async def _status(self) -> Response:
        status = self._view.status()
        answer = {"version": VERSION, **asdict(status), "node": self._node, "items": [asdict(pod) for pod in status.pods]}
        del answer["pods"]
        answer["connections"] = len(await self._view.connections())
        answer["tunnels"] = len(await self._view.tunnels())
        return _json(answer)

    def _log_level(self, request: Request) -> Response:
        if request.method == "POST":
            try:
                body: object = json.loads(request.body) if request.body else dict(request.query)
                wanted = body.get("level") if isinstance(body, dict) else None
                set_level(str(wanted))
            except (ValueError, RecursionError) as error:
                raise BadRequest(400, f'send {{"level": …}} with one of {", ".join(LEVELS)}: {error}') from error
        elif request.method not in ("GET", "HEAD"):
            raise BadRequest(405, "GET or POST it")
        return _json({"version": VERSION, "node": self._node, "level": level_name()})


def _later(read: Callable[[], Sequence[Row]]) -> Callable[[], Awaitable[Sequence[Row]]]:
    async def listing() -> Sequence[Row]:
        return read()

    return listing


def _json(value: dict[str, object]) -> Response:
    return Response(200, json.dumps(value, separators=(",", ":")).encode(), "application/json")
