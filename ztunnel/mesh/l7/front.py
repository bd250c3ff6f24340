"""The waypoints that an ingress gateway goes through (`istio.io/ingress-use-waypoint`): clusters that end at them instead of at pods."""

from __future__ import annotations

from collections.abc import Mapping

from ztunnel.mesh.derive import MeshOptions, MeshState
from ztunnel.mesh.l7.clusters import Endpoint
from ztunnel.mesh.l7.destinations import Destination
from ztunnel.mesh.manifests.metadata import ObjectKey
from ztunnel.mesh.manifests.parse import KubeObject
from ztunnel.mesh.ports import INBOUND_HBONE
from ztunnel.mesh.waypoints import Waypoints
from ztunnel.mesh.workloads import Protocol, Service, WaypointRef


class IngressWaypoints:
    """Which destinations a gateway reaches through their waypoints, and where those are."""

    def __init__(self, objects: Mapping[ObjectKey, KubeObject], state: MeshState, options: MeshOptions) -> None:
        self._waypoints = Waypoints.of(objects.values(), options.trust_domain)
        self._state = state
        self._by_name: dict[str, Service] = {}
        for _, service in sorted(state.services.items()):
            for name in (service.hostname, *service.vips):
                self._by_name.setdefault(name, service)

    def endpoints(self, destination: Destination, port: int) -> tuple[Endpoint, ...] | str | None:
        """The waypoint's pods as endpoints of a port; text: why it cannot be reached; None: it is reached without a waypoint."""
        private = destination.entry is not None and destination.entry.private
        binding = self._waypoints.for_service(destination.metadata, private=private)
        if binding is None or not binding.ingress:
            return None
        if not destination.service.vips:
            return f"{destination.hostname} has no virtual address by which its waypoint {binding.wanted} would know it"
        waypoint = destination.service.waypoint
        if waypoint is None:
            return None
        if waypoint.problem:
            return None if waypoint.fails_open else waypoint.problem
        return self._through(waypoint, destination.service.vips[0], port)

    def _through(self, waypoint: WaypointRef, vip: str, port: int) -> tuple[Endpoint, ...]:
        service = next((self._by_name[name] for name in (*waypoint.hostnames, *waypoint.addresses) if name in self._by_name), None)
        if service is None:
            # Nothing is known of what is behind its address: that is dialled itself.
            addresses = ((each, INBOUND_HBONE) for each in waypoint.addresses[:1])
            return tuple(Endpoint(vip, port, identity=waypoint.identity, hbone=True, waypoint=each) for each in addresses)
        found = []
        for each in service.endpoints:
            workload = self._state.workloads.get(each.workload_uid)
            if workload is not None and workload.addresses:
                tunnels = INBOUND_HBONE if workload.protocol is Protocol.HBONE else dict(each.ports).get(INBOUND_HBONE, INBOUND_HBONE)
                found.append(
                    Endpoint(
                        vip,
                        port,
                        workload.uid,
                        workload.identity,
                        hbone=True,
                        healthy=each.ready,
                        node=workload.node,
                        waypoint=(workload.addresses[0], tunnels),
                    )
                )
        return tuple(found)
