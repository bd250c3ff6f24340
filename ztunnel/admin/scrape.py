"""Metrics for Prometheus, on port 15020.

Every pod that reaches the node can ask, and an exposition of thousands of series takes tenths of a second and megabytes. So it is
repeated for as long as keeps the making of it to a small part of the daemon's time, and all who wait for it share one copy.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ztunnel.runtime.http import Request, Response
from ztunnel.runtime.metrics import OPENMETRICS, Registry

PATHS = ("/metrics", "/stats/prometheus")
"""The second is where Istio's scrape annotations point."""
REST = 9
"""An exposition is repeated for so many times the time that it took: two forms together take a fifth of the daemon's time at most."""


@dataclass(frozen=True, slots=True)
class Scrape:
    """The answers of port 15020."""

    metrics: Registry
    clock: Callable[[], float] = time.monotonic
    _made: dict[bool, tuple[float, Response]] = field(default_factory=dict, init=False)
    """By whether it is OpenMetrics: until when it is repeated, and what it is."""

    async def handle(self, request: Request) -> Response:
        """The exposition, OpenMetrics when it is accepted."""
        if request.path not in PATHS:
            return Response(404, f"{' and '.join(PATHS)} are here\n".encode())
        if request.method not in ("GET", "HEAD"):
            return Response(405, b"GET it\n", headers=(("allow", "GET, HEAD"),))
        accept = request.headers.get("accept", "")
        form = OPENMETRICS in accept
        began = self.clock()
        if form not in self._made or self._made[form][0] <= began:
            content_type, body = self.metrics.exposition(accept)
            ended = self.clock()
            self._made[form] = (ended + REST * (ended - began), Response(200, body, content_type))
        return self._made[form][1]
