"""What each listing shows: names, columns, order. Data only."""

from __future__ import annotations

from collections.abc import Callable

from ztunnel.cli.output import Column, Kind, Row, age, duration, number, shown, text, volume


def _key(*names: str) -> Callable[[Row], tuple[str, ...]]:
    return lambda row: tuple(str(row.get(name, "")) for name in names)


def _namespace(row: Row) -> str:
    return str(row.get("namespace", ""))


def _pods_namespace(row: Row) -> str:
    return str(row.get("pod", "")).partition("/")[0]


def _identitys_namespace(row: Row) -> str:
    _, _, rest = str(row.get("identity", "")).partition("/ns/")
    return rest.partition("/")[0]


PODS = Kind(
    "pod",
    "pods",
    (
        Column("NAMESPACE", text("namespace")),
        Column("POD", text("name")),
        Column("LABELLED", text("labelled")),
        Column("ENROLLED", text("enrolled")),
        Column("CAPTURED", text("captured")),
        Column("FLOWING", text("flowing")),
        Column("PROBLEM", text("problem")),
        Column("ADDRESSES", text("addresses"), wide=True),
        Column("IDENTITY", text("identity"), wide=True),
        Column("UID", text("uid"), wide=True),
        Column("REASON", text("reason"), wide=True),
    ),
    _key("namespace", "name", "uid"),
    _namespace,
)

CONNECTIONS = Kind(
    "connection",
    "connections",
    (
        Column("POD", text("pod")),
        Column("DIRECTION", text("direction")),
        Column("PROTOCOL", text("protocol")),
        Column("SOURCE", text("source")),
        Column("DESTINATION", text("destination")),
        Column("TARGET", text("target")),
        Column("SERVICE", text("service")),
        Column("SENT", volume("bytes_sent")),
        Column("RECEIVED", volume("bytes_received")),
        Column("AGE", age()),
        Column("SOURCE IDENTITY", text("source_identity"), wide=True),
        Column("PEER IDENTITY", text("peer_identity"), wide=True),
        Column("WAYPOINT", text("waypoint"), wide=True),
        Column("POLICY", text("policy"), wide=True),
        Column("STATE", text("state"), wide=True),
        Column("ID", text("id"), wide=True),
    ),
    _key("pod", "direction", "source", "id"),
    _pods_namespace,
)

TUNNELS = Kind(
    "tunnel",
    "tunnels",
    (
        Column("POD", text("pod")),
        Column("DIRECTION", text("direction")),
        Column("PEER", text("peer")),
        Column("PEER IDENTITY", text("peer_identity")),
        Column("STREAMS", text("streams")),
        Column("SENT", volume("bytes_sent")),
        Column("RECEIVED", volume("bytes_received")),
        Column("AGE", age()),
        Column("RECORDS", text("records"), wide=True),
        Column("STATE", text("state"), wide=True),
        Column("ID", text("id"), wide=True),
    ),
    _key("pod", "direction", "peer", "id"),
    _pods_namespace,
)

WORKLOADS = Kind(
    "workload",
    "workloads",
    (
        Column("NAMESPACE", text("namespace")),
        Column("NAME", text("name")),
        Column("ADDRESSES", text("addresses")),
        Column("NODE", text("node")),
        Column("PROTOCOL", text("protocol")),
        Column("READY", text("ready")),
        Column("WAYPOINT", text("waypoint"), wide=True),
        Column("SERVICE", text("service"), wide=True),
        Column("IDENTITY", text("identity"), wide=True),
        Column("POLICIES", text("policies"), wide=True),
        Column("UID", text("uid"), wide=True),
    ),
    _key("namespace", "name", "uid"),
    _namespace,
    mesh_wide=True,
)

SERVICES = Kind(
    "service",
    "services",
    (
        Column("NAMESPACE", text("namespace")),
        Column("NAME", text("name")),
        Column("VIPS", lambda row: shown(row.get("vips") or "headless")),
        Column("PORTS", text("ports")),
        Column("ENDPOINTS", lambda row: f"{number(row, 'ready_endpoints'):.0f}/{number(row, 'endpoints'):.0f}"),
        Column("WAYPOINT", lambda row: shown(row.get("waypoint") or "none")),
        Column("HOSTNAME", text("hostname"), wide=True),
    ),
    _key("namespace", "name"),
    _namespace,
    mesh_wide=True,
)

POLICIES = Kind(
    "policy",
    "policies",
    (
        Column("NAMESPACE", text("namespace")),
        Column("NAME", text("name")),
        Column("KIND", text("kind")),
        Column("ACTION", lambda row: f"{shown(row.get('action'))}{' (dry run)' if row.get('dry_run') else ''}"),
        Column("SCOPE", text("scope")),
        Column("RULES", text("rules")),
        Column("REASON", text("reason")),
    ),
    _key("namespace", "name", "kind"),
    _namespace,
    mesh_wide=True,
)

CERTIFICATES = Kind(
    "certificate",
    "certificates",
    (
        Column("IDENTITY", text("identity")),
        Column("STATE", text("state")),
        Column("LEFT", lambda row: duration(number(row, "seconds_left")) if row.get("not_after") else "<none>"),
        Column("NOT AFTER", text("not_after")),
        Column("SERIAL", text("serial")),
        Column("ERROR", text("error")),
        Column("NOT BEFORE", text("not_before"), wide=True),
    ),
    _key("identity"),
    _identitys_namespace,
)
