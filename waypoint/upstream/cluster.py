"""A cluster at work: which endpoint a request or connection goes to, and how much may go there.

Endpoints that stay keep their state over changes of configuration. What is chosen from (priorities, panic, rings) is made when it is asked
for after a change of endpoints or of their health, not for each request. Endpoints that are not ready are never chosen, not even in panic:
panic is about those that were ejected.
"""

from __future__ import annotations

from enum import Enum

from waypoint.upstream.balancers import Picker, Randrange, picker
from waypoint.upstream.breakers import Breakers
from waypoint.upstream.endpoints import EndpointAtWork
from waypoint.upstream.localities import Place, priorities, shares
from waypoint.upstream.outcome import Outcome
from waypoint.upstream.outlier import OutlierDetector
from waypoint.upstream.priorities import PANIC, loads
from waypoint.upstream.rings import Maglev, Ring
from ztunnel.mesh.l7.clusters import Balancer, Cluster, Endpoint, Locality, Resolution

_REPICKS = 5
"""Envoy's `host_selection_retry_max_attempts` as Istio sets it."""
_PRIORITY_TRIES = 2
"""Istio's update frequency of `retryRemoteLocalities`: after so many tries their priorities are left out."""
_ORIGINALS = 1024
"""Original destinations that are remembered."""
_MOST_NAMES = 256
"""Addresses of a DNS name that are used."""


class Shortage(Enum):
    """Why there is no endpoint. Value: for the log."""

    NO_HEALTHY = "no healthy upstream"
    REFUSED = "its configuration was refused"


class PickContext:
    """What a choice depends on beside the cluster. One may serve all tries of a request: `tried` grows."""

    __slots__ = ("avoids", "destination", "key", "remote", "tried")

    def __init__(
        self, key: int | None = None, destination: tuple[str, int] | None = None, *, remote: bool = False, avoids: bool = True
    ) -> None:
        """
        Args:
            key: the request's consistent hash.
            destination: what the client dialled, for clusters that forward there.
            remote: retries go to other localities (`retryRemoteLocalities`).
            avoids: retries go elsewhere than the tries before (`retryIgnorePreviousHosts`).
        """
        self.key = key
        self.destination = destination
        self.remote = remote
        self.avoids = avoids
        self.tried: list[EndpointAtWork] = []


class _Level:
    """One priority: endpoints to choose from, per locality where shares are configured."""

    __slots__ = ("members", "pickers", "total", "untils")

    def __init__(self, members: frozenset[EndpointAtWork], groups: list[tuple[float, Picker]]) -> None:
        self.members = members
        self.pickers = [each for _, each in groups]
        self.untils: list[float] = []
        self.total = 0.0
        for weight, _ in groups:
            self.total += weight
            self.untils.append(self.total)


class ClusterAtWork:
    """One cluster. Single-threaded; `now` is monotonic seconds everywhere."""

    __slots__ = (
        "_by_place",
        "_detector",
        "_dirty",
        "_here",
        "_levels",
        "_loads",
        "_only",
        "_originals",
        "_randrange",
        "_resolved",
        "_sizes",
        "_warm_until",
        "breakers",
        "cluster",
        "endpoints",
        "hashed",
    )

    def __init__(self, cluster: Cluster, here: Place, now: float, randrange: Randrange) -> None:
        """
        Args:
            randrange: uniform integer in [0, n).
        """
        self._here = here
        self._randrange = randrange
        self._by_place: dict[tuple[str, int, str], EndpointAtWork] = {}
        self._originals: dict[tuple[str, int], EndpointAtWork] = {}
        self._resolved: dict[tuple[str, int], tuple[str, ...]] = {}
        self._levels: list[_Level] = []
        self._loads: list[int] = []
        self._sizes: list[tuple[int, int]] = []
        self._only: Picker | None = None
        self._dirty = True
        self._warm_until = 0.0
        self._detector: OutlierDetector | None = None
        self.cluster = cluster
        self.endpoints: list[EndpointAtWork] = []
        """Those that are ready, ejected ones included."""
        self.breakers = Breakers(cluster.limits)
        self.hashed = False
        """Whether `PickContext.key` matters."""
        self._adopt(cluster, now, settings_changed=True)

    def update(self, cluster: Cluster, now: float) -> list[EndpointAtWork]:
        """Takes over a new configuration of the same cluster. Returns the endpoints that are gone: their connections are to be drained."""
        before = self.cluster
        self.cluster = cluster
        self.breakers.limits = cluster.limits
        self._resolved = {name: found for name, found in self._resolved.items() if name in cluster.names}
        return self._adopt(cluster, now, settings_changed=before.outlier != cluster.outlier)

    def resolved(self, name: tuple[str, int], addresses: tuple[str, ...], now: float) -> list[EndpointAtWork]:
        """Takes over what DNS said of one of `names`; returns as `update`. A failed lookup is not told here: what was known stays."""
        self._resolved[name] = addresses[:_MOST_NAMES]
        return self._adopt(self.cluster, now, settings_changed=False)

    def pick(self, context: PickContext, now: float) -> EndpointAtWork | Shortage:
        """The endpoint for the next try, not one of those tried already if that can be helped."""
        if self.cluster.refused:
            return Shortage.REFUSED
        if context.destination is not None and (
            self.cluster.resolution is Resolution.ORIGINAL or self.cluster.balancing.balancer is Balancer.PASSTHROUGH
        ):
            return self._original(context.destination, now)
        if self._dirty or (self._warm_until and now >= self._warm_until):
            self._rebuild(now)
        if self._only is not None and not context.tried:
            return self._only.pick(context.key, now)
        if not self._levels:
            return Shortage.NO_HEALTHY
        return self._pick_again(context, now) if context.tried and not self.hashed else self._pick_once(self._loads, context.key, now)

    def done(self, endpoint: EndpointAtWork, outcome: Outcome, now: float) -> None:
        """Tells what came of a try (of a TCP connection: `Outcome(200)` once it stands, or its reset); feeds outlier detection."""
        if self._detector is not None and self._detector.judge(endpoint, outcome, self.endpoints, now):
            self._dirty = True

    def sweep(self, now: float) -> None:
        """Lets ejected endpoints come back. To be called now and then, at least once in ten seconds."""
        if self._detector is not None and self._detector.sweep(self.endpoints, now):
            self._dirty = True

    # ------------------------------------------------------------------------------------------------------- choosing

    def _pick_once(self, load: list[int], key: int | None, now: float) -> EndpointAtWork | Shortage:
        at = 0
        if len(load) > 1:
            # a key chooses its priority too, else it would move between endpoints
            point = (key if key is not None else self._randrange(100)) % 100
            while at < len(load) - 1 and point >= load[at]:
                point -= load[at]
                at += 1
        level = self._levels[at]
        pickers = level.pickers
        if not pickers:
            return Shortage.NO_HEALTHY
        if len(pickers) == 1:
            return pickers[0].pick(key, now)
        share = (key if key is not None else self._randrange(2**32)) % 2**32 / 2**32 * level.total
        for place in range(len(pickers) - 1):
            if share < level.untils[place]:
                return pickers[place].pick(key, now)
        return pickers[-1].pick(key, now)

    def _pick_again(self, context: PickContext, now: float) -> EndpointAtWork | Shortage:
        load = self._loads_elsewhere(context) if context.remote else self._loads
        chosen = self._pick_once(load, context.key, now)
        for _ in range(_REPICKS if context.avoids else 0):
            if isinstance(chosen, Shortage) or chosen not in context.tried:
                break
            chosen = self._pick_once(load, context.key, now)
        return chosen

    def _loads_elsewhere(self, context: PickContext) -> list[int]:
        """The loads without the priorities that were tried; as they are when every one was."""
        counted = len(context.tried) // _PRIORITY_TRIES * _PRIORITY_TRIES
        tried = context.tried[:counted]
        left = [not any(each in level.members for each in tried) for level in self._levels]
        if all(left) or not any(healthy and free for (healthy, _), free in zip(self._sizes, left, strict=True)):
            return self._loads
        sizes = [(healthy, total) if free else (0, 0) for (healthy, total), free in zip(self._sizes, left, strict=True)]
        return loads(sizes, 0)[0]

    def _original(self, destination: tuple[str, int], now: float) -> EndpointAtWork:
        found = self._originals.pop(destination, None)
        if found is None:
            found = self._known_at(destination) or EndpointAtWork(Endpoint(destination[0], destination[1]), now)
            if len(self._originals) >= _ORIGINALS:
                del self._originals[next(iter(self._originals))]
        self._originals[destination] = found
        return found

    def _known_at(self, destination: tuple[str, int]) -> EndpointAtWork | None:
        """An endpoint that the configuration knows more of (its identity, HBONE), by its address."""
        for each in self.endpoints:
            if (each.endpoint.address, each.endpoint.port) == destination:
                return each
        return None

    # ------------------------------------------------------------------------------------------- what is chosen from

    def _adopt(self, cluster: Cluster, now: float, *, settings_changed: bool) -> list[EndpointAtWork]:
        if settings_changed:
            self._detector = None if cluster.outlier is None else OutlierDetector(cluster.outlier, now)
        self.hashed = cluster.balancing.balancer in (Balancer.RING_HASH, Balancer.MAGLEV)
        endpoints = list(cluster.endpoints)
        if cluster.resolution is Resolution.DNS:
            endpoints += [Endpoint(address, name[1]) for name in cluster.names for address in self._resolved.get(name, ())]
        kept: dict[tuple[str, int, str], EndpointAtWork] = {}
        for endpoint in endpoints:
            place = (endpoint.address, endpoint.port, endpoint.workload_uid)
            known = self._by_place.get(place)
            if known is None or not endpoint.healthy:
                # one that was not ready joins anew when it is: it is as cold as a newcomer
                known = EndpointAtWork(endpoint, now)
            else:
                known.endpoint = endpoint
                known.weight = max(1, endpoint.weight)
                if cluster.outlier is None:
                    known.ejected = False
            if endpoint.healthy:
                kept[place] = known
        before = {*self._by_place.values(), *self._originals.values()}
        self._by_place = kept
        self.endpoints = list(kept.values())
        self._originals = {
            destination: each for destination, each in self._originals.items() if (self._known_at(destination) or each) is each
        }
        self._dirty = True
        return list(before - {*self.endpoints, *self._originals.values()})

    def _rebuild(self, now: float) -> None:
        cluster = self.cluster
        self._dirty = False
        self._warm_until = self._end_of_warmup(now)
        if not self.endpoints:
            self._levels, self._loads, self._sizes, self._only = [], [], [], None
            return
        configured = [each.endpoint for each in self.endpoints]
        places = priorities(cluster.balancing.locality, configured, self._here, outliers=cluster.outlier is not None)
        members: list[list[EndpointAtWork]] = [[] for _ in range(max(places) + 1)]
        for endpoint, place in zip(self.endpoints, places, strict=True):
            members[place].append(endpoint)
        self._sizes = [(sum([not each.ejected for each in level]), len(level)) for level in members]
        threshold = PANIC if cluster.outlier is None else cluster.outlier.min_health_percent
        self._loads, panic = loads(self._sizes, threshold)
        self._levels = []
        for level, frantic in zip(members, panic, strict=True):
            usable = level if frantic else [each for each in level if not each.ejected]
            self._levels.append(_Level(frozenset(level), self._groups(level, usable, now)))
        first = self._levels[0]
        self._only = first.pickers[0] if self._loads[0] == 100 and len(first.pickers) == 1 else None

    def _groups(self, level: list[EndpointAtWork], usable: list[EndpointAtWork], now: float) -> list[tuple[float, Picker]]:
        if not usable:
            return []
        sizes: dict[Locality, int] = {}
        for each in level:
            sizes[each.endpoint.locality] = sizes.get(each.endpoint.locality, 0) + each.weight
        configured = shares(self.cluster.balancing.locality, list(sizes.items()), self._here.locality)
        if configured is None:
            return [(1.0, self._picker(usable, now))]
        groups: list[tuple[float, Picker]] = []
        for locality, share in configured.items():
            there = [each for each in usable if each.endpoint.locality == locality]
            whole = sum([each.endpoint.locality == locality for each in level])
            # Envoy's locality weighted balancing: overprovisioned health within the locality
            weight = share * min(1.0, 1.4 * len(there) / whole)
            if weight > 0:
                groups.append((weight, self._picker(there, now)))
        return groups

    def _picker(self, usable: list[EndpointAtWork], now: float) -> Picker:
        balancing = self.cluster.balancing
        if self.hashed:
            # in one order whatever the order of the configuration: other waypoints then agree
            usable = sorted(usable, key=_key)
            if balancing.balancer is Balancer.MAGLEV:
                return Maglev(usable, self._randrange, balancing.table_size)
            return Ring(usable, self._randrange, balancing.ring_minimum)
        return picker(balancing.balancer, usable, self._randrange, balancing.warmup if self._warm_until else None, now)

    def _end_of_warmup(self, now: float) -> float:
        """When the first newcomer's window ends; 0 when nobody is new."""
        warmup = self.cluster.balancing.warmup
        if warmup is None:
            return 0.0
        ends = [each.joined + warmup.seconds for each in self.endpoints if each.joined + warmup.seconds > now]
        return min(ends, default=0.0)


def _key(endpoint: EndpointAtWork) -> str:
    return endpoint.key
