"""Workloads and services as the data plane sees them: plain values, addresses already canonical.

Addresses are the canonical text of `inet_ntop` (an IPv4-mapped IPv6 address is written as IPv4), so that what the kernel
reports can be looked up without parsing. Equality is by value; a changed object is a new object.
Source: Istio's workload API (`istio.workload`), cut to what L4 needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ztunnel.mesh.identity import SpiffeId


class Protocol(Enum):
    """How a workload is reached."""

    TCP = "TCP"
    HBONE = "HBONE"


@dataclass(frozen=True, slots=True)
class WaypointRef:
    """The waypoint in front of a service or a workload: a Gateway, and where it is."""

    name: str
    """`namespace/name` of the Gateway."""
    identity: SpiffeId
    """Whom to expect at an address that no workload of the mesh has."""
    addresses: tuple[str, ...] = ()
    hostnames: tuple[str, ...] = ()
    """Full names of its Service; looked up before the addresses."""
    problem: str = ""
    """Not empty: it cannot be used, and why."""
    fails_open: bool = False
    """With a problem: connections go on without it (Istio's way); otherwise none goes on."""


@dataclass(frozen=True, slots=True)
class Sandwich:
    """A foreign proxy as waypoint: the node agent ends the tunnel for it and passes plain bytes on.

    `protocol`: NONE, or PROXY (a PROXY header, version 2, with the original destination and the peer's identity in front).
    `port` 0: the port that the client addressed.
    """

    protocol: str
    port: int = 0


@dataclass(frozen=True, slots=True)
class Workload:
    """One pod."""

    uid: str
    """The pod's Kubernetes UID: never re-used, unlike its name and its addresses."""
    name: str
    namespace: str
    identity: SpiffeId
    node: str
    addresses: tuple[str, ...]
    protocol: Protocol = Protocol.TCP
    ready: bool = True
    host_network: bool = False
    cluster: str = "Kubernetes"
    canonical_name: str = ""
    canonical_revision: str = ""
    workload_type: str = "pod"
    """One of deployment, cronjob, pod, job."""
    workload_name: str = ""
    policies: tuple[str, ...] = ()
    """Keys (`Policy.key`) of the selector-scoped policies that select this workload."""
    waypoint: WaypointRef | None = None
    """For connections that address the workload itself."""
    waypoint_always: bool = False
    """Also for those that address a service which has no waypoint: it is the waypoint of the workload's service account, and for all."""
    sandwich: Sandwich | None = None
    """It is a foreign proxy that serves as a waypoint."""


@dataclass(frozen=True, slots=True)
class ServicePort:
    """One port of a service. `target_port` 0 means named: each endpoint says its own number."""

    port: int
    target_port: int
    name: str = ""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One workload behind a service; `ports` maps service port to the number on this workload."""

    workload_uid: str
    ports: tuple[tuple[int, int], ...]
    ready: bool = True


@dataclass(frozen=True, slots=True)
class Service:
    """One service. Without `vips` it is headless: clients dial its endpoints' own addresses."""

    name: str
    namespace: str
    hostname: str
    vips: tuple[str, ...]
    ports: tuple[ServicePort, ...]
    endpoints: tuple[Endpoint, ...] = ()
    waypoint: WaypointRef | None = None
    canary: WaypointRef | None = None
    """A second waypoint, for `canary_weight` percent of connections."""
    canary_weight: int = 0
    passthrough: bool = False
    """Without a waypoint, connections go on to where they were going: a Service without a selector and a ServiceEntry with resolution NONE
    do not say what is behind them."""
    declared: bool = False
    """By a ServiceEntry, whose names and addresses are its author's word; a Service's are the cluster's."""

    @property
    def key(self) -> str:
        """`namespace/hostname`, the name that a delta removes it by."""
        return f"{self.namespace}/{self.hostname}"


def waypoint_text(waypoint: WaypointRef | None) -> str:
    """A waypoint as listings have it: its name, and what becomes of connections when it cannot be used. Empty: none."""
    if waypoint is None:
        return ""
    return waypoint.name if not waypoint.problem else f"{waypoint.name} ({'skipped' if waypoint.fails_open else 'refused'}: not ready)"
