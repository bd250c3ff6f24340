"""Gateway API's references: what a route is attached to, where it sends, and who permits that across namespaces."""

from __future__ import annotations

from dataclasses import dataclass

from ztunnel.mesh.l7.routes import NO_EDITS, HeaderEdits
from ztunnel.mesh.manifests.fields import Field
from ztunnel.mesh.manifests.gateway import GATEWAY_GROUP
from ztunnel.mesh.manifests.metadata import Metadata, read_metadata
from ztunnel.mesh.manifests.selectors import SPEC
from ztunnel.mesh.manifests.values import header_edits, hostname, integer

NETWORKING_GROUP = "networking.istio.io"
MAX_WEIGHT = 1_000_000


@dataclass(frozen=True, slots=True)
class ParentRef:
    """What a route is attached to. `namespace` is filled in."""

    group: str
    kind: str
    namespace: str
    name: str
    section: str = ""
    port: int = 0
    """0: every port."""


@dataclass(frozen=True, slots=True)
class BackendRef:
    """Where a share of the requests goes. `namespace` is filled in."""

    group: str
    kind: str
    namespace: str
    name: str
    port: int = 0
    weight: int = 1
    request: HeaderEdits = NO_EDITS
    response: HeaderEdits = NO_EDITS
    problem: str = ""
    """Not empty: a filter that cannot be done; its share is answered 500."""


@dataclass(frozen=True, slots=True)
class Grantee:
    """Which objects may refer."""

    group: str
    kind: str
    namespace: str


@dataclass(frozen=True, slots=True)
class ReferenceGrantObject:
    """What objects of other namespaces may refer to in its own. `to`: group, kind, name (empty: all)."""

    metadata: Metadata
    sources: tuple[Grantee, ...]
    targets: tuple[tuple[str, str, str], ...]


def read_parents(place: Field, namespace: str) -> tuple[ParentRef, ...]:
    """`parentRefs`, each once."""
    return tuple(dict.fromkeys(_parent(item, namespace) for item in place.items()))


def read_backend(place: Field, namespace: str, *, filters: bool = False, weighted: bool = True) -> BackendRef:
    """One `backendRef`.

    Args:
        filters: whether it may have them (HTTP and gRPC only).
        weighted: False for a mirror's.
    """
    place.only(("group", "kind", "name", "namespace", "port", *(("weight",) if weighted else ()), *(("filters",) if filters else ())))
    request, response, problem = _filters(place.get("filters"))
    kind, group = place.get("kind").text("Service"), _group(place.get("group"), "")
    named_by_host = (group, kind) == (NETWORKING_GROUP, "Hostname")
    port = place.get("port")
    if port.absent and (group, kind) == ("", "Service"):
        raise port.error("required for a Service")
    return BackendRef(
        group=group,
        kind=kind,
        namespace=place.get("namespace").namespace(namespace),
        name=hostname(place.get("name")) if named_by_host else place.get("name").name(),
        port=0 if port.absent else port.port(),
        weight=integer(place.get("weight"), 0, MAX_WEIGHT, 1),
        request=request,
        response=response,
        problem=problem,
    )


def read_reference_grant(document: Field) -> ReferenceGrantObject:
    """A ReferenceGrant."""
    document.only(SPEC)
    spec = document.get("spec")
    spec.only(("from", "to"))
    sources, targets = [], []
    for item in spec.get("from").items():
        item.only(("group", "kind", "namespace"))
        sources.append(Grantee(_group(item.get("group"), ""), item.get("kind").text(), item.get("namespace").namespace()))
    for item in spec.get("to").items():
        item.only(("group", "kind", "name"))
        targets.append((_group(item.get("group"), ""), item.get("kind").text(), item.get("name").name("")))
    return ReferenceGrantObject(read_metadata(document), tuple(sources), tuple(targets))


def _parent(place: Field, namespace: str) -> ParentRef:
    place.only(("group", "kind", "namespace", "name", "sectionName", "port"))
    port = place.get("port")
    return ParentRef(
        group=_group(place.get("group"), GATEWAY_GROUP),
        kind=place.get("kind").text("Gateway"),
        namespace=place.get("namespace").namespace(namespace),
        name=place.get("name").name(),
        section=place.get("sectionName").name(""),
        port=0 if port.absent else port.port(),
    )


def _group(place: Field, default: str) -> str:
    if place.value == "":
        return ""
    group = place.name(default) if default else ("" if place.absent else place.name())
    return "" if group == "core" else group


def _filters(place: Field) -> tuple[HeaderEdits, HeaderEdits, str]:
    request = response = HeaderEdits()
    problem = ""
    for item in place.items():
        kind = item.get("type").text()
        if kind == "RequestHeaderModifier":
            request = header_edits(item.get("requestHeaderModifier"))
        elif kind == "ResponseHeaderModifier":
            response = header_edits(item.get("responseHeaderModifier"))
        else:
            problem = problem or f"{item.path}: {kind[:80]} is not done on a backend"
    return request, response, problem
