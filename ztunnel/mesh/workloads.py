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

    @property
    def key(self) -> str:
        """`namespace/hostname`, the name that a delta removes it by."""
        return f"{self.namespace}/{self.hostname}"
