"""From Kubernetes objects to the mesh: workloads, services, policies and which pods to capture. Pure, and a function of the
set of objects only: the order in which they arrived does not show in the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from ztunnel.mesh.delta import Delta
from ztunnel.mesh.identity import SpiffeId
from ztunnel.mesh.rules import Policy
from ztunnel.mesh.workloads import Service, Workload


@dataclass(frozen=True, slots=True)
class MeshOptions:
    """What the manifests do not say."""

    trust_domain: str = "cluster.local"
    root_namespace: str = "istio-system"
    """Policies without a selector in this namespace apply to the whole mesh."""
    cluster: str = "Kubernetes"
    cluster_domain: str = "cluster.local"
    hbone_needs_annotation: bool = False
    """True: a pod is dialled through HBONE only once its node has annotated it as captured (a cluster with an API server that can
    be told). False: as soon as it is wanted (files, where there is nobody to annotate)."""


@dataclass(frozen=True, slots=True)
class Capture:
    """Whether one pod's traffic is to be captured, and why."""

    uid: str
    name: str
    namespace: str
    node: str
    addresses: tuple[str, ...]
    identity: SpiffeId
    wanted: bool
    strict: bool
    """Plaintext to this pod is refused on every port (its effective PeerAuthentication is STRICT without exceptions)."""
    reason: str


@dataclass(frozen=True, slots=True)
class MeshState:
    """All that is known, by key. The mappings are not changed after construction."""

    workloads: dict[str, Workload] = field(default_factory=dict)
    """By pod UID."""
    services: dict[str, Service] = field(default_factory=dict)
    """By `Service.key`."""
    policies: dict[str, Policy] = field(default_factory=dict)
    """By `Policy.key`."""
    captures: dict[str, Capture] = field(default_factory=dict)
    """By pod UID."""


_Value = TypeVar("_Value")


def diff(old: MeshState, new: MeshState) -> Delta:
    """What turns an index that holds `old` into one that holds `new`. Captures are not part of it: the node reads them whole."""
    return Delta(
        workloads=_upserts(old.workloads, new.workloads),
        services=_upserts(old.services, new.services),
        policies=_upserts(old.policies, new.policies),
        removed_workloads=_removals(old.workloads, new.workloads),
        removed_services=_removals(old.services, new.services),
        removed_policies=_removals(old.policies, new.policies),
    )


def _upserts(old: Mapping[str, _Value], new: Mapping[str, _Value]) -> tuple[_Value, ...]:
    return tuple(value for key, value in sorted(new.items()) if old.get(key) != value)


def _removals(old: Mapping[str, _Value], new: Mapping[str, _Value]) -> tuple[str, ...]:
    return tuple(sorted(old.keys() - new.keys()))
