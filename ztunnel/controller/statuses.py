"""What objects are told of themselves: conditions of gateways, routes, services and policies. Pure.

The decisions are `mesh`'s; here they get the form that Kubernetes gives them: observed generations and times of transition, which change
only with what they are about.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ztunnel.controller import belongings
from ztunnel.mesh.conditions import Condition
from ztunnel.mesh.derive import MeshOptions, MeshState, derive
from ztunnel.mesh.entries import allocate
from ztunnel.mesh.errors import ManifestError
from ztunnel.mesh.l7.attach import ServiceTarget, World, condition, placed_authentications, placed_policies
from ztunnel.mesh.l7.attachments import routes_of
from ztunnel.mesh.l7.backend_tls import BackendTls
from ztunnel.mesh.l7.istio_status import WAYPOINT_MISSING, entry_conditions, istio_statuses, noted
from ztunnel.mesh.l7.route_status import INGRESS_CLASS, is_ingress, listener_told, route_statuses
from ztunnel.mesh.manifests.authorization import AuthorizationPolicyObject
from ztunnel.mesh.manifests.backend_policies import BackendTarget, BackendTlsPolicyObject, BackendTrafficPolicyObject
from ztunnel.mesh.manifests.core import ServiceObject
from ztunnel.mesh.manifests.destination_rule import DestinationRuleObject
from ztunnel.mesh.manifests.gateway import GatewayClassObject, GatewayObject
from ztunnel.mesh.manifests.istio_gateway import IstioGatewayObject
from ztunnel.mesh.manifests.metadata import ObjectKey
from ztunnel.mesh.manifests.parse import Ignored, KubeObject, key, key_of, parse
from ztunnel.mesh.manifests.references import ParentRef
from ztunnel.mesh.manifests.routes import RouteObject
from ztunnel.mesh.manifests.service_entry import ServiceEntryObject
from ztunnel.mesh.manifests.tree import Tree, branches, integer, text
from ztunnel.mesh.manifests.virtual_service import VirtualServiceObject
from ztunnel.mesh.waypoints import WAYPOINT_BOUND, WAYPOINT_CLASS, Binding, Waypoints, gateway_conditions, listener_conditions


def _route_kinds(kinds: Iterable[str]) -> list[Tree]:
    return [{"group": "gateway.networking.k8s.io", "kind": kind} for kind in kinds]


_ROUTE_KINDS = _route_kinds(("HTTPRoute", "GRPCRoute", "TCPRoute", "TLSRoute"))


@dataclass(slots=True)
class Reader:
    """Objects as the mesh reads them. Bodies are never changed in place, so one that is the same object was read before."""

    _read: dict[ObjectKey, tuple[Tree, KubeObject | None]] = field(default_factory=dict)

    def read(self, bodies: Iterable[Tree]) -> dict[ObjectKey, KubeObject]:
        """All that can be read; what cannot was admitted before the mesh knew its kind."""
        listed = {place: body for body in bodies if (place := key_of(body)) is not None}
        self._read = {place: entry for place, entry in self._read.items() if listed.get(place) is entry[0]}
        for place, body in listed.items():
            if place not in self._read:
                self._read[place] = (body, _parsed(body))
        return {key(item): item for _, item in self._read.values() if item is not None}


def _parsed(body: Tree) -> KubeObject | None:
    try:
        item = parse(body, "the lab")
    except ManifestError:
        return None
    return None if isinstance(item, Ignored) else item


def conditions_of(before: Iterable[Tree], given: Iterable[Condition], generation: int, now: str) -> list[Tree]:
    """Conditions as an object's status has them; those of other types that are there stay.

    Args:
        before: what the status has now.
        now: the time of transition of what changes.
    """
    last = {text(each, "type"): each for each in before}
    made: dict[str, Tree] = {}
    for each in given:
        status, old = "True" if each.status else "False", last.get(each.type, {})
        moved = now if text(old, "status") != status else text(old, "lastTransitionTime")
        made[each.type] = {
            "type": each.type,
            "status": status,
            "reason": each.reason,
            "message": each.message,
            "observedGeneration": generation,
            "lastTransitionTime": moved,
        }
    return [*(each for name, each in last.items() if name not in made), *made.values()]


class Statuses:
    """The statuses that follow from a set of objects."""

    def __init__(self, bodies: Iterable[Tree], reader: Reader, options: MeshOptions, now: str, *, sees_secrets: bool = True) -> None:
        """
        Args:
            sees_secrets: whether Secrets are among the bodies. Without them nothing is said of certificates but whether they may be named.
        """
        self._sees_secrets = sees_secrets
        self._bodies = {place: body for body in bodies if (place := key_of(body)) is not None}
        self._objects = reader.read(self._bodies.values())
        self._options = options
        self._now = now
        self._derived: MeshState | None = None
        self._allocated: dict[tuple[str, str, str], tuple[str, ...]] | None = None
        self._waypoints = Waypoints.of(self._objects.values(), options.trust_domain)

    def all(self) -> dict[ObjectKey, Tree]:
        """By object: the members of its status that are ours."""
        found: dict[ObjectKey, Tree] = {}
        for place, item in self._objects.items():
            match item:
                case GatewayObject() if belongings.is_ours(self._bodies[place]):
                    found[place] = self._gateway(place, item)
                case GatewayClassObject() if place.name in belongings.CLASSES:
                    accepted = Condition("Accepted", True, "Accepted", "Handled by Istio controller")
                    found[place] = {"conditions": self._conditions(place, (accepted,))}
                case ServiceObject():
                    binding = None if item.ignored else self._waypoints.for_service(item.metadata, headless=not item.vips)
                    found[place] = self._bound(place, binding)
                case ServiceEntryObject():
                    found[place] = self._entry(place, item)
                case BackendTlsPolicyObject() if place in self._bodies:
                    # What a ConfigMap or Secret holds is judged only where those are seen.
                    told = BackendTls(self._objects).conditions(item) if self._sees_secrets else ()
                    found[place] = self._ancestors(place, item.targets, told)
                case BackendTrafficPolicyObject():
                    found[place] = self._ancestors(place, item.targets, (noted(item.notes),))
                case IstioGatewayObject():
                    problems = [f"server {each.name}: {each.problem}" for each in item.servers if each.problem]
                    found[place] = {"conditions": self._conditions(place, (noted(problems),))}
                case AuthorizationPolicyObject() if not item.waypoint:
                    note = item.note
                    judged = Condition(
                        "ZtunnelAccepted", not note, "UnsupportedValue" if note else "Accepted", note or "attached to ztunnel"
                    )
                    found[place] = {"conditions": self._conditions(place, (judged,))}
                case _:
                    pass
        return found | self._policies() | self._routes()

    def _by_key(self, found: Iterable[tuple[ObjectKey, Iterable[Condition]]]) -> dict[ObjectKey, Tree]:
        """For objects whose status has nothing but conditions. Stand-ins of refused objects have no body."""
        return {place: {"conditions": self._conditions(place, told)} for place, told in found if place in self._bodies}

    def _conditions(self, place: ObjectKey, given: Iterable[Condition]) -> list[Tree]:
        body = self._bodies[place]
        return conditions_of(branches(body, "status", "conditions"), given, integer(body, "metadata", "generation"), self._now)

    def _gateway(self, place: ObjectKey, item: GatewayObject) -> Tree:
        body = self._bodies[place]
        before = {text(each, "name"): each for each in branches(body, "status", "listeners")}
        told = listener_told(item, self._objects, self._state(), self._options, sees_secrets=self._sees_secrets) if is_ingress(item) else {}
        attached = 0 if told else self._attached(place)
        listeners: list[Tree] = []
        for each in item.listeners:
            old = branches(before.get(each.name, {}), "conditions")
            given = (*listener_conditions(item, each), *(told[each.name].conditions if told else ()))
            listeners.append(
                {
                    "name": each.name,
                    "attachedRoutes": told[each.name].attached if told else attached,
                    "supportedKinds": _route_kinds(told[each.name].kinds) if told else _ROUTE_KINDS,
                    "conditions": conditions_of(old, given, integer(body, "metadata", "generation"), self._now),
                }
            )
        return {"conditions": self._conditions(place, gateway_conditions(item)), "listeners": listeners}

    def _attached(self, place: ObjectKey) -> int:
        """How many routes have this Gateway as a parent."""
        return sum(
            any(each.kind == "Gateway" and (each.namespace, each.name) == (place.namespace, place.name) for each in route.parents)
            for route in routes_of(self._objects)
        )

    def _bound(self, place: ObjectKey, binding: Binding | None) -> Tree:
        if binding is not None:
            return {"conditions": self._conditions(place, (binding.condition(),))}
        before = branches(self._bodies[place], "status", "conditions")
        return {"conditions": [each for each in before if text(each, "type") != WAYPOINT_BOUND]}

    def _entry(self, place: ObjectKey, item: ServiceEntryObject) -> Tree:
        binding = self._waypoints.for_service(item.metadata, private=item.private)
        told = entry_conditions(item, has_waypoint=binding is not None)
        names = {each.type for each in told}
        bound = self._bound(place, binding)
        kept = [each for each in branches(bound, "conditions") if text(each, "type") not in {*names, WAYPOINT_MISSING}]
        before = branches(self._bodies[place], "status", "conditions")
        own = conditions_of([each for each in before if text(each, "type") in names], told, self._generation(place), self._now)
        vips = self._vips()
        addresses: list[Tree] = [
            {"value": address, "host": host}
            for host in (() if item.addresses else item.hosts)
            for address in vips[place.namespace, place.name, host]
        ]
        return {"conditions": [*kept, *own], **({"addresses": addresses} if addresses else {})}

    def _vips(self) -> dict[tuple[str, str, str], tuple[str, ...]]:
        if self._allocated is None:
            self._allocated = allocate(each for each in self._objects.values() if isinstance(each, ServiceEntryObject))
        return self._allocated

    def _ancestors(self, place: ObjectKey, targets: Iterable[BackendTarget], told: tuple[Condition, ...]) -> Tree:
        """What a policy for Services is told, for each of their waypoints."""
        if not told:
            return {}
        body = self._bodies[place]
        before = {text(each, "ancestorRef", "name"): each for each in branches(body, "status", "ancestors") if _is_ours(each)}
        others = [each for each in branches(body, "status", "ancestors") if not _is_ours(each)]
        state = self._state()
        wanted = {(place.namespace, each.name) for each in targets}
        served = [each for each in state.services.values() if (each.namespace, each.name) in wanted]
        waypoints = {each.waypoint.name for each in served if each.waypoint is not None}
        ancestors: list[Tree] = []
        for name in sorted(waypoints):
            namespace, _, gateway = name.partition("/")
            old = branches(before.get(gateway, {}), "conditions")
            ancestors.append(
                {
                    "ancestorRef": {"group": "gateway.networking.k8s.io", "kind": "Gateway", "namespace": namespace, "name": gateway},
                    "controllerName": belongings.CLASSES[WAYPOINT_CLASS],
                    "conditions": conditions_of(old, told, self._generation(place), self._now),
                }
            )
        return {"ancestors": [*others, *ancestors]} if others or ancestors else {}

    def _generation(self, place: ObjectKey) -> int:
        return integer(self._bodies[place], "metadata", "generation")

    def _policies(self) -> dict[ObjectKey, Tree]:
        world, objects = self._world(), self._objects.values()
        policies = (
            (ObjectKey("AuthorizationPolicy", each.namespace, each.name), condition(each, world)) for each in placed_policies(objects)
        )
        tokens = (
            (ObjectKey("RequestAuthentication", each.namespace, each.name), condition(each, world))
            for each in placed_authentications(objects)
        )
        return self._by_key((place, (told,)) for place, told in (*policies, *tokens) if told is not None)

    def _world(self) -> World:
        served: dict[ServiceTarget, str] = {}
        classes = dict.fromkeys(belongings.CLASSES, False) | {WAYPOINT_CLASS: True}
        known: dict[tuple[str, str], str] = {}
        for item in self._objects.values():
            match item:
                case ServiceObject():
                    binding = self._waypoints.for_service(item.metadata, headless=not item.vips)
                    name = binding.waypoint.key if binding and binding.waypoint else ""
                    served[ServiceTarget(item.metadata.namespace, item.metadata.name, "Service")] = name
                case ServiceEntryObject():
                    binding = self._waypoints.for_service(item.metadata, private=item.private)
                    name = binding.waypoint.key if binding and binding.waypoint else ""
                    served[ServiceTarget(item.metadata.namespace, item.metadata.name, "ServiceEntry")] = name
                case GatewayObject():
                    known[item.metadata.namespace, item.metadata.name] = item.class_name
                case _:
                    pass
        return World(self._options.root_namespace, known, served, classes)

    def _state(self) -> MeshState:
        if self._derived is None:
            self._derived = derive(self._objects, self._options)
        return self._derived

    def _routes(self) -> dict[ObjectKey, Tree]:
        if not any(isinstance(each, RouteObject | VirtualServiceObject | DestinationRuleObject) for each in self._objects.values()):
            return {}
        state = self._state()
        waypoint_of = {
            name: ObjectKey("Gateway", *each.waypoint.name.split("/", 1))
            for name, each in state.services.items()
            if each.waypoint is not None and not each.waypoint.problem
        }
        istio = istio_statuses(self._objects, state, self._options, waypoint_of)
        found = self._by_key((place, status.conditions) for place, status in istio.items())
        for place, status in route_statuses(self._objects, state, self._options, waypoint_of).items():
            body = self._bodies[place]
            parents: list[Tree] = []
            for each, old in zip(status.parents, _parents_before(body, len(status.parents)), strict=True):
                parents.append(
                    {
                        "controllerName": belongings.CLASSES[INGRESS_CLASS if each.ingress else WAYPOINT_CLASS],
                        "parentRef": _reference(each.parent),
                        "conditions": conditions_of(
                            branches(old, "conditions"), each.conditions, integer(body, "metadata", "generation"), self._now
                        ),
                    }
                )
            found[place] = {"parents": [*_others(body), *parents]}
        return found


def _parents_before(body: Tree, count: int) -> list[Tree]:
    """Of ours, as many as there are parents now; a changed list of parents only moves times of transition."""
    before = [each for each in branches(body, "status", "parents") if _is_ours(each)][:count]
    return [*before, *({} for _ in range(count - len(before)))]


def _others(body: Tree) -> list[Tree]:
    """What other controllers say of the same route's other parents."""
    return [each for each in branches(body, "status", "parents") if not _is_ours(each)]


def _is_ours(parent: Tree) -> bool:
    return text(parent, "controllerName") in belongings.CLASSES.values()


def _reference(parent: ParentRef) -> Tree:
    found: Tree = {"group": parent.group, "kind": parent.kind, "namespace": parent.namespace, "name": parent.name}
    if parent.section:
        found["sectionName"] = parent.section
    if parent.port:
        found["port"] = parent.port
    return found


def differs(body: Tree, wanted: Mapping[str, object]) -> bool:
    """Whether a status is not yet what it should be."""
    status = body.get("status")
    have = status if isinstance(status, dict) else {}
    return any(have.get(name, [] if value == [] else None) != value for name, value in wanted.items())
