"""What a workload says of itself to the other end of a tunnel, for its telemetry only: the `baggage` header."""

from __future__ import annotations

from typing import Final

from ztunnel.hbone import connect
from ztunnel.mesh.workloads import Workload

_REMEMBERED: Final = 1024


def baggage_of(workload: Workload) -> bytes:
    """The header's value, the same object for the same workload: each connection says it twice."""
    known = _known.get(workload.uid)
    if known is not None and known[0] is workload:
        return known[1]
    value = connect.build_baggage(_baggage(workload))
    if len(_known) >= _REMEMBERED:
        _known.clear()
    _known[workload.uid] = (workload, value)
    return value


_known: dict[str, tuple[Workload, bytes]] = {}


def _baggage(workload: Workload) -> connect.Baggage:
    """Source: Istio ztunnel `baggage.rs`."""
    return connect.Baggage(
        cluster=workload.cluster,
        namespace=workload.namespace,
        workload_type=workload.workload_type,
        workload_name=workload.workload_name,
        service_name=workload.canonical_name,
        revision=workload.canonical_revision,
    )
