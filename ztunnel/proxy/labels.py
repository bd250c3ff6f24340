"""What a workload says of itself to the other end of a tunnel, for its telemetry only: the `baggage` header."""

from __future__ import annotations

from ztunnel.hbone import connect
from ztunnel.mesh.workloads import Workload


def baggage_of(workload: Workload) -> connect.Baggage:
    """Source: Istio ztunnel `baggage.rs`."""
    return connect.Baggage(
        cluster=workload.cluster,
        namespace=workload.namespace,
        workload_type=workload.workload_type,
        workload_name=workload.workload_name,
        service_name=workload.canonical_name,
        revision=workload.canonical_revision,
    )
