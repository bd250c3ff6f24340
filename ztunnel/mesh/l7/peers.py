"""Who is at which address, as telemetry names the other side of a request."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ztunnel.mesh.l7.telemetry import PeerWorkload
from ztunnel.mesh.manifests.core import Pod
from ztunnel.mesh.manifests.metadata import ObjectKey
from ztunnel.mesh.manifests.parse import KubeObject
from ztunnel.mesh.workloads import Workload


def peers_of(workloads: Iterable[Workload], objects: Mapping[ObjectKey, KubeObject]) -> dict[str, PeerWorkload]:
    """The workloads of a mesh by their addresses; those in their node's own network have none of their own."""
    labels = {each.metadata.uid: each.metadata.labels for each in objects.values() if isinstance(each, Pod)}
    found: dict[str, PeerWorkload] = {}
    for each in sorted(workloads, key=lambda workload: workload.uid):
        peer = _peer(each, labels.get(each.uid, {}))
        for address in () if each.host_network else each.addresses:
            found.setdefault(address, peer)
    return found


def _peer(workload: Workload, labels: Mapping[str, str]) -> PeerWorkload:
    return PeerWorkload(
        uid=workload.uid,
        name=workload.name,
        namespace=workload.namespace,
        workload=workload.workload_name or workload.name,
        workload_type=workload.workload_type,
        app=labels.get("app") or "unknown",
        version=labels.get("version") or "unknown",
        canonical_service=workload.canonical_name or "unknown",
        canonical_revision=workload.canonical_revision or "latest",
        cluster=workload.cluster,
        identity=workload.identity,
        node=workload.node,
    )
