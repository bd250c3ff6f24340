"""What objects are told of themselves: conditions, as values. Who writes them adds the observed generation and the time of transition."""

from __future__ import annotations

from dataclasses import dataclass

from ztunnel.mesh.conditions import Condition
from ztunnel.mesh.manifests.references import ParentRef


@dataclass(frozen=True, slots=True)
class ParentStatus:
    """What a route is told for one of its parents."""

    parent: ParentRef
    conditions: tuple[Condition, ...]
    ingress: bool = False
    """The parent is an ingress gateway, which another controller stands for than for waypoints."""


@dataclass(frozen=True, slots=True)
class RouteStatus:
    """`status.parents` of a route. Parents of other controllers are not in it."""

    parents: tuple[ParentStatus, ...]


@dataclass(frozen=True, slots=True)
class ObjectStatus:
    """`status.conditions` of an object that has no parents (VirtualService, DestinationRule, ServiceEntry)."""

    conditions: tuple[Condition, ...]
