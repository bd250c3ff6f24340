"""The series of all workers together, as Prometheus sees them. Lives in the supervisor.

Each metric's number of series is bounded; past that everything is summed in one whose labels all say `overflow`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from prometheus_client.metrics_core import Metric as Family

from waypoint.telemetry.increments import Increment, Labels
from waypoint.telemetry.series import BOUNDS, HISTOGRAMS, LABELS, NAMES
from ztunnel.mesh.l7.telemetry import Metric
from ztunnel.runtime.metrics import LONGEST_LABEL, OVERFLOW

MAX_SERIES: Final = 20_000
_OVERFLOW: Final[Labels] = tuple((name, OVERFLOW) for name in LABELS)
_HELP: Final = {
    Metric.REQUESTS: "Requests that ended",
    Metric.DURATION: "From a request's first byte to its answer's last, milliseconds",
    Metric.REQUEST_SIZE: "Bytes of requests' bodies",
    Metric.RESPONSE_SIZE: "Bytes of answers' bodies",
    Metric.GRPC_REQUESTS: "gRPC messages of clients",
    Metric.GRPC_RESPONSES: "gRPC messages of servers",
    Metric.TCP_OPENED: "TCP connections opened",
    Metric.TCP_CLOSED: "TCP connections closed",
    Metric.TCP_SENT: "Bytes from server to client",
    Metric.TCP_RECEIVED: "Bytes from client to server",
}


class _Total:
    __slots__ = ("buckets", "count", "total")

    def __init__(self) -> None:
        self.count = 0.0
        self.total = 0.0
        self.buckets = [0] * (len(BOUNDS) + 1)

    def add(self, increment: Increment) -> None:
        self.count += increment.count
        self.total += increment.total
        for index, amount in enumerate(increment.buckets[: len(self.buckets)]):
            self.buckets[index] += amount


class RequestMetrics:
    """A collector for prometheus_client."""

    def __init__(self, max_series: int = MAX_SERIES) -> None:
        self._max_series = max_series
        self._series: dict[Metric, dict[Labels, _Total]] = {metric: {} for metric in Metric}
        self._shadow: dict[tuple[str, str, str], int] = {}
        self.overflowed = 0
        """How often an increment found no room of its own."""

    def add(self, increments: Iterable[Increment]) -> None:
        """News of a worker."""
        for increment in increments:
            series = self._series[Metric(increment.metric)]
            known = series.get(increment.labels)
            if known is None:
                labels = increment.labels
                if len(series) >= self._max_series:
                    labels = _OVERFLOW
                    self.overflowed += 1
                known = series.setdefault(labels, _Total())
            known.add(increment)

    def add_shadow(self, verdicts: Mapping[tuple[str, str, str], int]) -> None:
        """(policy, action, result) of dry-run policies, and how often."""
        for verdict, count in verdicts.items():
            if verdict in self._shadow or len(self._shadow) < self._max_series:
                self._shadow[verdict] = self._shadow.get(verdict, 0) + count

    def collect(self) -> Iterator[Family]:
        """For prometheus_client."""
        for metric, series in self._series.items():
            name = NAMES[metric]
            family = Family(name, _HELP[metric], "histogram" if metric in HISTOGRAMS else "counter")
            for labels, total in sorted(series.items()):
                said = {key: value[:LONGEST_LABEL].encode("utf-8", "replace").decode() for key, value in labels}
                if metric in HISTOGRAMS:
                    _histogram(family, name, said, total)
                else:
                    family.add_sample(f"{name}_total", said, total.count)
            yield family
        dry_run = Family("waypoint_authorization_dry_run", "Verdicts of policies that are not enforced", "counter")
        for (policy, action, result), count in sorted(self._shadow.items()):
            dry_run.add_sample(dry_run.name + "_total", {"policy": policy, "action": action, "result": result}, count)
        yield dry_run


def _histogram(family: Family, name: str, labels: dict[str, str], total: _Total) -> None:
    reached = 0
    for bound, amount in zip((*map(_bound, BOUNDS), "+Inf"), total.buckets, strict=True):
        reached += amount
        family.add_sample(f"{name}_bucket", {**labels, "le": bound}, reached)
    family.add_sample(f"{name}_sum", labels, total.total)
    family.add_sample(f"{name}_count", labels, total.count)


def _bound(value: float) -> str:
    return f"{value:g}" if value < 1e6 else str(int(value))
