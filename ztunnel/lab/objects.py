"""The kinds that a lab knows, their names in all spellings, and label selectors. Pure; imported by the command line.

One table decides which kinds exist: `KINDS`. What the API server says about an object that is missing or refused is here too,
so that the controller and the command line speak with one voice (kubectl's).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from ztunnel.mesh.errors import LocalError
from ztunnel.mesh.manifests.tree import Tree, at, branches, strings, text

REDIRECTION = "ambient.istio.io/redirection"
"""The pod annotation that says whether a node agent has captured the pod. Source: Istio ambient."""

MAX_LABEL_SELECTOR = 4096


class LabError(LocalError):
    """Something that the lab refuses, in the API server's manner.

    Args:
        reason: the API server's word, such as NotFound, or empty for an error of the lab itself.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(f"Error from server ({reason}): {message}" if reason else f"error: {message}")
        self.reason = reason
        self.message = message


class Key(NamedTuple):
    """What names an object; `namespace` is empty for kinds without one."""

    kind: str
    namespace: str
    name: str


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind and how it is spelled."""

    kind: str
    """As keys have it: with its group where another kind has the same name."""
    plural: str
    short: tuple[str, ...] = ()
    group: str = ""
    versions: tuple[str, ...] = ("v1",)
    namespaced: bool = True

    @property
    def singular(self) -> str:
        """As in `pod/web created`."""
        return self.kind.partition(".")[0].lower()

    @property
    def words(self) -> frozenset[str]:
        """What a command line may call it. A name that two groups have means the kind that has no group in its key."""
        bare = () if "." in self.kind else (self.singular, self.plural)
        return frozenset((*bare, self.qualified, self.resource, *self.short))

    @property
    def api_versions(self) -> tuple[str, ...]:
        """The accepted values of `apiVersion`; the first is what `get` shows for objects that the lab makes itself."""
        return tuple(f"{self.group}/{version}" if self.group else version for version in self.versions)

    @property
    def qualified(self) -> str:
        """As in `deployment.apps`."""
        return f"{self.singular}.{self.group}" if self.group else self.singular

    @property
    def resource(self) -> str:
        """As the API server names the resource in errors: `deployments.apps`."""
        return f"{self.plural}.{self.group}" if self.group else self.plural


_SECURITY, _GATEWAY, _NETWORKING = "security.istio.io", "gateway.networking.k8s.io", "networking.istio.io"
_ISTIO = ("v1", "v1beta1")
_ISTIO_GATEWAY = "Gateway.networking.istio.io"
KINDS: dict[str, Kind] = {
    kind.kind: kind
    for kind in (
        Kind("Node", "nodes", ("no",), namespaced=False),
        Kind("Namespace", "namespaces", ("ns",), namespaced=False),
        Kind("ServiceAccount", "serviceaccounts", ("sa",)),
        Kind("ConfigMap", "configmaps", ("cm",)),
        Kind("Secret", "secrets"),
        Kind("GatewayClass", "gatewayclasses", ("gc",), _GATEWAY, ("v1", "v1beta1"), namespaced=False),
        Kind("Gateway", "gateways", ("gtw",), _GATEWAY, ("v1", "v1beta1")),
        Kind("Service", "services", ("svc",)),
        Kind("Deployment", "deployments", ("deploy",), "apps"),
        Kind("Pod", "pods", ("po",)),
        Kind("AuthorizationPolicy", "authorizationpolicies", ("ap", "authz"), _SECURITY, _ISTIO),
        Kind("PeerAuthentication", "peerauthentications", ("pa", "peerauthn"), _SECURITY, _ISTIO),
        Kind("RequestAuthentication", "requestauthentications", ("ra",), _SECURITY, _ISTIO),
        Kind("HTTPRoute", "httproutes", (), _GATEWAY, ("v1", "v1beta1")),
        Kind("GRPCRoute", "grpcroutes", (), _GATEWAY, ("v1", "v1alpha2")),
        Kind("TCPRoute", "tcproutes", (), _GATEWAY, ("v1alpha2",)),
        Kind("TLSRoute", "tlsroutes", (), _GATEWAY, ("v1", "v1alpha3", "v1alpha2")),
        Kind("ReferenceGrant", "referencegrants", ("refgrant",), _GATEWAY, ("v1", "v1beta1")),
        Kind("BackendTLSPolicy", "backendtlspolicies", ("btlspolicy",), _GATEWAY, ("v1", "v1alpha3")),
        Kind("XBackendTrafficPolicy", "xbackendtrafficpolicies", ("xbtrafficpolicy",), "gateway.networking.x-k8s.io", ("v1alpha1",)),
        Kind("VirtualService", "virtualservices", ("vs",), _NETWORKING, (*_ISTIO, "v1alpha3")),
        Kind("DestinationRule", "destinationrules", ("dr",), _NETWORKING, (*_ISTIO, "v1alpha3")),
        Kind("ServiceEntry", "serviceentries", ("se",), _NETWORKING, (*_ISTIO, "v1alpha3")),
        Kind("WorkloadEntry", "workloadentries", ("we",), _NETWORKING, (*_ISTIO, "v1alpha3")),
        Kind(_ISTIO_GATEWAY, "gateways", ("gw",), _NETWORKING, (*_ISTIO, "v1alpha3")),
        Kind("Telemetry", "telemetries", ("telemetry",), "telemetry.istio.io", ("v1", "v1alpha1")),
    )
}
"""In the order in which a batch is applied: what others refer to comes first."""

ALL_KINDS = ("Pod", "Service", "Deployment")
"""What `get all` lists, as kubectl: the workloads, not the configuration."""


def kind_named(word: str) -> Kind:
    """The kind that a command line means: singular, plural, short or qualified, in any case.

    Raises:
        LabError: no such kind; the text lists those that there are.
    """
    wanted = word.lower()
    for kind in KINDS.values():
        if wanted in kind.words:
            return kind
    raise LabError("", f"the lab doesn't have a resource type {word!r}; it has {', '.join(kind.plural for kind in KINDS.values())}")


def kind_of(body: Tree) -> str:
    """The kind as keys have it; empty where the object does not say."""
    kind = text(body, "kind")
    return _ISTIO_GATEWAY if kind == "Gateway" and text(body, "apiVersion").startswith(f"{_NETWORKING}/") else kind


def key_of(body: Tree) -> Key:
    """The key of an object that was admitted."""
    return Key(kind_of(body), text(body, "metadata", "namespace"), text(body, "metadata", "name"))


def uid_of(body: Tree) -> str:
    """The object's UID."""
    return text(body, "metadata", "uid")


def labels_of(body: Tree) -> dict[str, str]:
    """The object's labels."""
    return strings(body, "metadata", "labels")


def display(key: Key) -> str:
    """As kubectl names an object in its messages: `deployment.apps/web`."""
    return f"{KINDS[key.kind].qualified}/{key.name}"


def not_found(key: Key) -> LabError:
    """The API server's answer to a question about an object that is not there."""
    return LabError("NotFound", f'{KINDS[key.kind].resource} "{key.name}" not found')


def is_deleting(body: Tree) -> bool:
    """Whether the object waits for its finalization."""
    return bool(text(body, "metadata", "deletionTimestamp"))


def is_ready(pod: Tree) -> bool:
    """Whether the pod's Ready condition is true."""
    return any(
        text(condition, "type") == "Ready" and text(condition, "status") == "True" for condition in branches(pod, "status", "conditions")
    )


def is_terminal(pod: Tree) -> bool:
    """Whether the pod has ended for good."""
    return text(pod, "status", "phase") in ("Succeeded", "Failed")


def pod_addresses(pod: Tree) -> tuple[str, ...]:
    """The pod's addresses, primary family first; empty until it has a network."""
    return tuple(text(entry, "ip") for entry in branches(pod, "status", "podIPs"))


_TERM = re.compile(
    r"\s*(?:(?P<absent>!)\s*(?P<no>[^\s!=,()]+)"
    r"|(?P<set>[^\s!=,()]+)\s+(?P<how>in|notin)\s*\((?P<values>[^()]*)\)"
    r"|(?P<key>[^\s!=,()]+)\s*(?:(?P<op>==|=|!=)\s*(?P<value>[^\s!=,()]*))?)\s*(?:,|$)"
)


class Requirement(NamedTuple):
    """One term of a selector: `values` None asks for the key's presence alone."""

    key: str
    wanted: bool
    values: frozenset[str] | None

    def holds(self, labels: dict[str, str]) -> bool:
        """Whether labels satisfy this term. `!=` and `notin` also hold where the key is absent, as in Kubernetes."""
        if self.values is None:
            return (self.key in labels) == self.wanted
        return (labels.get(self.key) in self.values) == self.wanted


def parse_selector(selector: str) -> tuple[Requirement, ...]:
    """The terms of `-l`: `a=b,c!=d,e in (f,g),h notin (i),j,!k`.

    Raises:
        LabError: not of that form.
    """
    terms, position = [], 0
    if len(selector) > MAX_LABEL_SELECTOR:
        raise LabError("BadRequest", f"label selector longer than {MAX_LABEL_SELECTOR} characters")
    while position < len(selector):
        match = _TERM.match(selector, position)
        if match is None or match.end() == position:
            raise LabError("BadRequest", f"unable to parse label selector at {selector[position : position + 40]!r}")
        position = match.end()
        if match["absent"]:
            terms.append(Requirement(match["no"], False, None))
        elif match["set"]:
            values = frozenset(value.strip() for value in match["values"].split(","))
            terms.append(Requirement(match["set"], match["how"] == "in", values))
        elif match["op"]:
            terms.append(Requirement(match["key"], match["op"] != "!=", frozenset({match["value"]})))
        else:
            terms.append(Requirement(match["key"], True, None))
    return tuple(terms)


def selects(selector: dict[str, str], labels: dict[str, str]) -> bool:
    """Whether a `matchLabels`-like selector matches; an empty one matches nothing here (a Service without selector)."""
    return bool(selector) and all(labels.get(key) == value for key, value in selector.items())


def container_port(pod: Tree, wanted: object, protocol: str) -> int | None:
    """The number that a `targetPort` means on this pod; None where the pod has no port of that name."""
    if isinstance(wanted, int) and not isinstance(wanted, bool):
        return wanted
    for container in branches(pod, "spec", "containers"):
        for port in branches(container, "ports"):
            number = at(port, "containerPort")
            if text(port, "name") == wanted and text(port, "protocol", default="TCP") == protocol and isinstance(number, int):
                return number
    return None
