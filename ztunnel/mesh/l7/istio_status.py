"""The conditions of VirtualServices and DestinationRules: what of them is in force, and what is not, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ztunnel.mesh.conditions import Condition
from ztunnel.mesh.derive import MeshOptions, MeshState
from ztunnel.mesh.l7.attachments import MISSING_LABEL, NO_PARENT, Attachments, routes_of
from ztunnel.mesh.l7.backend_tls import BackendTls
from ztunnel.mesh.l7.credentials import Credentials
from ztunnel.mesh.l7.delegates import expanded
from ztunnel.mesh.l7.destination_rules import DestinationRules
from ztunnel.mesh.l7.destinations import Destination, Registry
from ztunnel.mesh.l7.grants import NOT_FOUND
from ztunnel.mesh.l7.status import ObjectStatus
from ztunnel.mesh.l7.upstreams import Upstreams
from ztunnel.mesh.l7.virtual_services import VirtualServices
from ztunnel.mesh.manifests.destination_rule import DestinationRuleObject
from ztunnel.mesh.manifests.metadata import ObjectKey
from ztunnel.mesh.manifests.parse import KubeObject
from ztunnel.mesh.manifests.service_entry import ServiceEntryObject
from ztunnel.mesh.manifests.virtual_hosts import expand
from ztunnel.mesh.manifests.virtual_service import MESH, Target, VirtualServiceObject

WAYPOINT_MISSING = "istio.io/WaypointMissing"
MAX_NOTES = 8
"""That one message lists."""


def istio_statuses(
    objects: Mapping[ObjectKey, KubeObject], state: MeshState, options: MeshOptions, waypoint_of: Mapping[str, ObjectKey]
) -> dict[ObjectKey, ObjectStatus]:
    """What each VirtualService and DestinationRule is told.

    Args:
        waypoint_of: the waypoint of each service that has one, by `Service.key`.
    """
    judge = _Judge(objects, Registry(objects, state, options), waypoint_of)
    found: dict[ObjectKey, ObjectStatus] = {}
    for key, item in objects.items():
        if isinstance(item, VirtualServiceObject):
            found[key] = ObjectStatus(judge.virtual_service(item))
        elif isinstance(item, DestinationRuleObject) and not item.stand_in:
            found[key] = ObjectStatus(judge.destination_rule(item))
    return found


def entry_conditions(item: ServiceEntryObject, *, has_waypoint: bool) -> tuple[Condition, ...]:
    """What a ServiceEntry is told beside its binding: what of it is not done, and that a host with a wildcard wants a waypoint."""
    if item.resolution == "DYNAMIC_DNS" and not has_waypoint:
        text = "a host with a wildcard is resolved by a waypoint only, and it has none"
        return noted(item.notes), Condition(WAYPOINT_MISSING, True, "NoWaypointForWildcardService", text)
    return (noted(item.notes),)


class _Judge:
    def __init__(self, objects: Mapping[ObjectKey, KubeObject], registry: Registry, waypoint_of: Mapping[str, ObjectKey]) -> None:
        self._objects = objects
        self._registry = registry
        self._waypoint_of = waypoint_of
        self._attachments = Attachments(routes_of(objects), registry, waypoint_of)
        self._seen_from: dict[str, VirtualServices] = {}

    def virtual_service(self, item: VirtualServiceObject) -> tuple[Condition, ...]:
        rules, problems = expanded(item, self._objects)
        notes = [*item.notes, *problems]
        if any(match.where.source_labels for rule in rules for match in rule.matches):
            notes.append("matches by sourceLabels never hold: a waypoint does not know its clients' labels")
        accepted = noted(notes)
        if not item.hosts or MESH not in item.gateways:
            return (accepted, self._resolved(item))
        covered = self._covered(item)
        bound = [each for each in covered if each.service.key in self._waypoint_of]
        overridden = next(self._overriding(bound), "")
        if overridden:
            accepted = Condition("Accepted", False, "Conflicted", overridden)
        if not covered:
            waypoints = Condition("ResolvedWaypoints", False, NO_PARENT, "none of its hosts is there")
        elif not bound:
            waypoints = Condition("ResolvedWaypoints", False, MISSING_LABEL, f"{covered[0].hostname} has no waypoint")
        else:
            waypoints = Condition("ResolvedWaypoints", True, "ResolvedWaypoints")
        return (accepted, self._resolved(item), waypoints)

    def destination_rule(self, item: DestinationRuleObject) -> tuple[Condition, ...]:
        host = expand(item.host, item.metadata.namespace, self._registry.options.cluster_domain)
        if self._registry.covered(host):
            resolved = Condition("ResolvedRefs", True, "ResolvedRefs")
        else:
            resolved = Condition("ResolvedRefs", False, NOT_FOUND, f"host {host} is not there")
        return (noted(item.notes), resolved)

    def _covered(self, item: VirtualServiceObject) -> list[Destination]:
        """The destinations that a VirtualService is for."""
        own, domain = item.metadata.namespace, self._registry.options.cluster_domain
        named = {each.service.key: each for host in item.hosts for each in self._registry.covered(expand(host, own, domain))}
        found = []
        for key, destination in sorted(named.items()):
            waypoint = self._waypoint_of.get(key)
            if own in (destination.namespace, waypoint.namespace if waypoint else destination.namespace):
                found.append(destination)
        return found

    def _overriding(self, bound: list[Destination]) -> Iterator[str]:
        for destination in bound:
            for port in destination.ports:
                for attached in self._attachments.http(destination, port):
                    if not attached.clients:
                        route = attached.route
                        name = f"{route.kind} {route.metadata.namespace}/{route.metadata.name}"
                        yield f"{name} has port {port.number} of {destination.hostname}, where it takes the place of VirtualServices"

    def _resolved(self, item: VirtualServiceObject) -> Condition:
        services = self._from(item.metadata.namespace)
        for target in _targets(item):
            if services.resolve(target, item, target.port) is None and not self._has_any_port(target, item):
                subset = f", subset {target.subset}" if target.subset else ""
                return Condition("ResolvedRefs", False, NOT_FOUND, f"destination {target.host}{subset} is not there")
        return Condition("ResolvedRefs", True, "ResolvedRefs")

    def _has_any_port(self, target: Target, item: VirtualServiceObject) -> bool:
        """A target without port means the one that the client addressed, which is not known here."""
        host = expand(target.host, item.metadata.namespace, self._registry.options.cluster_domain)
        found = self._registry.named(host, item.metadata.namespace)
        services = self._from(item.metadata.namespace)
        return not target.port and found is not None and any(services.resolve(target, item, each.number) for each in found.ports)

    def _from(self, namespace: str) -> VirtualServices:
        """As a proxy of that namespace sees them."""
        if namespace not in self._seen_from:
            options = self._registry.options
            rules = DestinationRules(self._objects, namespace, options.root_namespace, options.cluster_domain)
            upstreams = Upstreams(self._registry, rules, BackendTls({}), Credentials({}, namespace), frozenset())
            self._seen_from[namespace] = VirtualServices({}, self._registry, upstreams, namespace)
        return self._seen_from[namespace]


def noted(notes: Sequence[str]) -> Condition:
    """Accepted, with what of an object is not done as written."""
    if not notes:
        return Condition("Accepted", True, "Accepted")
    more = f"; and {len(notes) - MAX_NOTES} more" if len(notes) > MAX_NOTES else ""
    return Condition("Accepted", True, "PartiallyInvalid", "; ".join(notes[:MAX_NOTES]) + more)


def _targets(item: VirtualServiceObject) -> Iterator[Target]:
    for http in item.http:
        yield from (each.target for each in http.targets)
        yield from (target for target, _ in http.mirrors)
    for rule in (*item.tcp, *item.tls):
        yield from (each.target for each in rule.targets)
