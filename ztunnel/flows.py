"""News of connections, as metrics and as one log line at each end.

The worker says what it saw (addresses, identities, bytes); the names come from the mesh here. Metrics follow Istio's convention,
`received` from client to server on both reporters; the log's bytes are the pod's own, as Istio's ztunnel writes them.
What is known of a path is looked up once for all records of it that come together, and made once for many such batches.
Source: Istio ztunnel `proxy/metrics.rs`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ztunnel.dataplane.flow import Direction, FlowNews, FlowPath
from ztunnel.mesh.errors import Flag
from ztunnel.mesh.workloads import Workload
from ztunnel.runtime.access import Alike, Ended, log_connections
from ztunnel.runtime.metrics import UNKNOWN, Metrics, Traffic

MAX_SEEN = 4096
"""Pods whose last traffic is remembered; more than a node has."""
MAX_KNOWN = 4096
"""Paths whose labels and lines are remembered."""
FindWorkload = Callable[[str], Workload | None]


@dataclass(frozen=True, slots=True)
class _Known:
    """What follows from a path while its ends are these workloads."""

    source: Workload | None
    destination: Workload | None
    labels: Traffic
    alike: Alike


class FlowReporter:
    """Takes the workers' news; remembers when each pod last had traffic."""

    def __init__(self, metrics: Metrics, find: FindWorkload, clock: Callable[[], float]) -> None:
        self._metrics = metrics
        self._find = find
        self._clock = clock
        self._open: Counter[tuple[int, str]] = Counter()
        """Connections that were reported open, by worker and reporter."""
        self._known: dict[FlowPath, _Known] = {}
        self.last_seen: dict[str, float] = {}
        """Time of `clock` by pod UID."""

    def worker_died(self, worker: int, _reason: str) -> None:
        """Its connections are gone and nobody will report their ends."""
        self._metrics.worker_restarts.add(1)
        for reporter in ("source", "destination"):
            self._metrics.tcp_sockets_open.add(-self._open.pop((worker, reporter), 0), reporter)

    def take(self, worker: int, prefix: str, news: Iterable[FlowNews], lost: int) -> None:
        """News from a worker, whose connections' names begin with `prefix`; `lost` records were dropped because we did not keep up."""
        if lost:
            self._metrics.limit_hits.add(lost, "flow_records")
        ended: list[Ended] = []
        for each in news:
            known = self._know(each.path)
            self._see(each.path.pod_uid)
            self._measure(worker, known.labels, each)
            if each.ends or each.failures:
                ended.append((known.alike, each))
        log_connections(ended, prefix)

    def forget(self, pods: Iterable[str]) -> None:
        """Pods that are no more."""
        for uid in pods:
            self.last_seen.pop(uid, None)

    def _know(self, path: FlowPath) -> _Known:
        source = self._find(path.source_uid) if path.source_uid else None
        destination = self._find(path.destination_uid) if path.destination_uid else None
        known = self._known.get(path)
        if known is None or known.source is not source or known.destination is not destination:
            known = _Known(source, destination, _labels(path, source, destination), Alike(path, source, destination))
            self._known.pop(path, None)
            self._known[path] = known
            if len(self._known) > MAX_KNOWN:
                del self._known[next(iter(self._known))]
        return known

    def _see(self, uid: str) -> None:
        # The last records of a pod come after it was forgotten.
        self.last_seen.pop(uid, None)
        self.last_seen[uid] = self._clock()
        if len(self.last_seen) > MAX_SEEN:
            del self.last_seen[next(iter(self.last_seen))]

    def _measure(self, worker: int, labels: Traffic, news: FlowNews) -> None:
        """One addition to each series, however many records there are: a series is found by 23 labels."""
        metrics = self._metrics
        closed = len(news.ends)
        metrics.tcp_opened.add_all(news.opened, news.opened, labels)
        metrics.tcp_received_bytes.add_all(news.up_bytes, news.with_up, labels)
        metrics.tcp_sent_bytes.add_all(news.down_bytes, news.with_down, labels)
        metrics.tcp_closed.add_all(closed, closed, labels)
        for failure in news.failures:
            final = labels._replace(response_flags=failure.flag.value)
            metrics.tcp_closed.add(1, *final)
            metrics.tcp_failed.add(1, *final)
        if news.changed:
            change = news.opened - closed - len(news.failures)
            self._open[worker, labels.reporter] += change
            metrics.tcp_sockets_open.add_all(change, news.changed, (labels.reporter,))


def _labels(path: FlowPath, source: Workload | None, destination: Workload | None) -> Traffic:
    reporter = "source" if path.direction is Direction.OUTBOUND else "destination"
    service = (path.service or UNKNOWN, path.service_namespace or UNKNOWN, path.service_name or UNKNOWN)
    named = destination.identity.uri if destination is not None else UNKNOWN
    near, far = _side(source, path.source_identity or UNKNOWN), _side(destination, path.destination_identity or named)
    security = "mutual_tls" if path.mutual_tls else UNKNOWN
    return Traffic._make((reporter, *near, *service, *far, "tcp", Flag.NONE.value, security))


def _side(workload: Workload | None, principal: str) -> tuple[str, ...]:
    """workload, canonical service and revision, namespace, principal, app, version, cluster."""
    if workload is None:
        return (UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN, principal, UNKNOWN, UNKNOWN, UNKNOWN)
    name = workload.canonical_name or UNKNOWN
    revision = workload.canonical_revision or UNKNOWN
    workload_name = workload.workload_name or workload.name
    return (workload_name, name, revision, workload.namespace, principal, name, revision, workload.cluster)
