"""Metrics for Prometheus, on port 15020."""

from __future__ import annotations

from dataclasses import dataclass

from ztunnel.runtime.http import Request, Response
from ztunnel.runtime.metrics import Metrics

PATHS = ("/metrics", "/stats/prometheus")
"""The second is where Istio's scrape annotations point."""


@dataclass(frozen=True, slots=True)
class Scrape:
    """The answers of port 15020."""

    metrics: Metrics

    async def handle(self, request: Request) -> Response:
        """The exposition, OpenMetrics when it is accepted."""
        if request.path not in PATHS:
            return Response(404, f"{' and '.join(PATHS)} are here\n".encode())
        if request.method not in ("GET", "HEAD"):
            return Response(405, b"GET it\n", headers=(("allow", "GET, HEAD"),))
        content_type, body = self.metrics.exposition(request.headers.get("accept", ""))
        return Response(200, body, content_type)
