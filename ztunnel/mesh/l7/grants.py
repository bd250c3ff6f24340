"""What references of Gateway API resolve to, and whether they are permitted across namespaces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ztunnel.mesh.l7.destinations import Destination, Registry
from ztunnel.mesh.manifests.gateway import GATEWAY_GROUP
from ztunnel.mesh.manifests.metadata import ObjectKey
from ztunnel.mesh.manifests.parse import KubeObject
from ztunnel.mesh.manifests.references import NETWORKING_GROUP, BackendRef, Grantee, ReferenceGrantObject

NOT_FOUND, INVALID_KIND, NOT_PERMITTED = "BackendNotFound", "InvalidKind", "RefNotPermitted"


@dataclass(frozen=True, slots=True)
class Unresolved:
    """A reference that leads nowhere: a reason of Gateway API, and words."""

    reason: str
    message: str


class References:
    """Resolves the references of a set of objects."""

    def __init__(self, objects: Mapping[ObjectKey, KubeObject], registry: Registry) -> None:
        self._registry = registry
        self._grants: dict[str, list[ReferenceGrantObject]] = {}
        for each in objects.values():
            if isinstance(each, ReferenceGrantObject):
                self._grants.setdefault(each.metadata.namespace, []).append(each)

    def permitted(self, source: Grantee, target: tuple[str, str, str], namespace: str) -> bool:
        """Whether a source may refer to (group, kind, name) in a namespace; in its own it always may."""
        if source.namespace == namespace:
            return True
        group, kind, name = target
        return any(
            source in grant.sources and ((group, kind, name) in grant.targets or (group, kind, "") in grant.targets)
            for grant in self._grants.get(namespace, ())
        )

    def backend(self, ref: BackendRef, kind: str, namespace: str) -> tuple[Destination, int] | Unresolved:
        """The destination and port that a route's backend means.

        Args:
            kind: of the route.
            namespace: of the route.
        """
        known = {("", "Service"): "Service", (NETWORKING_GROUP, "ServiceEntry"): "ServiceEntry", (NETWORKING_GROUP, "Hostname"): "host"}
        what = known.get((ref.group, ref.kind))
        if what is None:
            return Unresolved(INVALID_KIND, f"backends of kind {_kind(ref)} are not supported")
        target = (ref.group, ref.kind, ref.name)
        if what != "host" and not self.permitted(Grantee(GATEWAY_GROUP, kind, namespace), target, ref.namespace):
            return Unresolved(
                NOT_PERMITTED, f"no ReferenceGrant in namespace {ref.namespace} permits {kind}s of {namespace} {what} {ref.name}"
            )
        if what == "host":
            found = self._registry.named(ref.name, namespace)
        elif what == "Service":
            found = self._registry.service(ref.namespace, ref.name)
        else:
            found = self._registry.entry(ref.namespace, ref.name)
        if found is None:
            return Unresolved(
                NOT_FOUND, f"{what} {ref.namespace}/{ref.name} is not there" if what != "host" else f"host {ref.name} is not there"
            )
        port = ref.port or (found.ports[0].number if len(found.ports) == 1 else 0)
        if found.port(port) is None:
            return Unresolved(NOT_FOUND, f"{what} {ref.namespace}/{ref.name} has no port {port or '(say which)'}")
        return found, port


def _kind(ref: BackendRef) -> str:
    return f"{ref.group}/{ref.kind}" if ref.group else ref.kind
