"""Which waypoint serves which service and which pod, and why: the meaning of `istio.io/use-waypoint`.

An object's own label wins over its pod's service account's, that over its namespace's; `none` opts out, and there is no second choice
when the chosen waypoint cannot be used. Service accounts are ours: Istio's first waypoints were theirs, its later ones know no such label.
Whether a waypoint that cannot be used closes or opens is not decided here: a binding says what is wrong with it (`problem`).
Source: Istio `pilot/pkg/serviceregistry/ambient/waypoints.go`; waypoint labels and annotations of istio.io/api.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import lru_cache
from types import MappingProxyType

from ztunnel.mesh.conditions import Condition
from ztunnel.mesh.identity import SpiffeId
from ztunnel.mesh.manifests.core import Namespace, Pod, ServiceAccountObject, ServiceObject
from ztunnel.mesh.manifests.gateway import SAME_NAMESPACE, AllowedRoutes, GatewayClassObject, GatewayObject, Listener
from ztunnel.mesh.manifests.metadata import Metadata
from ztunnel.mesh.ports import INBOUND_HBONE
from ztunnel.mesh.workloads import Sandwich, WaypointRef

USE_WAYPOINT = "istio.io/use-waypoint"
USE_WAYPOINT_NAMESPACE = "istio.io/use-waypoint-namespace"
INGRESS_USE_WAYPOINT = "istio.io/ingress-use-waypoint"
WAYPOINT_FOR = "istio.io/waypoint-for"
CANARY = "istio.io/use-waypoint-canary"
CANARY_NAMESPACE = "istio.io/use-waypoint-canary-namespace"
CANARY_WEIGHT = "istio.io/use-waypoint-canary-weight"
INBOUND_BINDING = "ambient.istio.io/waypoint-inbound-binding"
MANAGED = "gateway.istio.io/managed"
GATEWAY_NAME = "gateway.networking.k8s.io/gateway-name"
GATEWAY_CLASS_NAME = "gateway.networking.k8s.io/gateway-class-name"

WAYPOINT_CLASS = "istio-waypoint"
MESH_CONTROLLER = "istio.io/mesh-controller"
CLASS_CONTROLLERS: Mapping[str, str] = MappingProxyType(
    {WAYPOINT_CLASS: MESH_CONTROLLER, "istio": "istio.io/gateway-controller", "istio-remote": "istio.io/unmanaged-gateway"}
)
"""GatewayClasses that are there without anybody having written them."""
MANAGED_WAYPOINT = "istio.io-mesh-controller"
"""The value of `MANAGED` on everything that is made for a waypoint."""
_UNATTACHED = (MANAGED_WAYPOINT, "istio.io-eastwest-controller")
"""What carries these is a waypoint or an east-west gateway itself."""
WAYPOINT_BOUND = "istio.io/WaypointBound"
MAX_WEIGHT = 100


class Traffic(Enum):
    """Which addressing a waypoint serves: `istio.io/waypoint-for`."""

    SERVICE = "service"
    WORKLOAD = "workload"
    ALL = "all"
    NONE = "none"


class Level(Enum):
    """Where the label stands that decides."""

    OBJECT = "object"
    SERVICE_ACCOUNT = "service account"
    NAMESPACE = "namespace"


_HEADLESS = (
    "a headless service is dialled by its pods' own addresses, and its connections do not go through waypoint {}: "
    "let its pods ask for a waypoint for workloads"
)


class Reason(Enum):
    """How a binding came out; the values are Istio's reasons of the condition `istio.io/WaypointBound`."""

    ACCEPTED = "WaypointAccepted"
    NOT_READY = "WaypointIsNotReady"
    ATTACHMENT_DENIED = "AttachmentDenied"
    UNSUPPORTED_TRAFFIC = "UnsupportedTrafficType"
    CROSS_NAMESPACE = "CrossNamespaceWaypointForbidden"
    CANARY_WEIGHT = "CanaryInvalidWeight"
    CANARY_SAME = "CanarySameAsPrimary"


@dataclass(frozen=True, slots=True)
class Waypoint:
    """One Gateway, as those who use it see it."""

    name: str
    namespace: str
    identity: SpiffeId
    """Of the service account that is made for it; a pod of its Service may have another (a foreign proxy)."""
    addresses: tuple[str, ...] = ()
    hostnames: tuple[str, ...] = ()
    traffic: Traffic = Traffic.SERVICE
    allowed: AllowedRoutes = SAME_NAMESPACE
    sandwich: Sandwich | None = None
    problem: str = ""
    """Not empty: it cannot be used, and why. Having no address yet is none: it serves before it can be reached."""
    class_name: str = WAYPOINT_CLASS

    @property
    def key(self) -> str:
        """`namespace/name`."""
        return f"{self.namespace}/{self.name}"

    def reference(self) -> WaypointRef:
        """As services and workloads carry it; the same object for all, which makes comparing them cheap."""
        return _reference(self.key, self.identity, self.addresses, self.hostnames)


@dataclass(frozen=True, slots=True)
class Binding:
    """What one object's labels, and those around it, come to."""

    wanted: str
    """`namespace/name` of the Gateway that is asked for."""
    level: Level
    reason: Reason
    message: str
    waypoint: Waypoint | None = None
    """None: it cannot be used for this object, `reason` says why."""
    canary: Waypoint | None = None
    canary_weight: int = 0
    """Percent of connections; 0 without `canary`."""
    ingress: bool = False
    """Ingress gateways go through it as well."""

    @property
    def closes(self) -> bool:
        """Whether there should be a waypoint in the way and is none. One that is not meant for this kind of addressing is not missed."""
        return self.waypoint is None and self.reason is not Reason.UNSUPPORTED_TRAFFIC

    def reference(self, identity: SpiffeId, *, fails_open: bool) -> WaypointRef | None:
        """What stands before the object on the data path.

        Args:
            identity: for the reference to a waypoint that is none.
            fails_open: whether one that cannot be used is done without.
        """
        if self.waypoint is not None:
            return self.waypoint.reference()
        return WaypointRef(self.wanted, identity, problem=self.message, fails_open=fails_open) if self.closes else None

    def condition(self) -> Condition:
        """As the object's status has it."""
        return Condition(WAYPOINT_BOUND, self.waypoint is not None, self.reason.value, self.message)


@dataclass(frozen=True, slots=True)
class Bound:
    """What one waypoint serves, each with why."""

    services: tuple[tuple[ServiceObject, Binding], ...] = ()
    pods: tuple[tuple[Pod, Binding], ...] = ()


@dataclass(frozen=True, slots=True)
class _Choice:
    key: str
    """Of the waypoint; empty: none is wanted."""
    level: Level
    where: str
    """The labelled object, in words."""


@dataclass(slots=True)
class Waypoints:
    """Every Gateway that may serve, and the labels that say whom."""

    by_key: dict[str, Waypoint] = field(default_factory=dict)
    _namespaces: dict[str, Metadata] = field(default_factory=dict)
    _accounts: dict[tuple[str, str], Metadata] = field(default_factory=dict)
    _judged: dict[tuple[str, str, str, Traffic, bool, bool], Binding | None] = field(default_factory=dict)

    @classmethod
    def of(cls, objects: Iterable[object], trust_domain: str = "cluster.local") -> Waypoints:
        """From all objects of the mesh; other kinds are passed over."""
        found = cls()
        gateways: list[GatewayObject] = []
        classes: dict[str, GatewayClassObject] = {}
        for each in objects:
            match each:
                case GatewayObject():
                    gateways.append(each)
                case GatewayClassObject():
                    classes[each.metadata.name] = each
                case Namespace():
                    found._namespaces[each.metadata.name] = each.metadata
                case ServiceAccountObject():
                    if USE_WAYPOINT in each.metadata.labels:
                        found._accounts[each.metadata.namespace, each.metadata.name] = each.metadata
                case _:
                    pass
        for gateway in gateways:
            waypoint = waypoint_of(gateway, classes.get(gateway.class_name), trust_domain)
            found.by_key[waypoint.key] = waypoint
        return found

    def for_service(self, metadata: Metadata, *, headless: bool = False, private: bool = False, reachable: bool = True) -> Binding | None:
        """The binding of a Service or ServiceEntry; None when no waypoint is asked for.

        Args:
            headless: without an address of its own, by which its connections could be told from others to the same pods.
            private: visible in its own namespace only (a ServiceEntry's `exportTo: ["."]`).
            reachable: a waypoint without an address is not ready.
        """
        if metadata.labels.get(MANAGED) in _UNATTACHED:
            return None
        namespace = self._namespaces.get(metadata.namespace)
        choice = _chosen(metadata, Level.OBJECT) or _chosen(namespace, Level.NAMESPACE)
        if choice is None or not choice.key:
            return None
        if headless:
            return Binding(choice.key, choice.level, Reason.UNSUPPORTED_TRAFFIC, f"{_HEADLESS.format(choice.key)} ({choice.where})")
        binding = self._judge(choice, metadata.namespace, Traffic.SERVICE, private=private, reachable=reachable)
        if binding is None:
            return None
        ingress = _is_true(metadata, namespace, INGRESS_USE_WAYPOINT)
        if binding.waypoint is None:
            return replace(binding, ingress=ingress)
        text = f"{binding.message}. Ingress traffic " + (
            "will traverse the waypoint"
            if ingress
            else f"is not using the waypoint, set the {INGRESS_USE_WAYPOINT} label to true if desired."
        )
        canary, weight, complaint = self._canary(metadata, namespace, choice, reachable=reachable)
        text += f"; {complaint}" if complaint else ""
        return Binding(binding.wanted, binding.level, binding.reason, text, binding.waypoint, canary, weight, ingress)

    def for_pod(self, metadata: Metadata, service_account: str, *, reachable: bool = True) -> Binding | None:
        """The binding of a pod (or WorkloadEntry); None when no waypoint is asked for. Arguments as `for_service`'s."""
        if metadata.labels.get(MANAGED) in _UNATTACHED:
            return None
        account = self._accounts.get((metadata.namespace, service_account))
        choice = (
            _chosen(metadata, Level.OBJECT)
            or _chosen(account, Level.SERVICE_ACCOUNT)
            or _chosen(self._namespaces.get(metadata.namespace), Level.NAMESPACE)
        )
        if choice is None or choice.key in ("", f"{metadata.namespace}/{metadata.labels.get(GATEWAY_NAME, '')}"):
            return None
        return self._judge(choice, metadata.namespace, Traffic.WORKLOAD, reachable=reachable)

    def sandwich_of(self, pod: Metadata) -> Sandwich | None:
        """How tunnels end that come to a pod which is a foreign proxy's."""
        name = pod.labels.get(GATEWAY_NAME)
        waypoint = self.by_key.get(f"{pod.namespace}/{name}") if name else None
        return waypoint.sandwich if waypoint else None

    def bound(self, key: str, services: Iterable[ServiceObject], pods: Iterable[Pod]) -> Bound:
        """What a waypoint serves, as primary or as canary, whether or not it has an address yet.

        Args:
            key: `Waypoint.key`.
        """
        served = [(each, self.for_service(each.metadata, headless=not each.vips, reachable=False)) for each in services if not each.ignored]
        workloads = [(each, self.for_pod(each.metadata, each.service_account, reachable=False)) for each in pods]
        return Bound(
            tuple((each, binding) for each, binding in served if binding is not None and is_served_by(binding, key)),
            tuple((each, binding) for each, binding in workloads if binding is not None and is_served_by(binding, key)),
        )

    def _judge(self, choice: _Choice, namespace: str, traffic: Traffic, *, private: bool = False, reachable: bool = True) -> Binding | None:
        """None: the namespace's waypoint is not meant for workloads, which is no mistake of anybody.

        Thousands of pods have the same binding: it is made once, and so compared by being the same.
        """
        memo = (choice.key, choice.where, namespace, traffic, private, reachable)
        if memo not in self._judged:
            self._judged[memo] = self._judge_anew(choice, namespace, traffic, private=private, reachable=reachable)
        return self._judged[memo]

    def _judge_anew(self, choice: _Choice, namespace: str, traffic: Traffic, *, private: bool, reachable: bool) -> Binding | None:
        waypoint = self.by_key.get(choice.key)

        def refused(reason: Reason, message: str) -> Binding:
            return Binding(choice.key, choice.level, reason, f"{message} ({choice.where})")

        if waypoint is None:
            return refused(Reason.NOT_READY, f'waypoint "{choice.key}" is not ready: there is no such Gateway')
        if waypoint.problem:
            return refused(Reason.NOT_READY, f'waypoint "{choice.key}" is not ready: {waypoint.problem}')
        if reachable and not waypoint.addresses and not waypoint.hostnames:
            return refused(Reason.NOT_READY, f'waypoint "{choice.key}" is not ready: it has no address yet')
        own = self._namespaces.get(namespace)
        if not waypoint.allowed.admits(waypoint.namespace, namespace, own.labels if own else {}):
            admitted = waypoint.allowed.namespaces.value
            text = f"we are not permitted to attach to waypoint {choice.key}: it admits namespaces From: {admitted}"
            return refused(Reason.ATTACHMENT_DENIED, text)
        if waypoint.traffic not in (traffic, Traffic.ALL):
            if traffic is Traffic.WORKLOAD and choice.level is Level.NAMESPACE:
                return None
            text = f"attempting to bind to traffic type {traffic.value} which waypoint {choice.key} does not support"
            return refused(Reason.UNSUPPORTED_TRAFFIC, f"{text}: it is for {waypoint.traffic.value}")
        if private and waypoint.namespace != namespace:
            return refused(Reason.CROSS_NAMESPACE, f"visible in its own namespace only, it cannot use waypoint {choice.key}")
        return Binding(choice.key, choice.level, Reason.ACCEPTED, f"Successfully attached to waypoint {choice.key}", waypoint)

    def _canary(
        self, metadata: Metadata, namespace: Metadata | None, primary: _Choice, *, reachable: bool
    ) -> tuple[Waypoint | None, int, str]:
        """The second waypoint, its share in percent, and what is wrong with it."""
        place: Metadata | None = metadata
        if CANARY not in metadata.labels:
            place = namespace if primary.level is Level.NAMESPACE else None
        if place is None or not place.labels.get(CANARY):
            return None, 0, ""
        key = f"{place.labels.get(CANARY_NAMESPACE) or metadata.namespace}/{place.labels[CANARY]}"
        if key == primary.key:
            return None, 0, f"{Reason.CANARY_SAME.value}: canary waypoint {key} is the primary waypoint"
        text = place.annotations.get(CANARY_WEIGHT, "0")
        if not (text.isascii() and text.isdigit() and len(text) <= 3 and int(text) <= MAX_WEIGHT):
            return None, 0, f"{Reason.CANARY_WEIGHT.value}: canary weight {text!r:.40} is not a number from 0 to {MAX_WEIGHT}"
        judged = self._judge(_Choice(key, Level.OBJECT, "as canary"), metadata.namespace, Traffic.SERVICE, reachable=reachable)
        if judged is None or judged.waypoint is None:
            return None, 0, f"{judged.reason.value}: {judged.message}" if judged else ""
        weight = int(text)
        return (
            (judged.waypoint, weight, f"canary waypoint {key} gets {weight} %") if weight else (None, 0, f"canary waypoint {key} gets 0 %")
        )


def waypoint_of(gateway: GatewayObject, gateway_class: GatewayClassObject | None, trust_domain: str) -> Waypoint:
    """A Gateway as a waypoint.

    Where nobody writes a status (plain files), the addresses that its spec asks for are its addresses.
    """
    metadata = gateway.metadata
    class_metadata = gateway_class.metadata if gateway_class else Metadata(gateway.class_name)
    traffic, problem = _traffic(metadata.labels.get(WAYPOINT_FOR) or class_metadata.labels.get(WAYPOINT_FOR))
    sandwich, complaint = _sandwich(metadata.annotations.get(INBOUND_BINDING) or class_metadata.annotations.get(INBOUND_BINDING))
    found = gateway.addresses or gateway.wanted_addresses
    addresses = tuple(each.value for each in found if each.type == "IPAddress")
    hostnames = tuple(each.value for each in found if each.type == "Hostname")
    if metadata.deleting:
        problem = problem or "it is being deleted"
    return Waypoint(
        name=metadata.name,
        namespace=metadata.namespace,
        identity=SpiffeId(trust_domain, metadata.namespace, metadata.name),
        addresses=addresses,
        hostnames=hostnames,
        traffic=traffic,
        allowed=_attachment(gateway.listeners, sandwich),
        sandwich=sandwich,
        problem=problem or complaint,
        class_name=gateway.class_name,
    )


def listener_problem(gateway: GatewayObject) -> str:
    """What is wrong with the listeners of a Gateway of class `istio-waypoint`; empty when nothing is."""
    listeners = gateway.listeners
    if len(listeners) == 1 and listeners[0].protocol == "HBONE" and listeners[0].port == INBOUND_HBONE:
        return ""
    return f'Expected a single listener on port {INBOUND_HBONE} with protocol "HBONE"'


def gateway_conditions(gateway: GatewayObject, controllers: Mapping[str, str] = CLASS_CONTROLLERS) -> tuple[Condition, ...]:
    """Of a Gateway that we run: Accepted, Programmed, ResolvedRefs.

    Args:
        controllers: controller by class.
    """
    if gateway.class_name not in controllers:
        text = f'gateway class "{gateway.class_name}" is not one of ours'
        return (Condition("Accepted", False, "InvalidParameters", text), Condition("Programmed", False, "Invalid", text))
    problem = _unacceptable(gateway)
    accepted = Condition("Accepted", not problem, "InvalidParameters" if problem else "Accepted", problem or "Resource accepted")
    if gateway.addresses:
        where = ", ".join(each.value for each in gateway.addresses)
        programmed = Condition("Programmed", True, "Programmed", f"Resource programmed, assigned to service(s) {where}")
    else:
        text = "Assigned to service(s), but no pod of it is ready yet"
        programmed = Condition("Programmed", False, "AddressNotAssigned", text)
    return accepted, programmed, Condition("ResolvedRefs", True, "ResolvedRefs", "All references resolved")


def _unacceptable(gateway: GatewayObject) -> str:
    """What of a Gateway itself cannot be done as it says."""
    _, traffic = _traffic(gateway.metadata.labels.get(WAYPOINT_FOR))
    _, sandwich = _sandwich(gateway.metadata.annotations.get(INBOUND_BINDING))
    ignored = f"not supported, and ignored: {', '.join(gateway.unsupported)}" if gateway.unsupported else ""
    return traffic or sandwich or ignored


def listener_conditions(gateway: GatewayObject, listener: Listener) -> tuple[Condition, ...]:
    """Of one listener: Accepted, Conflicted, Programmed, ResolvedRefs."""
    problem = listener_problem(gateway) if gateway.class_name == WAYPOINT_CLASS else ""
    clash = next((each for each in gateway.listeners if each is not listener and _clashes(each, listener)), None)
    bad = "UnsupportedProtocol" if problem else ""
    conflict = f"listener {clash.name!r} has port {clash.port} and this hostname as well" if clash else ""
    return (
        Condition("Accepted", not bad, bad or "Accepted", problem or "No errors found"),
        Condition("Conflicted", clash is not None, "HostnameConflict" if clash else "NoConflicts", conflict or "No errors found"),
        Condition(
            "Programmed", not bad and clash is None, (bad and "Invalid") or ("Invalid" if clash else "Programmed"), problem or conflict
        ),
        Condition("ResolvedRefs", True, "ResolvedRefs", "No errors found"),
    )


@lru_cache(maxsize=1024)
def _reference(name: str, identity: SpiffeId, addresses: tuple[str, ...], hostnames: tuple[str, ...]) -> WaypointRef:
    return WaypointRef(name, identity, addresses, hostnames)


def _clashes(one: Listener, other: Listener) -> bool:
    return one.port == other.port and (one.protocol != other.protocol or one.hostname == other.hostname)


def _chosen(metadata: Metadata | None, level: Level) -> _Choice | None:
    """What a label asks for; None where it asks for nothing."""
    name = metadata.labels.get(USE_WAYPOINT) if metadata else None
    if metadata is None or not name:
        return None
    if name == "none":
        return _Choice("", level, "")
    # A namespace has no namespace; its own name is meant.
    key = f"{metadata.labels.get(USE_WAYPOINT_NAMESPACE) or metadata.namespace or metadata.name}/{name}"
    where = "its own label" if level is Level.OBJECT else f"the label of {level.value} {metadata.name}"
    return _Choice(key, level, f"by {where} {USE_WAYPOINT}={name}")


def _is_true(metadata: Metadata, namespace: Metadata | None, label: str) -> bool:
    """A switch that the object's own label overrides."""
    own = metadata.labels.get(label)
    return (own if own is not None else (namespace.labels.get(label) if namespace else None)) == "true"


def is_served_by(binding: Binding | None, key: str) -> bool:
    """Whether a waypoint, by its key, is an object's primary or its canary."""
    return binding is not None and any(waypoint is not None and waypoint.key == key for waypoint in (binding.waypoint, binding.canary))


def _traffic(value: str | None) -> tuple[Traffic, str]:
    if not value:
        return Traffic.SERVICE, ""
    known = {each.value: each for each in Traffic}
    if value in known:
        return known[value], ""
    return Traffic.NONE, f"label {WAYPOINT_FOR}: {value!r} is not one of {', '.join(known)}"


def _sandwich(value: str | None) -> tuple[Sandwich | None, str]:
    if not value:
        return None, ""
    protocol, slash, port = value.partition("/")
    numeric = port.isascii() and port.isdigit() and len(port) <= 5 and 1 <= int(port) <= 65535
    if protocol not in ("NONE", "PROXY") or (slash and not numeric):
        return None, f"annotation {INBOUND_BINDING}: {value!r:.60} is not NONE or PROXY, with /PORT if need be"
    return Sandwich(protocol, int(port) if slash else 0), ""


def _attachment(listeners: Iterable[Listener], sandwich: Sandwich | None) -> AllowedRoutes:
    """Of the listener that tunnels come to."""
    protocol = "istio.io/PROXY" if sandwich and sandwich.protocol == "PROXY" else "HBONE"
    for each in listeners:
        if sandwich is not None and sandwich.port and each.port == sandwich.port:
            return each.allowed
        if each.port == INBOUND_HBONE and each.protocol in ("HBONE", protocol):
            return each.allowed
    return SAME_NAMESPACE
