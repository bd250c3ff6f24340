"""Objects as people read them: kubectl's tables and descriptions. Pure: `now` is an argument."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from ztunnel.lab.objects import KINDS, REDIRECTION, display, is_deleting, is_ready, key_of, labels_of
from ztunnel.lab.placement import cluster_addresses
from ztunnel.mesh.manifests.tree import Tree, at, branch, branches, integer, strings, text, texts

NONE = "<none>"
Row = list[str]


@dataclass(frozen=True, slots=True)
class Columns:
    """How one kind is shown: headings and cells, those after `narrow` only with `-o wide`."""

    headings: tuple[str, ...]
    narrow: int
    cells: Callable[[Tree, datetime], Row]


@dataclass(frozen=True, slots=True)
class Look:
    """What the command line asked for."""

    wide: bool = False
    namespaces: bool = False
    labels: bool = False
    headings: bool = True


def table(kind: str, items: Sequence[Tree], look: Look, now: datetime) -> list[Row]:
    """The rows of a table, the headings first if they are wanted."""
    columns = _COLUMNS.get(kind, _OTHERS)
    count = None if look.wide else columns.narrow
    rows = []
    if look.headings:
        rows.append([*(["NAMESPACE"] if look.namespaces else []), *columns.headings[:count], *(["LABELS"] if look.labels else [])])
    for item in items:
        cells = columns.cells(item, now)[:count]
        front = [text(item, "metadata", "namespace")] if look.namespaces else []
        rows.append([*front, *cells, *([_pairs(labels_of(item))] if look.labels else [])])
    return rows


def aligned(rows: Sequence[Row], widths: Sequence[int] = ()) -> str:
    """Rows as text in columns, three spaces apart, no spaces at line ends."""
    needed = [max((len(row[index]) for row in rows if index < len(row)), default=0) for index in range(max(map(len, rows), default=0))]
    needed = [max(pair) for pair in zip(needed, [*widths, *needed[len(widths) :]], strict=True)]
    return "\n".join("   ".join(cell.ljust(width) for cell, width in zip(row, needed, strict=False)).rstrip() for row in rows)


def age(since: str, now: datetime) -> str:
    """A duration as kubectl rounds it: 5s, 3m20s, 17m, 4h, 3d."""
    try:
        seconds = max(0, int((now - datetime.strptime(since, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)).total_seconds()))
    except ValueError:
        return "<unknown>"
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if seconds < 120:
        return f"{seconds}s"
    if minutes < 10:
        return f"{minutes}m{seconds % 60}s" if seconds % 60 else f"{minutes}m"
    if hours < 3:
        return f"{minutes}m"
    return f"{hours}h" if days < 2 else f"{days}d"


def pod_state(pod: Tree) -> str:
    """The STATUS column: the phase, or what its containers suffer from."""
    if is_deleting(pod):
        return "Terminating"
    for status in branches(pod, "status", "containerStatuses"):
        reason = text(status, "state", "waiting", "reason") or text(status, "state", "terminated", "reason")
        if reason:
            return reason
    return text(pod, "status", "phase", default="Pending")


def _name(item: Tree) -> str:
    return text(item, "metadata", "name")


def _age(item: Tree, now: datetime) -> str:
    return age(text(item, "metadata", "creationTimestamp"), now)


def _pairs(values: dict[str, str]) -> str:
    return ",".join(f"{key}={value}" for key, value in sorted(values.items())) or NONE


def _pod(item: Tree, now: datetime) -> Row:
    statuses = branches(item, "status", "containerStatuses")
    ready = f"{sum(at(status, 'ready') is True for status in statuses)}/{len(branches(item, 'spec', 'containers'))}"
    restarts = str(sum(integer(status, "restartCount") for status in statuses))
    addresses = ",".join(text(entry, "ip") for entry in branches(item, "status", "podIPs")) or NONE
    mesh = strings(item, "metadata", "annotations").get(REDIRECTION, NONE)
    return [_name(item), ready, pod_state(item), restarts, _age(item, now), addresses, text(item, "spec", "nodeName", default=NONE), mesh]


def _service(item: Tree, now: datetime) -> Row:
    ports = ",".join(f"{integer(port, 'port')}/{text(port, 'protocol', default='TCP')}" for port in branches(item, "spec", "ports")) or NONE
    address = ",".join(cluster_addresses(item)) or text(item, "spec", "clusterIP", default="None")
    selector = _pairs(strings(item, "spec", "selector"))
    return [_name(item), text(item, "spec", "type", default="ClusterIP"), address, NONE, ports, _age(item, now), selector]


def _deployment(item: Tree, now: datetime) -> Row:
    status, wanted = branch(item, "status"), integer(item, "spec", "replicas", default=1)
    containers = branches(item, "spec", "template", "spec", "containers")
    names, images = (",".join(text(container, field) for container in containers) for field in ("name", "image"))
    counts = [
        f"{integer(status, 'readyReplicas')}/{wanted}",
        str(integer(status, "updatedReplicas")),
        str(integer(status, "availableReplicas")),
    ]
    return [_name(item), *counts, _age(item, now), names, images or NONE, _pairs(strings(item, "spec", "selector", "matchLabels"))]


def _node(item: Tree, now: datetime) -> Row:
    addresses = ",".join(text(entry, "address") for entry in branches(item, "status", "addresses"))
    return [_name(item), "Ready" if is_ready(item) else "NotReady", _age(item, now), addresses, ",".join(texts(item, "spec", "podCIDRs"))]


def _plain(*middle: Callable[[Tree], str]) -> Callable[[Tree, datetime], Row]:
    return lambda item, now: [_name(item), *(cell(item) for cell in middle), _age(item, now)]


def _gateway(item: Tree, now: datetime) -> Row:
    addresses = [text(each, "value") for each in branches(item, "status", "addresses")]
    shown = next((each for each in addresses if each[:1].isdigit() or ":" in each), next(iter(addresses), ""))
    programmed = condition_status(item, "Programmed")
    return [_name(item), text(item, "spec", "gatewayClassName"), shown, programmed, _age(item, now)]


def condition_status(item: Tree, name: str) -> str:
    """True, False, or Unknown as long as nobody has said."""
    found = (text(each, "status") for each in branches(item, "status", "conditions") if text(each, "type") == name)
    return next(found, "Unknown")


_OTHERS = Columns(("NAME", "AGE"), 2, _plain())
_COLUMNS: dict[str, Columns] = {
    "Pod": Columns(("NAME", "READY", "STATUS", "RESTARTS", "AGE", "IP", "NODE", "MESH"), 5, _pod),
    "Service": Columns(("NAME", "TYPE", "CLUSTER-IP", "EXTERNAL-IP", "PORT(S)", "AGE", "SELECTOR"), 6, _service),
    "Deployment": Columns(("NAME", "READY", "UP-TO-DATE", "AVAILABLE", "AGE", "CONTAINERS", "IMAGES", "SELECTOR"), 5, _deployment),
    "Node": Columns(("NAME", "STATUS", "AGE", "INTERNAL-IP", "POD-CIDR"), 3, _node),
    "Namespace": Columns(("NAME", "STATUS", "AGE"), 3, _plain(lambda item: text(item, "status", "phase", default="Active"))),
    "Gateway": Columns(("NAME", "CLASS", "ADDRESS", "PROGRAMMED", "AGE"), 5, _gateway),
    "GatewayClass": Columns(
        ("NAME", "CONTROLLER", "ACCEPTED", "AGE"),
        4,
        _plain(lambda item: text(item, "spec", "controllerName"), lambda item: condition_status(item, "Accepted")),
    ),
    "HTTPRoute": Columns(("NAME", "HOSTNAMES", "AGE"), 3, _plain(lambda item: ",".join(texts(item, "spec", "hostnames")))),
    "AuthorizationPolicy": Columns(("NAME", "ACTION", "AGE"), 3, _plain(lambda item: text(item, "spec", "action", default="ALLOW"))),
    "PeerAuthentication": Columns(("NAME", "MODE", "AGE"), 3, _plain(lambda item: text(item, "spec", "mtls", "mode", default="UNSET"))),
}


def description(pod: Tree, happenings: Sequence[Tree], now: datetime) -> str:
    """What `describe pod` shows."""
    lines = [
        ("Name", _name(pod)),
        ("Namespace", text(pod, "metadata", "namespace")),
        ("Service Account", text(pod, "spec", "serviceAccountName")),
        ("Node", f"{text(pod, 'spec', 'nodeName', default=NONE)}/{text(pod, 'status', 'hostIP')}"),
        ("Start Time", text(pod, "status", "startTime", default=NONE)),
        ("Labels", _pairs(labels_of(pod))),
        ("Annotations", _pairs(strings(pod, "metadata", "annotations"))),
        ("Status", pod_state(pod)),
        ("IPs", ", ".join(text(entry, "ip") for entry in branches(pod, "status", "podIPs")) or NONE),
        (
            "Controlled By",
            next((f"{text(owner, 'kind')}/{text(owner, 'name')}" for owner in branches(pod, "metadata", "ownerReferences")), NONE),
        ),
    ]
    shown = [f"{name + ':':<18}{value}" for name, value in lines]
    shown.append("Containers:")
    statuses = {text(status, "name"): status for status in branches(pod, "status", "containerStatuses")}
    for container in branches(pod, "spec", "containers"):
        shown += _container(container, statuses.get(text(container, "name"), {}))
    shown.append("Conditions:")
    shown += [f"  {text(each, 'type'):<18}{text(each, 'status')}" for each in branches(pod, "status", "conditions")]
    shown.append("Events:" if happenings else "Events:           <none>")
    shown += [f"  {age(text(each, 'when'), now):<8}{text(each, 'reason'):<24}{text(each, 'message')}" for each in happenings]
    return "\n".join(shown)


def _container(container: Tree, status: Tree) -> list[str]:
    ports = (
        ", ".join(f"{integer(port, 'containerPort')}/{text(port, 'protocol', default='TCP')}" for port in branches(container, "ports"))
        or NONE
    )
    state = next(iter(branch(status, "state")), "waiting")
    details = ", ".join(f"{key}={value}" for key, value in branch(status, "state", state).items())
    return [
        f"  {text(container, 'name')}:",
        f"    Image:          {text(container, 'image', default=NONE)}",
        f"    Command:        {' '.join([*texts(container, 'command'), *texts(container, 'args')]) or NONE}",
        f"    Ports:          {ports}",
        f"    State:          {state.capitalize()}{f' ({details})' if details else ''}",
        f"    Ready:          {at(status, 'ready') is True}",
        f"    Restart Count:  {integer(status, 'restartCount')}",
    ]


def as_list(items: Sequence[Tree]) -> Tree:
    """Several objects as one document."""
    return {"apiVersion": "v1", "kind": "List", "items": list(items)}


def names(items: Sequence[Tree]) -> str:
    """`-o name`."""
    return "\n".join(display(key_of(item)) for item in items)


def nothing_found(kind: str, namespace: str | None) -> str:
    """What kubectl says about an empty list."""
    return f"No resources found in {namespace} namespace." if namespace and KINDS[kind].namespaced else "No resources found"
