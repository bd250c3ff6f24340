"""The objects of an API server as they are, of the kinds that the controller looks at: what statuses and belongings are computed from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ztunnel.kube.client import KubeClient
from ztunnel.kube.discovery import Discovery, Kind
from ztunnel.kube.reflector import Body, Name, Pace, Phase, Reflector
from ztunnel.kube.resources import Resource
from ztunnel.mesh.manifests.authorization import AuthorizationPolicyObject
from ztunnel.mesh.manifests.core import Namespace, ServiceAccountObject, ServiceObject
from ztunnel.mesh.manifests.destination_rule import DestinationRuleObject
from ztunnel.mesh.manifests.gateway import GatewayClassObject, GatewayObject
from ztunnel.mesh.manifests.metadata import ObjectKey
from ztunnel.mesh.manifests.parse import key_of, kinds
from ztunnel.mesh.manifests.references import ReferenceGrantObject
from ztunnel.mesh.manifests.request_authentication import RequestAuthenticationObject
from ztunnel.mesh.manifests.routes import RouteObject
from ztunnel.mesh.manifests.service_entry import ServiceEntryObject, WorkloadEntryObject
from ztunnel.mesh.manifests.tree import Tree, branch, drop
from ztunnel.mesh.manifests.virtual_service import VirtualServiceObject

_RBAC = "rbac.authorization.k8s.io"
_FOREIGN = (Kind("apps", "Deployment", ("v1",)), Kind(_RBAC, "RoleBinding", ("v1",)), Kind(_RBAC, "ClusterRoleBinding", ("v1",)))
"""Kinds that the mesh has no readers for: their keys name the group."""
READ = (
    Namespace,
    ServiceObject,
    ServiceAccountObject,
    AuthorizationPolicyObject,
    RequestAuthenticationObject,
    VirtualServiceObject,
    DestinationRuleObject,
    ServiceEntryObject,
    WorkloadEntryObject,
    RouteObject,
    ReferenceGrantObject,
    GatewayObject,
    GatewayClassObject,
)
KINDS = (*(Kind(group, kind, versions) for group, kind, versions in kinds(READ)), *_FOREIGN)
"""What statuses and belongings follow from, and what they are."""
_LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"


@dataclass(slots=True)
class _Store:
    """One kind's part (`kube.reflector.Store`)."""

    bodies: dict[ObjectKey, Tree]
    on_change: Callable[[], None]
    keys: dict[Name, ObjectKey] = field(default_factory=dict)

    def read(self, body: Body) -> Tree:
        # Of no use here, and half of most objects.
        drop(body, "metadata", "managedFields")
        branch(body, "metadata", "annotations").pop(_LAST_APPLIED, None)
        return body

    def replaced(self, items: dict[Name, Tree]) -> None:
        for name in self.keys.keys() - items.keys():
            self.changed(name, None)
        for name, item in items.items():
            self.changed(name, item)

    def changed(self, name: Name, item: Tree | None) -> None:
        former = self.keys.pop(name, None)
        if former is not None:
            self.bodies.pop(former, None)
        place = key_of(item) if item is not None else None
        if place is not None and item is not None:
            self.keys[name] = place
            self.bodies[place] = item
        self.on_change()


class Bodies:
    """All of them by key, kept up to date by `reflectors`, which the caller runs. Bodies are never changed in place."""

    def __init__(self, client: KubeClient, on_change: Callable[[], None], pace: Pace | None = None) -> None:
        self._bodies: dict[ObjectKey, Tree] = {}
        discovery = Discovery(client)
        self.reflectors = [
            Reflector(client, discovery, kind, _Store(self._bodies, on_change), pace or Pace(), on_phase=on_change) for kind in KINDS
        ]
        self._by_kind = {reflector.kind.kind: reflector for reflector in self.reflectors}

    def __iter__(self) -> Iterator[Tree]:
        return iter(self._bodies.values())

    def find(self, kind: str, namespace: str, name: str) -> Tree | None:
        """One object as it is now."""
        return self._bodies.get(_key(kind, namespace, name))

    def of(self, kind: str) -> list[Tree]:
        """All objects of a kind."""
        wanted = _key(kind, "", "").kind
        return [body for place, body in self._bodies.items() if place.kind == wanted]

    def resource(self, kind: str) -> Resource | None:
        """How the server has a kind; None: it is not installed."""
        return self._by_kind[kind].resource

    @property
    def missing(self) -> list[str]:
        """What is still to be read before anything may be written, each with why."""
        return [
            f"{each.kind}: {each.problem or each.phase.value}"
            for each in self.reflectors
            if each.phase not in (Phase.ABSENT, Phase.FOLLOWING)
        ]


def _key(kind: str, namespace: str, name: str) -> ObjectKey:
    return ObjectKey(next((str(each) for each in _FOREIGN if each.kind == kind), kind), namespace, name)
