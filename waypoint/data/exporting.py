"""Spans on their way to collectors: in batches, a few at once, lost when a collector does not keep up. Requests never wait for them."""

from __future__ import annotations

import logging
from typing import Final

from waypoint.data.clusters import Clusters
from waypoint.data.errands import Answer, Errand
from waypoint.telemetry.recorder import Recorder
from waypoint.telemetry.spans import Finished, question
from ztunnel.dataplane.loop import Loop
from ztunnel.mesh.l7.telemetry import Tracing
from ztunnel.runtime.logs import fields

log = logging.getLogger("waypoint.tracing")

BATCH: Final = 256
MAX_UNDER_WAY: Final = 4
"""Batches; while so many are, spans wait in the recorder, which bounds them."""
SECONDS: Final = 10.0
"""That a collector has for one batch."""


class Exporter:
    """Of one worker."""

    __slots__ = ("_clusters", "_failing", "_loop", "_recorder", "_under_way", "lost", "service")

    def __init__(self, loop: Loop, clusters: Clusters, recorder: Recorder) -> None:
        self._loop = loop
        self._clusters = clusters
        self._recorder = recorder
        self._under_way: set[Errand] = set()
        self._failing = False
        self.service = ""
        """The name that spans are of."""
        self.lost = 0
        """Spans that no collector took, since the last time somebody asked."""

    def flush(self) -> None:
        """Sends what there is, as far as there is room."""
        while len(self._under_way) < MAX_UNDER_WAY:
            spans = self._recorder.take_spans(BATCH)
            if not spans:
                return
            by_collector: dict[tuple[str, str, str], list[Finished]] = {}
            for each in spans:
                tracing = each.span.tracing
                by_collector.setdefault((tracing.cluster, tracing.collector.value, tracing.http_path), []).append(each)
            for several in by_collector.values():
                self._send(several[0].span.tracing, several)

    def cancel(self) -> None:
        """The end: nothing more is sent."""
        for errand in list(self._under_way):
            errand.cancel()
        self._under_way.clear()

    def _send(self, tracing: Tracing, spans: list[Finished]) -> None:
        request, content = question(tracing, self.service, spans)
        errand: Errand | None = None
        over = False

        def done(answer: Answer | None) -> None:
            nonlocal over
            over = True
            if errand is not None:
                self._under_way.discard(errand)
            self._done(answer, tracing, len(spans))

        errand = Errand(self._loop, self._clusters, done)
        errand.send(tracing.cluster, request, content, SECONDS)
        if not over:
            self._under_way.add(errand)

    def _done(self, answer: Answer | None, tracing: Tracing, count: int) -> None:
        failed = answer is None or not 200 <= answer.response.status < 300
        if failed:
            self.lost += count
            if not self._failing:
                why = "no answer" if answer is None else f"status {answer.response.status}"
                log.warning("a collector takes no spans: they are lost until it does", extra=fields(cluster=tracing.cluster, reason=why))
        self._failing = failed
