"""Near endpoints first: priorities of endpoints by their locality or labels, and shares of localities.

Source: Istio `loadbalancer.go` (`localityLbSetting`), Kubernetes `trafficDistribution`. Failover acts only with outlier detection or where
a Service asks for it; `distribute` acts always.
"""

from __future__ import annotations

from collections.abc import Sequence

from ztunnel.mesh.l7.clusters import Endpoint, Locality, LocalitySettings

_REGION = "topology.kubernetes.io/region"
_ZONE = "topology.kubernetes.io/zone"
_SUBZONE = "topology.istio.io/subzone"
_HOST = "kubernetes.io/hostname"
_FORCED = {
    "PreferClose": (_REGION, _ZONE, _SUBZONE),
    "PreferSameZone": (_REGION, _ZONE, _SUBZONE),
    "PreferSameNode": (_REGION, _ZONE, _SUBZONE, _HOST),
}


class Place:
    """Where this proxy is. `labels`: its pod's."""

    __slots__ = ("labels", "locality", "node")

    def __init__(self, locality: Locality, node: str = "", labels: dict[str, str] | None = None) -> None:
        self.locality = locality
        self.node = node
        self.labels = labels or {}

    def value(self, key: str) -> str:
        return _value(key, self.locality, self.node, self.labels)


def priorities(settings: LocalitySettings, endpoints: Sequence[Endpoint], here: Place, *, outliers: bool) -> list[int]:
    """Each endpoint's priority, 0 first, without gaps. All 0 where failover does not act.

    Args:
        outliers: the cluster has outlier detection.
    """
    none = [0] * len(endpoints)
    if not settings.enabled or settings.distribute:
        return none
    if settings.failover_priority and outliers:
        raw = [_by_labels(settings.failover_priority, each, here) for each in endpoints]
    elif settings.forced in _FORCED:
        raw = [_by_labels(_FORCED[settings.forced], each, here) for each in endpoints]
    elif outliers and here.locality.region:
        raw = [_by_locality(each.locality, here.locality, settings.failover) for each in endpoints]
    else:
        return none
    places = {value: place for place, value in enumerate(sorted(set(raw)))}
    return [places[value] for value in raw]


def _by_locality(there: Locality, here: Locality, failover: Sequence[tuple[str, str]]) -> int:
    if there.region == here.region:
        if there.zone != here.zone:
            return 2
        return 0 if there.subzone == here.subzone else 1
    for origin, target in failover:
        if origin == here.region:
            return 3 if target == there.region else 4
    return 3


def _by_labels(keys: Sequence[str], endpoint: Endpoint, here: Place) -> int:
    labels = dict(endpoint.labels)
    for place, key in enumerate(keys):
        name, equals, wanted = key.partition("=")
        if _value(name, endpoint.locality, endpoint.node, labels) != (wanted if equals else here.value(name)):
            return len(keys) - place
    return 0


def _value(key: str, locality: Locality, node: str, labels: dict[str, str]) -> str:
    if key == _REGION:
        return locality.region
    if key == _ZONE:
        return locality.zone
    if key == _SUBZONE:
        return locality.subzone
    if key == _HOST:
        return node
    return labels.get(key, "")


def shares(settings: LocalitySettings, localities: Sequence[tuple[Locality, int]], here: Locality) -> dict[Locality, float] | None:
    """The weight of each locality's endpoints together; localities without one get nothing. None: no `distribute` for this place.

    Args:
        localities: with the sum of their endpoints' weights.
    """
    if not settings.enabled:
        return None
    for origin, targets in settings.distribute:
        if _covers(origin, here):
            return _distributed(targets, localities)
    return None


def _distributed(targets: Sequence[tuple[str, int]], localities: Sequence[tuple[Locality, int]]) -> dict[Locality, float]:
    weights: dict[Locality, float] = {}
    # the most specific target first: a locality belongs to one only
    for pattern, percent in sorted(targets, key=lambda each: each[0].rstrip("*").count("/"), reverse=True):
        mine = [(locality, size) for locality, size in localities if locality not in weights and _covers(pattern, locality)]
        total = sum(size for _, size in mine)
        for locality, size in mine:
            weights[locality] = percent * size / total
    return weights


def _covers(pattern: str, locality: Locality) -> bool:
    """`region/zone/subzone`; what is left out at the end, and `*`, is any."""
    if pattern in ("", "*"):
        return True
    for wanted, given in zip(pattern.split("/"), (locality.region, locality.zone, locality.subzone), strict=False):
        if wanted == "*":
            return True
        if wanted != given:
            return False
    return True
