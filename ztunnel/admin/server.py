"""All that an agent serves to operators, as one service: readiness, metrics, control socket."""

from __future__ import annotations

from dataclasses import dataclass

import trio

from ztunnel.admin.api import ControlApi
from ztunnel.admin.listen import control_socket, open_ports
from ztunnel.admin.readiness import Readiness
from ztunnel.admin.scrape import Scrape
from ztunnel.runtime.http import Bounds, Handler, HttpServer
from ztunnel.runtime.metrics import Metrics
from ztunnel.settings import AdminSettings

LIMIT = "admin_connections"
"""Label of ztunnel_limit_hits_total."""


@dataclass(frozen=True, slots=True)
class AdminServer:
    """Three listeners, each with its own bound on connections, so that a scraper cannot lock the command line out."""

    api: ControlApi
    readiness: Readiness
    metrics: Metrics
    settings: AdminSettings
    connections: int = 64

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled. "Started" means that all three accept.

        Raises:
            ListenError: a port or the socket cannot be had.
        """
        settings = self.settings
        with control_socket(settings.socket) as control:
            async with trio.open_nursery() as nursery:
                await nursery.start(self._server(self.api.handle).run, [control])
                metrics = await open_ports(settings.address, settings.metrics_port, "admin.metrics_port")
                await nursery.start(self._server(Scrape(self.metrics).handle).run, metrics)
                readiness = await open_ports(settings.address, settings.readiness_port, "admin.readiness_port")
                await nursery.start(self._server(self.readiness.handle).run, readiness)
                task_status.started()

    def _server(self, handler: Handler) -> HttpServer:
        return HttpServer(
            handler,
            Bounds(connections=self.connections),
            on_bug=lambda: self.metrics.bugs.add(1),
            on_limit=lambda: self.metrics.limit_hits.add(1, LIMIT),
        )
