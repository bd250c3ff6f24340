"""The way in: one document to one typed object, whatever its kind.

Only `ManifestError` leaves this module, whatever the document is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ztunnel.mesh.manifests.authentication import PeerAuthenticationObject, read_peer_authentication
from ztunnel.mesh.manifests.authorization import AuthorizationPolicyObject, read_authorization_policy
from ztunnel.mesh.manifests.backend_policies import (
    EXPERIMENTAL_GROUP,
    BackendTlsPolicyObject,
    BackendTrafficPolicyObject,
    read_backend_tls_policy,
    read_backend_traffic_policy,
)
from ztunnel.mesh.manifests.core import (
    Namespace,
    Node,
    Pod,
    ServiceAccountObject,
    ServiceObject,
    read_namespace,
    read_node,
    read_pod,
    read_service,
    read_service_account,
)
from ztunnel.mesh.manifests.destination_rule import DestinationRuleObject, read_destination_rule
from ztunnel.mesh.manifests.fields import MAX_VALUES, Field
from ztunnel.mesh.manifests.gateway import GATEWAY_GROUP, GatewayClassObject, GatewayObject, read_gateway, read_gateway_class
from ztunnel.mesh.manifests.istio_gateway import IstioGatewayObject, read_istio_gateway
from ztunnel.mesh.manifests.metadata import ObjectKey
from ztunnel.mesh.manifests.references import NETWORKING_GROUP, ReferenceGrantObject, read_reference_grant
from ztunnel.mesh.manifests.request_authentication import RequestAuthenticationObject, read_request_authentication
from ztunnel.mesh.manifests.routes import RouteObject, read_grpc_route, read_http_route, read_tcp_route, read_tls_route
from ztunnel.mesh.manifests.secrets import ConfigMapObject, SecretObject, read_config_map, read_secret
from ztunnel.mesh.manifests.selectors import TargetRef
from ztunnel.mesh.manifests.service_entry import ServiceEntryObject, WorkloadEntryObject, read_service_entry, read_workload_entry
from ztunnel.mesh.manifests.telemetry import TELEMETRY_GROUP, TelemetryObject, read_telemetry
from ztunnel.mesh.manifests.virtual_service import VirtualServiceObject, read_virtual_service

MAX_LIST_DEPTH = 4
"""Lists within lists; a YAML document can contain itself."""
SECURITY_GROUP = "security.istio.io"
POLICY_KINDS = ("AuthorizationPolicy", "PeerAuthentication", "RequestAuthentication")
_LONGEST_NAME = 253


@dataclass(frozen=True, slots=True)
class Ignored:
    """An object of a kind that the mesh has no use for."""

    key: ObjectKey


@dataclass(frozen=True, slots=True)
class RefusedPolicy:
    """Stands in the place of a policy that was refused (see `mesh.refused`)."""

    key: ObjectKey
    selector: dict[str, str] | None
    everywhere: bool
    """Not even its namespace could be read: it may have been meant for the whole mesh."""
    reason: str
    targets: tuple[TargetRef, ...] = ()
    """What it was attached to, as far as it could be read: then L4 leaves it to the waypoint or gateway."""


ReadObject = (
    Namespace
    | Node
    | Pod
    | ServiceObject
    | ServiceAccountObject
    | AuthorizationPolicyObject
    | PeerAuthenticationObject
    | RequestAuthenticationObject
    | RouteObject
    | ReferenceGrantObject
    | DestinationRuleObject
    | VirtualServiceObject
    | IstioGatewayObject
    | ServiceEntryObject
    | WorkloadEntryObject
    | BackendTlsPolicyObject
    | BackendTrafficPolicyObject
    | SecretObject
    | ConfigMapObject
    | TelemetryObject
    | GatewayObject
    | GatewayClassObject
)
"""What a reader gives; every one of them has `metadata`."""
KubeObject = ReadObject | RefusedPolicy | Ignored

_Reader = Callable[[Field], ReadObject]
_KINDS: tuple[tuple[str, str, type[ReadObject], _Reader], ...] = (
    ("", "Namespace", Namespace, read_namespace),
    ("", "Node", Node, read_node),
    ("", "Pod", Pod, read_pod),
    ("", "Service", ServiceObject, read_service),
    ("", "ServiceAccount", ServiceAccountObject, read_service_account),
    (SECURITY_GROUP, "AuthorizationPolicy", AuthorizationPolicyObject, read_authorization_policy),
    (SECURITY_GROUP, "PeerAuthentication", PeerAuthenticationObject, read_peer_authentication),
    (SECURITY_GROUP, "RequestAuthentication", RequestAuthenticationObject, read_request_authentication),
    (GATEWAY_GROUP, "HTTPRoute", RouteObject, read_http_route),
    (GATEWAY_GROUP, "GRPCRoute", RouteObject, read_grpc_route),
    (GATEWAY_GROUP, "TCPRoute", RouteObject, read_tcp_route),
    (GATEWAY_GROUP, "TLSRoute", RouteObject, read_tls_route),
    (GATEWAY_GROUP, "ReferenceGrant", ReferenceGrantObject, read_reference_grant),
    (GATEWAY_GROUP, "BackendTLSPolicy", BackendTlsPolicyObject, read_backend_tls_policy),
    (EXPERIMENTAL_GROUP, "XBackendTrafficPolicy", BackendTrafficPolicyObject, read_backend_traffic_policy),
    ("", "Secret", SecretObject, read_secret),
    ("", "ConfigMap", ConfigMapObject, read_config_map),
    (TELEMETRY_GROUP, "Telemetry", TelemetryObject, read_telemetry),
    (NETWORKING_GROUP, "ServiceEntry", ServiceEntryObject, read_service_entry),
    (NETWORKING_GROUP, "WorkloadEntry", WorkloadEntryObject, read_workload_entry),
    (NETWORKING_GROUP, "Gateway", IstioGatewayObject, read_istio_gateway),
    (NETWORKING_GROUP, "VirtualService", VirtualServiceObject, read_virtual_service),
    (NETWORKING_GROUP, "DestinationRule", DestinationRuleObject, read_destination_rule),
    (GATEWAY_GROUP, "Gateway", GatewayObject, read_gateway),
    (GATEWAY_GROUP, "GatewayClass", GatewayClassObject, read_gateway_class),
)
"""API group, kind, what it is read into, and by what."""
_READERS: Mapping[tuple[str, str], _Reader] = MappingProxyType({(group, kind): reader for group, kind, _, reader in _KINDS})
_AMBIGUOUS = ((NETWORKING_GROUP, "Gateway"),)
"""Kinds whose name is also that of another group's kind that we read: their keys name the group."""
_NAMES: Mapping[type[ReadObject], str] = MappingProxyType(
    {what: f"{kind}.{group}" if (group, kind) in _AMBIGUOUS else kind for group, kind, what, _ in _KINDS}
)
"""The kind as an object's key has it."""
_CLUSTER_SCOPED = (("", "Namespace"), ("", "Node"), (GATEWAY_GROUP, "GatewayClass"))
_VERSIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "": ("v1",),
        SECURITY_GROUP: ("v1", "v1beta1"),
        GATEWAY_GROUP: ("v1", "v1beta1", "v1alpha3", "v1alpha2"),
        NETWORKING_GROUP: ("v1", "v1beta1", "v1alpha3"),
        EXPERIMENTAL_GROUP: ("v1alpha1",),
        TELEMETRY_GROUP: ("v1", "v1alpha1"),
    }
)


ALL_READ: tuple[type[ReadObject], ...] = tuple(dict.fromkeys(what for _, _, what, _ in _KINDS))
"""Everything that there is a reader for."""


def parse(body: object, subject_source: str) -> KubeObject:
    """The object that one document describes.

    Args:
        body: what a YAML or JSON loader returned.
        subject_source: where it came from (a file and the number of the document); names it in errors when it has no name.
    Raises:
        ManifestError: naming the object, the path of the field and the reason.
    """
    object_key = key_of(body)
    nameless = object_key is None or not object_key.name
    document = Field(subject_source if nameless else str(object_key), "", body)
    kind = document.get("kind").text()
    version = document.get("apiVersion")
    group, _, number = version.text().rpartition("/")
    if object_key is None:
        raise document.get("kind").wrong("not a kind")
    reader = _READERS.get((group, kind))
    if reader is None:
        if not group and kind in POLICY_KINDS:
            raise version.wrong(f"not a version of {SECURITY_GROUP}")
        if group == SECURITY_GROUP:
            # A misspelt policy that is taken for something foreign would be in force nowhere, and nobody would hear of it.
            raise document.get("kind").wrong(f"not a kind of {SECURITY_GROUP} (a list is kind List of v1)")
        return Ignored(object_key)
    if number not in _VERSIONS[group]:
        raise version.wrong(f"not a version of {kind} that is known ({', '.join(_VERSIONS[group])})")
    return reader(document)


def kinds(read_into: Collection[type[ReadObject]]) -> tuple[tuple[str, str, tuple[str, ...]], ...]:
    """API group, kind and known versions, best first, of what is read into certain types."""
    return tuple((group, kind, _VERSIONS[group]) for group, kind, what, _ in _KINDS if what in read_into)


def key(item: KubeObject) -> ObjectKey:
    """Which object it is; the same as `key_of` of the document that it was parsed from."""
    if isinstance(item, Ignored | RefusedPolicy):
        return item.key
    kind = item.kind if isinstance(item, RouteObject) else _NAMES[type(item)]
    return ObjectKey(kind, item.metadata.namespace, item.metadata.name)


def key_of(body: object) -> ObjectKey | None:
    """Which object a document is about, as far as it says so, whether or not it can be parsed.

    A name or namespace that is not text is empty in the key. Kinds that are not read get their API group: they must not be taken
    for ours (other projects have an AuthorizationPolicy too).

    Returns: None for what is not a mapping with a kind.
    """
    if not isinstance(body, dict):
        return None
    kind, version, metadata = _printable(body.get("kind")), body.get("apiVersion"), body.get("metadata")
    if not kind:
        return None
    group = _printable(version.rpartition("/")[0]) if isinstance(version, str) else ""
    metadata = metadata if isinstance(metadata, dict) else {}
    name, namespace = _printable(metadata.get("name")), metadata.get("namespace")
    if (group, kind) in _CLUSTER_SCOPED:
        return ObjectKey(kind, "", name)
    if group and ((group, kind) not in _READERS or (group, kind) in _AMBIGUOUS):
        kind = f"{kind}.{group}"
    return ObjectKey(kind, "default" if namespace is None else _printable(namespace), name)


def unpack(body: object) -> list[object]:
    """The documents in a document: the items of a `kind: List`, the document itself otherwise, nothing for an empty one.

    Raises:
        ManifestError: items that are no list, too many of them, or lists nested too deep.
    """
    return [] if body is None else list(_unpack(Field("List", "", body), MAX_LIST_DEPTH))


def _unpack(document: Field, depth: int) -> Iterator[object]:
    if not (isinstance(document.value, dict) and document.value.get("kind") == "List" and document.value.get("apiVersion") == "v1"):
        yield document.value
    elif depth == 0:
        raise document.error(f"lists nested more than {MAX_LIST_DEPTH} deep")
    else:
        for item in document.get("items").items(MAX_VALUES):
            yield from _unpack(item, depth - 1)


def _printable(value: object) -> str:
    return value if isinstance(value, str) and len(value) <= _LONGEST_NAME and value.isprintable() else ""
