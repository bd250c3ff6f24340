"""What the control API shows: one frozen row per thing, and the interface that the daemon implements to provide them.

The JSON form is an interface for scripts: `{"version": 1, "node": …, "items": […]}`, keys are these field names, additions only.
Times are RFC 3339 in UTC, durations and ages seconds. Rows are sorted by their first fields, so that two listings can be compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

from ztunnel.mesh.rules import Policy
from ztunnel.mesh.workloads import Service, Workload, waypoint_text

VERSION = 1


@dataclass(frozen=True, slots=True, order=True)
class PodRow:
    """A pod of this node. Four answers that must agree: what was asked for, what was done, what the kernel has, what is seen."""

    namespace: str
    name: str
    uid: str
    addresses: tuple[str, ...]
    labelled: bool
    """Its labels or its namespace's ask for the mesh."""
    enrolled: bool
    """Listeners stand and the rules were written."""
    captured: bool
    """The rules were there at the last check."""
    flowing: bool
    """Connections of it went through the proxy."""
    identity: str
    problem: str = ""
    """Why the answers differ, empty when they agree."""
    reason: str = ""
    """Why it is wanted in the mesh or not."""


@dataclass(frozen=True, slots=True, order=True)
class WorkloadRow:
    """A workload of the mesh, on any node."""

    namespace: str
    name: str
    uid: str
    addresses: tuple[str, ...]
    node: str
    protocol: str
    identity: str
    ready: bool
    service: str
    """Canonical service."""
    policies: tuple[str, ...]
    waypoint: str = ""
    """As a service's."""
    """Policies that select it by label."""


@dataclass(frozen=True, slots=True, order=True)
class ServiceRow:
    """A service."""

    namespace: str
    name: str
    hostname: str
    vips: tuple[str, ...]
    """Empty: headless."""
    ports: tuple[str, ...]
    """`port→target`; the target is empty when it is named and each endpoint says its own."""
    endpoints: int
    ready_endpoints: int
    waypoint: str = ""
    """`namespace/name`; with a remark when it cannot be used. Empty: none."""


@dataclass(frozen=True, slots=True, order=True)
class PolicyRow:
    """A policy in force, or what stands in the place of a refused one."""

    namespace: str
    name: str
    kind: str
    action: str
    scope: str
    rules: int
    dry_run: bool
    reason: str
    """Not empty: it is in force for this reason instead of as written."""


@dataclass(frozen=True, slots=True, order=True)
class CertificateRow:
    """The certificate of one identity that this node needs."""

    identity: str
    state: str
    """Valid, Failing (valid, last renewal failed), Pending, Unavailable."""
    not_before: str
    not_after: str
    seconds_left: int
    serial: str
    """Hexadecimal."""
    error: str


@dataclass(frozen=True, slots=True)
class ConnectionRow:
    """A live connection of a pod of this node. Empty text: not known or does not apply."""

    id: str
    direction: str
    """`outbound` or `inbound`, from the pod's view."""
    protocol: str
    """`HBONE` or `TCP`: what it is carried in between the nodes. `LOCAL`: to a neighbour on this node, without a tunnel."""
    pod: str
    """`namespace/name`."""
    source: str
    source_identity: str
    destination: str
    """What was dialled, address and port."""
    target: str
    """Where it was sent, address and port."""
    service: str
    peer_identity: str
    bytes_sent: int
    """By the pod, as in the log."""
    bytes_received: int
    age_seconds: float
    policy: str
    """The policy that allowed it."""
    state: str
    """`connecting`, `open` or `half-closed`."""
    waypoint: str = ""
    """`namespace/name` of the waypoint that it was sent to."""


@dataclass(frozen=True, slots=True)
class TunnelRow:
    """A live tunnel, either way."""

    id: str
    direction: str
    pod: str
    peer: str
    peer_identity: str
    streams: int
    bytes_sent: int
    bytes_received: int
    age_seconds: float
    records: str
    state: str


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """Something that a person should look at."""

    kind: str
    """`manifest`, `certificate`, `pod`, `cni`, `probes` or `worker`."""
    object: str
    file: str
    field: str
    reason: str


@dataclass(frozen=True, slots=True)
class Status:
    """The agent in one look."""

    node: str
    agent_version: str
    trust_domain: str
    age_seconds: float
    ready: bool
    pending: tuple[str, ...]
    """What readiness waits for."""
    worker: str
    """State of the data plane: `running`, `restarting`, `in-process`, `draining`."""
    worker_restarts: int
    pods: tuple[PodRow, ...]
    certificates: tuple[CertificateRow, ...]
    problems: tuple[Problem, ...]


class AdminView(Protocol):
    """What the daemon can be asked. The listings of live things go to the data plane, hence `async`; each has a deadline."""

    def status(self) -> Status: ...

    def workloads(self) -> tuple[WorkloadRow, ...]: ...

    def services(self) -> tuple[ServiceRow, ...]: ...

    def policies(self) -> tuple[PolicyRow, ...]: ...

    def certificates(self) -> tuple[CertificateRow, ...]: ...

    async def connections(self) -> tuple[ConnectionRow, ...]: ...

    async def tunnels(self) -> tuple[TunnelRow, ...]: ...


def workload_row(workload: Workload) -> WorkloadRow:
    """As shown."""
    return WorkloadRow(
        namespace=workload.namespace,
        name=workload.name,
        uid=workload.uid,
        addresses=workload.addresses,
        node=workload.node,
        protocol=workload.protocol.value,
        identity=workload.identity.uri,
        ready=workload.ready,
        service=workload.canonical_name,
        policies=workload.policies,
        waypoint=waypoint_text(workload.waypoint),
    )


def service_row(service: Service) -> ServiceRow:
    """As shown."""
    return ServiceRow(
        namespace=service.namespace,
        name=service.name,
        hostname=service.hostname,
        vips=service.vips,
        ports=tuple(f"{port.port}→{port.target_port or 'named'}" for port in service.ports),
        endpoints=len(service.endpoints),
        ready_endpoints=sum(endpoint.ready for endpoint in service.endpoints),
        waypoint=waypoint_text(service.waypoint),
    )


def policy_row(policy: Policy) -> PolicyRow:
    """As shown."""
    return PolicyRow(
        namespace=policy.namespace,
        name=policy.name,
        kind=policy.kind,
        action=policy.action.value,
        scope=policy.scope.value,
        rules=len(policy.rules),
        dry_run=policy.dry_run,
        reason=policy.reason,
    )


def timestamp(seconds: float) -> str:
    """RFC 3339 in UTC, to the second; empty for 0, which means never."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ") if seconds else ""
