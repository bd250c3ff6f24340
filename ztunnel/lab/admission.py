"""What the API server does to an object before it is stored: refuse nonsense, fill in defaults. Pure.

The lab's own bounds are checked here (what its nodes can run); the meaning of the mesh's kinds is `mesh.manifests`' business, asked
through the `Validate` seam. Every refusal names the file, the object, the field and the reason.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field

from ztunnel.lab import schema
from ztunnel.lab.images import UnknownImage, command_of
from ztunnel.lab.objects import KINDS, kind_of
from ztunnel.mesh.errors import ManifestError
from ztunnel.mesh.manifests.tree import Tree, at, branch, branches, integer, put, text

Validate = Callable[[Tree, str], object]
"""Raises ManifestError for an object that the mesh would refuse."""

MAX_REPLICAS = 500
MAX_CONTAINERS = 16
MAX_PORTS = 64
GRACE_SECONDS = 2
"""Kubernetes gives 30; a lab is taken down and rebuilt all day long."""

_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_LABEL_KEY = re.compile(rf"({_NAME.pattern}/)?[A-Za-z0-9]([A-Za-z0-9._-]{{0,61}}[A-Za-z0-9])?")
_PORT_NAME = re.compile(r"(?=.*[a-z])[a-z0-9]([-a-z0-9]{0,13}[a-z0-9])?")


@dataclass(frozen=True, slots=True)
class Offered:
    """One document as it was given, with the words to blame it by."""

    source: str
    body: Tree

    @property
    def subject(self) -> str:
        """`pods.yaml: Pod shop/web`."""
        namespace, name = text(self.body, "metadata", "namespace"), text(self.body, "metadata", "name", default="(without a name)")
        kind = text(self.body, "kind", default="(without a kind)")
        return f"{self.source}: {kind} {namespace + '/' if namespace else ''}{name}"

    def refuse(self, where: str, reason: str) -> ManifestError:
        """The error for one field of this document."""
        return ManifestError(self.subject, where, reason)


@dataclass(frozen=True, slots=True)
class Rules:
    """What admission depends on besides the object."""

    images: Mapping[str, str] = field(default_factory=dict)
    tools: Mapping[str, str] = field(default_factory=dict)
    validate: Validate = lambda body, subject: None


def admit(offered: Offered, rules: Rules, default_namespace: str = "default") -> Tree:
    """A copy of the object with every default filled in that does not depend on the cluster's state.

    Raises:
        ManifestError: the object is refused.
    """
    body = deepcopy(offered.body)
    kind = KINDS.get(kind_of(body))
    if kind is None or kind.kind == "Node":
        known = ", ".join(name for name in KINDS if name != "Node")
        raise offered.refuse("kind", f"the lab has no kind {text(body, 'kind')!r}; it has {known}")
    if text(body, "apiVersion") not in kind.api_versions:
        raise offered.refuse("apiVersion", f"{text(body, 'apiVersion')!r} is not one of {', '.join(kind.api_versions)}")
    _only(offered, body, "", schema.TOP.get(kind.kind, schema.OBJECT))
    _metadata(offered, body, kind.namespaced, default_namespace)
    checks: dict[str, Callable[[Offered, Tree, Rules], None]] = {
        "Pod": _pod,
        "Deployment": _deployment,
        "Service": _service,
        "Namespace": _namespace,
        "Secret": _secret,
    }
    if kind.kind in checks:
        checks[kind.kind](offered, body, rules)
    try:
        rules.validate(body, offered.source)
    except ManifestError as error:
        raise offered.refuse(error.field, error.reason) from error
    return body


def _only(offered: Offered, node: Tree, where: str, known: frozenset[str]) -> None:
    """Refuses a field that Kubernetes does not know either."""
    unknown = schema.unknown_field(node, known)
    if unknown is not None:
        name, reason = unknown
        raise offered.refuse(f"{where}.{name}" if where else name, reason)


def _metadata(offered: Offered, body: Tree, namespaced: bool, default_namespace: str) -> None:
    _only(offered, branch(body, "metadata"), "metadata", schema.METADATA)
    name, namespace = text(body, "metadata", "name"), text(body, "metadata", "namespace")
    if not _NAME.fullmatch(name):
        raise offered.refuse("metadata.name", f"{name!r} is not a lower-case DNS name")
    if namespaced:
        put(body, namespace or default_namespace, "metadata", "namespace")
        if namespace and not _LABEL.fullmatch(namespace):
            raise offered.refuse("metadata.namespace", f"{namespace!r} is not a lower-case DNS label")
    elif namespace:
        raise offered.refuse("metadata.namespace", f"a {text(body, 'kind')} has no namespace")
    for where in ("labels", "annotations"):
        values = at(body, "metadata", where)
        if values is not None and not (isinstance(values, dict) and all(isinstance(item, str) for pair in values.items() for item in pair)):
            raise offered.refuse(f"metadata.{where}", "must map strings to strings (quote numbers and booleans)")
        for key in values or ():
            if not _LABEL_KEY.fullmatch(key):
                raise offered.refuse(f"metadata.{where}", f"{key!r} is not a key (DOMAIN/NAME or NAME, of letters, digits, -, _ and .)")


def _namespace(offered: Offered, body: Tree, _: Rules) -> None:
    name = text(body, "metadata", "name")
    if not _LABEL.fullmatch(name):
        raise offered.refuse("metadata.name", f"{name!r} is not a lower-case DNS label")
    labels = branch(body, "metadata", "labels")
    put(body, {"kubernetes.io/metadata.name": name} | labels, "metadata", "labels")
    body.setdefault("status", {"phase": "Active"})


def _secret(offered: Offered, body: Tree, _: Rules) -> None:
    """As the API server: `stringData` is only another way of writing `data`."""
    body.setdefault("type", "Opaque")
    data = dict(branch(body, "data"))
    for name, value in data.items():
        try:
            base64.b64decode(value if isinstance(value, str) else "?", validate=True)
        except ValueError:
            raise offered.refuse(f"data.{name}", "is not base64") from None
    for name, value in branch(body, "stringData").items():
        if not isinstance(value, str):
            raise offered.refuse(f"stringData.{name}", "must be a string (quote numbers and booleans)")
        data[name] = base64.b64encode(value.encode()).decode()
    body.pop("stringData", None)
    if data:
        body["data"] = data


def _pod(offered: Offered, body: Tree, rules: Rules) -> None:
    _pod_spec(offered, body, "spec", rules)
    body.setdefault("status", {"phase": "Pending"})


def _pod_spec(offered: Offered, body: Tree, path: str, rules: Rules) -> None:
    spec = branch(body, *path.split("."))
    if not spec:
        raise offered.refuse(path, "is required")
    _only(offered, spec, path, schema.POD_SPEC)
    policy = spec.setdefault("restartPolicy", "Always")
    if policy not in ("Always", "OnFailure", "Never"):
        raise offered.refuse(f"{path}.restartPolicy", f"{policy!r} is not one of Always, OnFailure, Never")
    account = spec.get("serviceAccountName") or spec.get("serviceAccount") or "default"
    if not isinstance(account, str) or not _NAME.fullmatch(account):
        raise offered.refuse(f"{path}.serviceAccountName", f"{account!r} is not a lower-case DNS name")
    spec["serviceAccountName"] = account
    grace = spec.setdefault("terminationGracePeriodSeconds", GRACE_SECONDS)
    if not isinstance(grace, int) or isinstance(grace, bool) or not 0 <= grace <= 3600:
        raise offered.refuse(f"{path}.terminationGracePeriodSeconds", f"{grace!r} is not a number of seconds from 0 to 3600")
    if not 1 <= len(branches(spec, "containers")) <= MAX_CONTAINERS:
        raise offered.refuse(f"{path}.containers", f"there must be 1 to {MAX_CONTAINERS} containers")
    names: set[str] = set()
    for group in ("initContainers", "containers"):
        for index, container in enumerate(branches(spec, group)):
            _container(offered, container, f"{path}.{group}[{index}]", names, rules)


def _container(offered: Offered, container: Tree, where: str, names: set[str], rules: Rules) -> None:
    _only(offered, container, where, schema.CONTAINER)
    name = text(container, "name")
    if not _LABEL.fullmatch(name) or name in names:
        raise offered.refuse(f"{where}.name", f"{name!r} is not a lower-case DNS label that no other container of the pod has")
    names.add(name)
    for list_name in ("command", "args"):
        words = at(container, list_name)
        if words is not None and not (isinstance(words, list) and all(isinstance(word, str) for word in words)):
            raise offered.refuse(f"{where}.{list_name}", "must be a list of strings (quote numbers and booleans)")
    for position, variable in enumerate(branches(container, "env")):
        _environment(offered, variable, f"{where}.env[{position}]")
    if len(branches(container, "ports")) > MAX_PORTS:
        raise offered.refuse(f"{where}.ports", f"more than {MAX_PORTS} ports")
    for position, port in enumerate(branches(container, "ports")):
        _container_port(offered, port, f"{where}.ports[{position}]")
    try:
        command_of(container, rules.images, rules.tools)
    except UnknownImage as unknown:
        raise offered.refuse(f"{where}.image", str(unknown)) from unknown


_FIELD_PATHS = (
    "metadata.name",
    "metadata.namespace",
    "metadata.uid",
    "status.podIP",
    "status.hostIP",
    "spec.nodeName",
    "spec.serviceAccountName",
)


def _environment(offered: Offered, variable: Tree, where: str) -> None:
    _only(offered, variable, where, schema.ENVIRONMENT)
    if not text(variable, "name"):
        raise offered.refuse(f"{where}.name", "is required")
    path = at(variable, "valueFrom", "fieldRef", "fieldPath")
    if "valueFrom" in variable and path not in _FIELD_PATHS:
        raise offered.refuse(f"{where}.valueFrom", f"the lab only knows fieldRef with {', '.join(_FIELD_PATHS)}")
    if "value" in variable and not isinstance(variable["value"], str):
        raise offered.refuse(f"{where}.value", "must be a string (quote numbers and booleans)")


def _container_port(offered: Offered, port: Tree, where: str) -> None:
    _only(offered, port, where, schema.CONTAINER_PORT)
    if not 1 <= integer(port, "containerPort") <= 65535:
        raise offered.refuse(f"{where}.containerPort", f"{at(port, 'containerPort')!r} is not a port number")
    if port.setdefault("protocol", "TCP") not in ("TCP", "UDP"):
        raise offered.refuse(f"{where}.protocol", f"{port['protocol']!r} is not one of TCP, UDP")
    if "name" in port and not _PORT_NAME.fullmatch(text(port, "name")):
        raise offered.refuse(f"{where}.name", f"{port['name']!r} is not a port name (at most 15 of a-z, 0-9, -)")


def _deployment(offered: Offered, body: Tree, rules: Rules) -> None:
    _only(offered, branch(body, "spec"), "spec", schema.DEPLOYMENT_SPEC)
    _only(offered, branch(body, "spec", "template"), "spec.template", schema.POD_TEMPLATE)
    _only(offered, branch(body, "spec", "template", "metadata"), "spec.template.metadata", schema.METADATA)
    replicas = branch(body, "spec").setdefault("replicas", 1)
    if not isinstance(replicas, int) or isinstance(replicas, bool) or not 0 <= replicas <= MAX_REPLICAS:
        raise offered.refuse("spec.replicas", f"{replicas!r} is not a number from 0 to {MAX_REPLICAS}")
    wanted = branch(body, "spec", "selector", "matchLabels")
    if not wanted or branches(body, "spec", "selector", "matchExpressions"):
        raise offered.refuse("spec.selector.matchLabels", "is required, and the lab knows no matchExpressions")
    labels = branch(body, "spec", "template", "metadata", "labels")
    if any(labels.get(key) != value for key, value in wanted.items()):
        raise offered.refuse("spec.template.metadata.labels", "`selector` does not match template `labels`")
    _pod_spec(offered, body, "spec.template.spec", rules)
    if text(body, "spec", "template", "spec", "restartPolicy") != "Always":
        raise offered.refuse("spec.template.spec.restartPolicy", "a Deployment's pods always restart")


def _service(offered: Offered, body: Tree, _: Rules) -> None:
    spec = branch(body, "spec")
    _only(offered, spec, "spec", schema.SERVICE_SPEC)
    kind = spec.setdefault("type", "ClusterIP")
    if kind != "ClusterIP":
        raise offered.refuse("spec.type", f"the lab only knows ClusterIP services, not {kind!r}")
    headless = text(spec, "clusterIP") == "None"
    ports = branches(spec, "ports")
    if not headless and not 1 <= len(ports) <= MAX_PORTS:
        raise offered.refuse("spec.ports", f"there must be 1 to {MAX_PORTS} ports")
    seen: set[object] = set()
    for index, port in enumerate(ports):
        _service_port(offered, port, f"spec.ports[{index}]", len(ports) > 1)
        for identity in ((port["protocol"], port["port"]), text(port, "name") or index):
            if identity in seen:
                raise offered.refuse(f"spec.ports[{index}]", "has the name or the number of another port")
            seen.add(identity)


def _service_port(offered: Offered, port: Tree, where: str, named: bool) -> None:
    _only(offered, port, where, schema.SERVICE_PORT)
    if not 1 <= integer(port, "port") <= 65535:
        raise offered.refuse(f"{where}.port", f"{at(port, 'port')!r} is not a port number")
    if port.setdefault("protocol", "TCP") not in ("TCP", "UDP"):
        raise offered.refuse(f"{where}.protocol", f"{port['protocol']!r} is not one of TCP, UDP")
    target = port.setdefault("targetPort", port["port"])
    good = 1 <= target <= 65535 if isinstance(target, int) else isinstance(target, str) and _PORT_NAME.fullmatch(target)
    if isinstance(target, bool) or not good:
        raise offered.refuse(f"{where}.targetPort", f"{target!r} is neither a port number nor a port name")
    if named and not text(port, "name"):
        raise offered.refuse(f"{where}.name", "is required where a service has several ports")
