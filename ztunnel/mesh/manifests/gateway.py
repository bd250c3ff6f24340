"""Gateway and GatewayClass of the Gateway API, read for waypoints and ingress gateways.

Read strictly where a lost field would widen who may attach or what is served; the defaults that an API server fills in are filled in.
Source: Gateway API v1 (`gateway_types.go`, `gatewayclass_types.go`); Istio's use of both for waypoints.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from enum import Enum

from ztunnel.mesh.manifests.fields import Field
from ztunnel.mesh.manifests.metadata import Metadata, read_metadata
from ztunnel.mesh.manifests.selectors import EVERYTHING, SPEC, LabelSelector, read_label_selector

GATEWAY_GROUP = "gateway.networking.k8s.io"
MAX_LISTENERS = 64
MAX_ADDRESSES = 16
_PROTOCOL = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9./]{0,253}[A-Za-z0-9])?")
_HOSTNAME = re.compile(r"(?:\*\.)?[a-z0-9](?:[-a-z0-9.]{0,250}[a-z0-9])?")
_UNSUPPORTED = ("allowedListeners", "backendTLS", "defaultScope")
_GATEWAY_SPEC = ("gatewayClassName", "listeners", "addresses", "infrastructure", "tls", *_UNSUPPORTED)
_LISTENER = ("name", "hostname", "port", "protocol", "tls", "allowedRoutes")
_TLS = ("mode", "certificateRefs", "frontendValidation", "options")


class From(Enum):
    """The namespaces whose routes (and, at a waypoint, services and workloads) may attach."""

    SAME = "Same"
    ALL = "All"
    SELECTOR = "Selector"
    NONE = "None"


@dataclass(frozen=True, slots=True)
class AllowedRoutes:
    """Who may attach to one listener. `kinds`: (group, kind), empty for what the protocol implies."""

    namespaces: From = From.SAME
    selector: LabelSelector = EVERYTHING
    """For SELECTOR."""
    kinds: tuple[tuple[str, str], ...] = ()

    def admits(self, own_namespace: str, namespace: str, labels: dict[str, str]) -> bool:
        """Whether objects of a namespace may attach.

        Args:
            own_namespace: the Gateway's.
            labels: of the namespace that asks.
        """
        match self.namespaces:
            case From.ALL:
                return True
            case From.SAME:
                return namespace == own_namespace
            case From.SELECTOR:
                return self.selector.matches({"kubernetes.io/metadata.name": namespace} | labels)
            case From.NONE:
                return False


SAME_NAMESPACE = AllowedRoutes()


@dataclass(frozen=True, slots=True)
class ObjectRef:
    """A reference to an object, its defaults filled in."""

    group: str
    kind: str
    namespace: str
    name: str


@dataclass(frozen=True, slots=True)
class ListenerTls:
    """TLS of one listener: `mode` is Terminate or Passthrough."""

    mode: str = "Terminate"
    certificates: tuple[ObjectRef, ...] = ()
    client_roots: tuple[ObjectRef, ...] = ()
    options: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Listener:
    """One listener. `hostname` empty: any."""

    name: str
    port: int
    protocol: str
    hostname: str = ""
    tls: ListenerTls | None = None
    allowed: AllowedRoutes = SAME_NAMESPACE


@dataclass(frozen=True, slots=True)
class GatewayAddress:
    """One address. `type` is IPAddress (then `value` is canonical), Hostname, or an implementation's own."""

    type: str
    value: str


@dataclass(frozen=True, slots=True)
class GatewayObject:
    """One Gateway."""

    metadata: Metadata
    class_name: str
    listeners: tuple[Listener, ...] = ()
    wanted_addresses: tuple[GatewayAddress, ...] = ()
    """`spec.addresses`."""
    addresses: tuple[GatewayAddress, ...] = ()
    """`status.addresses`: where it can be reached; a controller writes them once a pod of it is ready."""
    infrastructure_labels: dict[str, str] = field(default_factory=dict)
    infrastructure_annotations: dict[str, str] = field(default_factory=dict)
    unsupported: tuple[str, ...] = ()
    """Fields that are there and of which nothing is done; its status says so."""


@dataclass(frozen=True, slots=True)
class GatewayClassObject:
    """One GatewayClass."""

    metadata: Metadata
    controller: str


def read_gateway(document: Field) -> GatewayObject:
    """A Gateway.

    Raises:
        ManifestError: a field that we read is not what it should be, or one that nobody knows.
    """
    document.only(SPEC)
    metadata = read_metadata(document)
    spec = document.get("spec")
    spec.only(_GATEWAY_SPEC)
    infrastructure = spec.get("infrastructure")
    infrastructure.only(("labels", "annotations", "parametersRef"))
    listeners = tuple(_listener(each, metadata.namespace) for each in spec.get("listeners").items(MAX_LISTENERS))
    names: set[str] = set()
    for index, listener in enumerate(listeners):
        if listener.name in names:
            raise spec.get("listeners").items()[index].get("name").wrong("another listener has that name")
        names.add(listener.name)
    listeners = _with_frontend(listeners, spec.get("tls"), metadata.namespace)
    return GatewayObject(
        metadata=metadata,
        class_name=spec.get("gatewayClassName").name(),
        listeners=listeners,
        wanted_addresses=_addresses(spec.get("addresses")),
        addresses=_addresses(document.get("status").get("addresses")),
        infrastructure_labels=infrastructure.get("labels").labels(),
        infrastructure_annotations={key: member.text("") for key, member in infrastructure.get("annotations").texts()},
        unsupported=tuple(each.path for each in _unsupported(spec) if not each.absent),
    )


def _with_frontend(listeners: tuple[Listener, ...], place: Field, namespace: str) -> tuple[Listener, ...]:
    """The listeners with what the Gateway as a whole, or for their ports, asks of clients' certificates.

    Raises:
        ManifestError: something of it that is not done, for a Gateway that silently asks for less lets everybody in.
    """
    place.only(("backend", "frontend"))
    if not place.get("backend").absent:
        raise place.get("backend").error("a certificate towards backends is not supported: use a DestinationRule with credentialName")
    frontend = place.get("frontend")
    frontend.only(("default", "perPort"))
    general = _validation(frontend.get("default"), namespace)
    by_port: dict[int, tuple[ObjectRef, ...]] = {}
    for item in frontend.get("perPort").items(MAX_LISTENERS):
        item.only(("port", "tls"))
        by_port[item.get("port").port()] = _validation(item.get("tls"), namespace)
    found = []
    for each in listeners:
        roots = by_port.get(each.port, general)
        wanted = each.tls is not None and each.protocol == "HTTPS" and not each.tls.client_roots and roots
        found.append(replace(each, tls=replace(each.tls, client_roots=roots)) if wanted and each.tls else each)
    return tuple(found)


def _validation(place: Field, namespace: str) -> tuple[ObjectRef, ...]:
    place.only(("validation",))
    return _client_roots(place.get("validation"), namespace)


def _client_roots(validation: Field, namespace: str) -> tuple[ObjectRef, ...]:
    """Whose certificates clients must show; none: they need none.

    Raises:
        ManifestError: also when it is there and names nobody, which would let everybody in.
    """
    validation.only(("caCertificateRefs", "mode"))
    mode, roots = validation.get("mode"), validation.get("caCertificateRefs")
    if mode.text("AllowValidOnly") != "AllowValidOnly":
        raise mode.wrong("not supported: only AllowValidOnly is")
    found = tuple(_reference(each, namespace, "ConfigMap") for each in roots.items(MAX_LISTENERS))
    if not found and not validation.absent:
        raise roots.error("required: without one every client would be let in")
    return found


def read_gateway_class(document: Field) -> GatewayClassObject:
    """A GatewayClass; it has no namespace.

    Raises:
        ManifestError: a field that we read is not what it should be.
    """
    document.only(SPEC)
    metadata = replace(read_metadata(document), namespace="")
    return GatewayClassObject(metadata, document.get("spec").get("controllerName").text())


def _listener(place: Field, namespace: str) -> Listener:
    place.only(_LISTENER)
    protocol = place.get("protocol")
    if not _PROTOCOL.fullmatch(protocol.text()):
        raise protocol.wrong("not a protocol")
    hostname = place.get("hostname")
    if not hostname.absent and hostname.value != "" and not _HOSTNAME.fullmatch(hostname.text()):
        raise hostname.wrong("not a host name (lower case, *. only in front)")
    return Listener(
        name=place.get("name").name(),
        port=place.get("port").port(),
        protocol=protocol.text(),
        hostname="" if hostname.value == "" else hostname.text(""),
        tls=None if place.get("tls").absent else _tls(place.get("tls"), namespace),
        allowed=_allowed(place.get("allowedRoutes")),
    )


def _tls(place: Field, namespace: str) -> ListenerTls:
    place.only(_TLS)
    mode = place.get("mode")
    if mode.text("Terminate") not in ("Terminate", "Passthrough"):
        raise mode.wrong("not one of Terminate, Passthrough")
    return ListenerTls(
        mode=mode.text("Terminate"),
        certificates=tuple(_reference(each, namespace, "Secret") for each in place.get("certificateRefs").items(MAX_LISTENERS)),
        client_roots=_client_roots(place.get("frontendValidation"), namespace),
        options={key: member.text("") for key, member in place.get("options").texts()},
    )


def _reference(place: Field, namespace: str, kind: str) -> ObjectRef:
    place.only(("group", "kind", "name", "namespace"))
    group = place.get("group")
    return ObjectRef(
        "" if group.value == "" else group.text(""),
        place.get("kind").text(kind),
        place.get("namespace").namespace(namespace),
        place.get("name").name(),
    )


def _allowed(place: Field) -> AllowedRoutes:
    place.only(("namespaces", "kinds"))
    namespaces = place.get("namespaces")
    namespaces.only(("from", "selector"))
    source = namespaces.get("from")
    if source.text(From.SAME.value) not in {each.value for each in From}:
        raise source.wrong(f"not one of {', '.join(each.value for each in From)}")
    chosen = From(source.text(From.SAME.value))
    if chosen is From.SELECTOR and namespaces.get("selector").absent:
        raise namespaces.get("selector").error("required with from: Selector")
    return AllowedRoutes(
        chosen,
        read_label_selector(namespaces.get("selector")),
        tuple((each.get("group").text(GATEWAY_GROUP), each.get("kind").text()) for each in place.get("kinds").items(MAX_LISTENERS)),
    )


def _addresses(place: Field) -> tuple[GatewayAddress, ...]:
    found = []
    for each in place.items(MAX_ADDRESSES):
        kind, value = each.get("type").text("IPAddress"), each.get("value")
        if value.absent or value.value == "":
            continue  # "any address of that type"
        found.append(GatewayAddress(kind, value.address() if kind == "IPAddress" else value.text()))
    return tuple(dict.fromkeys(found))


def _unsupported(spec: Field) -> list[Field]:
    return [*(spec.get(name) for name in _UNSUPPORTED), spec.get("infrastructure").get("parametersRef")]
