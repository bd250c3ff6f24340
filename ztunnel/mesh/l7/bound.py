"""What one waypoint serves, in the words of `derive_proxy`: from the labels of services, pods, service accounts and namespaces."""

from __future__ import annotations

from collections.abc import Mapping

from ztunnel.mesh.derive import MeshOptions
from ztunnel.mesh.l7.derive import Bound
from ztunnel.mesh.manifests.core import Pod, ServiceObject
from ztunnel.mesh.manifests.metadata import ObjectKey
from ztunnel.mesh.manifests.parse import KubeObject
from ztunnel.mesh.waypoints import Waypoints


def bound_to(objects: Mapping[ObjectKey, KubeObject], options: MeshOptions, who: ObjectKey) -> Bound:
    """The services and workloads that are bound to a Gateway.

    Args:
        who: the Gateway.
    """
    waypoints = Waypoints.of(objects.values(), options.trust_domain)
    services = (each for each in objects.values() if isinstance(each, ServiceObject))
    pods = (each for each in objects.values() if isinstance(each, Pod))
    found = waypoints.bound(f"{who.namespace}/{who.name}", services, pods)
    domain = options.cluster_domain
    return Bound(
        frozenset(f"{each.namespace}/{each.name}.{each.namespace}.svc.{domain}" for each in (item.metadata for item, _ in found.services)),
        frozenset(item.metadata.uid for item, _ in found.pods),
    )
