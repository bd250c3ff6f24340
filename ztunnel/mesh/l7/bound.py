"""What one waypoint serves, in the words of `derive_proxy`: from the labels of services, pods, service accounts and namespaces."""

from __future__ import annotations

from collections.abc import Mapping

from ztunnel.mesh.derive import MeshOptions
from ztunnel.mesh.l7.derive import Bound
from ztunnel.mesh.manifests.core import Pod, ServiceObject
from ztunnel.mesh.manifests.metadata import ObjectKey
from ztunnel.mesh.manifests.parse import KubeObject
from ztunnel.mesh.manifests.service_entry import ServiceEntryObject, WorkloadEntryObject
from ztunnel.mesh.waypoints import Waypoints, is_served_by


def bound_to(objects: Mapping[ObjectKey, KubeObject], options: MeshOptions, who: ObjectKey) -> Bound:
    """The services and workloads that are bound to a Gateway.

    Args:
        who: the Gateway.
    """
    waypoints = Waypoints.of(objects.values(), options.trust_domain)
    key, domain = f"{who.namespace}/{who.name}", options.cluster_domain
    services = (each for each in objects.values() if isinstance(each, ServiceObject))
    pods = (each for each in objects.values() if isinstance(each, Pod))
    found = waypoints.bound(key, services, pods)
    named = [each for each, _ in found.services]
    hosts: list[str] = []
    uids = [each.metadata.uid for each, _ in found.pods]
    for item in objects.values():
        if isinstance(item, ServiceEntryObject):
            binding = waypoints.for_service(item.metadata, private=item.private, reachable=False)
            if is_served_by(binding, key):
                hosts += [f"{item.metadata.namespace}/{host}" for host in item.hosts]
        elif isinstance(item, WorkloadEntryObject):
            binding = waypoints.for_pod(item.metadata, item.endpoint.service_account, reachable=False)
            if is_served_by(binding, key):
                uids.append(item.uid)
    own = (f"{each.metadata.namespace}/{each.metadata.name}.{each.metadata.namespace}.svc.{domain}" for each in named)
    return Bound(frozenset((*own, *hosts)), frozenset(uids))
