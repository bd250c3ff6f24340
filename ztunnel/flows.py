"""News of connections, as metrics and as one log line at each end.

The worker says what it saw (addresses, identities, bytes); the names come from the mesh here. Metrics follow Istio's convention,
`received` from client to server on both reporters; the log's bytes are the pod's own, as Istio's ztunnel writes them.
Source: Istio ztunnel `proxy/metrics.rs`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from functools import lru_cache

from ztunnel.dataplane.addresses import text
from ztunnel.dataplane.flow import Direction, FlowRecord
from ztunnel.mesh.errors import Flag
from ztunnel.mesh.workloads import Workload
from ztunnel.runtime.logs import log_flows
from ztunnel.runtime.metrics import UNKNOWN, Metrics, Traffic

MAX_SEEN = 4096
"""Pods whose last traffic is remembered; more than a node has."""
FindWorkload = Callable[[str], Workload | None]


class FlowReporter:
    """Takes the worker's records; remembers when each pod last had traffic."""

    def __init__(self, metrics: Metrics, find: FindWorkload, clock: Callable[[], float]) -> None:
        self._metrics = metrics
        self._find = find
        self._clock = clock
        self._open: Counter[tuple[int, str]] = Counter()
        """Connections that were reported open, by worker and reporter."""
        self.last_seen: dict[str, float] = {}
        """Time of `clock` by pod UID."""

    def worker_died(self, worker: int, _reason: str) -> None:
        """Its connections are gone and nobody will report their ends."""
        self._metrics.worker_restarts.add(1)
        for reporter in ("source", "destination"):
            self._metrics.tcp_sockets_open.add(-self._open.pop((worker, reporter), 0), reporter)

    def take(self, worker: int, records: Iterable[FlowRecord], lost: int) -> None:
        """News from a worker; `lost` records were dropped because we did not keep up."""
        if lost:
            self._metrics.limit_hits.add(lost, "flow_records")
        lines = [line for record in records if (line := self._take(worker, record)) is not None]
        if lines:
            log_flows(lines)

    def forget(self, pods: Iterable[str]) -> None:
        """Pods that are no more."""
        for uid in pods:
            self.last_seen.pop(uid, None)

    def _take(self, worker: int, record: FlowRecord) -> dict[str, object] | None:
        """Counts it; gives its line if it was the last of its connection."""
        source = self._find(record.source_uid) if record.source_uid else None
        destination = self._find(record.destination_uid) if record.destination_uid else None
        self._see(record.pod_uid)
        self._measure(worker, record, source, destination)
        return log_fields(record, source, destination) if record.closed else None

    def _see(self, uid: str) -> None:
        # The last records of a pod come after it was forgotten.
        self.last_seen.pop(uid, None)
        self.last_seen[uid] = self._clock()
        if len(self.last_seen) > MAX_SEEN:
            del self.last_seen[next(iter(self.last_seen))]

    def _measure(self, worker: int, record: FlowRecord, source: Workload | None, destination: Workload | None) -> None:
        metrics = self._metrics
        reporter = "source" if record.direction is Direction.OUTBOUND else "destination"
        service = (record.service or UNKNOWN, record.service_namespace or UNKNOWN, record.service_name or UNKNOWN)
        named = destination.identity.uri if destination is not None else UNKNOWN
        principals = (record.source_identity or UNKNOWN, record.destination_identity or named)
        labels = _labels(reporter, (source, destination), service, principals, record.mutual_tls)
        if record.opened:
            metrics.tcp_opened.add(1, *labels)
        if record.opened != record.closed:
            change = 1 if record.opened else -1
            self._open[worker, reporter] += change
            metrics.tcp_sockets_open.add(change, reporter)
        if record.up_bytes:
            metrics.tcp_received_bytes.add(record.up_bytes, *labels)
        if record.down_bytes:
            metrics.tcp_sent_bytes.add(record.down_bytes, *labels)
        if record.closed:
            final = labels if record.flag is Flag.NONE else labels._replace(response_flags=record.flag.value)
            metrics.tcp_closed.add(1, *final)
            if record.flag is not Flag.NONE:
                metrics.tcp_failed.add(1, *final)


def log_fields(record: FlowRecord, source: Workload | None, destination: Workload | None) -> dict[str, object]:
    """The values of `logs.FLOW_FIELDS`, in that order. Absent ones are empty or None."""
    sent, received = record.total_up_bytes, record.total_down_bytes
    if record.direction is Direction.INBOUND:
        sent, received = received, sent
    return {
        "src.addr": text(record.source),
        "src.workload": source and source.name,
        "src.namespace": source and source.namespace,
        "src.identity": record.source_identity,
        "src.cluster": source and source.cluster,
        "dst.addr": text(record.destination) if record.destination[0] else "",
        "dst.hbone_addr": record.target if record.mutual_tls else "",
        "dst.service": record.service,
        "dst.workload": destination and destination.name,
        "dst.namespace": destination and destination.namespace,
        "dst.identity": record.destination_identity,
        "dst.cluster": destination and destination.cluster,
        "direction": record.direction.value,
        "bytes_sent": sent,
        "bytes_recv": received,
        "duration": f"{record.duration_seconds * 1000:.0f}ms",
        "policy": record.policy,
        "flag": "" if record.flag is Flag.NONE else record.flag.value,
        "trace": record.trace[3:35],
        "connection": record.id,
        "error": record.error,
    }


@lru_cache(maxsize=4096)
def _labels(
    reporter: str,
    ends: tuple[Workload | None, Workload | None],
    service: tuple[str, str, str],
    principals: tuple[str, str],
    mutual_tls: bool,
) -> Traffic:
    security = "mutual_tls" if mutual_tls else UNKNOWN
    values = (reporter, *_side(ends[0], principals[0]), *service, *_side(ends[1], principals[1]), "tcp", Flag.NONE.value, security)
    return Traffic._make(values)


def _side(workload: Workload | None, principal: str) -> tuple[str, ...]:
    """workload, canonical service and revision, namespace, principal, app, version, cluster."""
    if workload is None:
        return (UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN, principal, UNKNOWN, UNKNOWN, UNKNOWN)
    name = workload.canonical_name or UNKNOWN
    revision = workload.canonical_revision or UNKNOWN
    workload_name = workload.workload_name or workload.name
    return (workload_name, name, revision, workload.namespace, principal, name, revision, workload.cluster)
