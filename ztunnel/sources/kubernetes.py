"""Follows an API server and hands on the mesh that its objects add up to.

One reflector per kind (`kube.reflector`). The sink is told nothing until every kind that is installed was read whole: a mesh without
some of its policies would let through what they forbid. From then on it is told what changed, a few milliseconds' worth at a
time, and at least four times as long apart as it takes to say: thousands of changes a second cost a fifth of a CPU, not all of it.

Invariants: while the API server is away, or tells nonsense, everything stays in force; an object that is refused leaves its last good
version in force, and a policy that never was good denies (`sources.objects`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import trio

from ztunnel.kube.client import KubeClient
from ztunnel.kube.discovery import Discovery, Kind
from ztunnel.kube.reflector import Body, Name, Pace, Phase, Reflector
from ztunnel.mesh.derive import OF_USE, Derivation, MeshOptions
from ztunnel.mesh.manifests.mesh_config import CONFIG_MAP
from ztunnel.mesh.manifests.metadata import ObjectKey
from ztunnel.mesh.manifests.parse import ALL_READ, KubeObject, kinds
from ztunnel.runtime.logs import fields
from ztunnel.sources.objects import Judged, Refusal, Sink, judge_one, last_good

log = logging.getLogger(__name__)

PLACE = "kubernetes"
"""What refusals name in the place of a file."""
QUIET_SECONDS = 0.005
"""Changes are gathered this long: an API server sends what belongs together at once."""
_SHARE = 4
"""Times that a change took to be told must pass before the next is told."""
_REMIND_SECONDS = 30.0
_KEPT = "what was known before stays in force"

MESH_KINDS = tuple(Kind(group, kind, versions) for group, kind, versions in kinds(OF_USE))
"""What a mesh is derived from."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """One kind to read, in all namespaces or in one, all objects or the one of a name."""

    kind: Kind
    namespace: str = ""
    name: str = ""


AGENT = tuple(Wanted(kind) for kind in MESH_KINDS)
"""What a node agent reads."""


def proxy(namespace: str, root_namespace: str) -> tuple[Wanted, ...]:
    """What an L7 proxy reads: the mesh, everything that routes, protects or observes, and the secrets and texts of its own namespace only.

    Args:
        root_namespace: where MeshConfig is.
    """
    all_of_them = [Wanted(Kind(group, kind, versions)) for group, kind, versions in kinds(ALL_READ)]
    wanted = [replace(each, namespace=namespace) if str(each.kind) in ("Secret", "ConfigMap") else each for each in all_of_them]
    if root_namespace != namespace:
        wanted += [replace(each, namespace=root_namespace, name=CONFIG_MAP) for each in all_of_them if str(each.kind) == "ConfigMap"]
    return tuple(wanted)


@dataclass(slots=True)
class _Entry:
    """What is known of one object of the API server."""

    judged: Judged | None
    refusal: Refusal | None


@dataclass(slots=True)
class _Objects:
    """All objects of all kinds, and what is to be told of them."""

    in_force: dict[ObjectKey, KubeObject] = field(default_factory=dict)
    refusals: dict[ObjectKey, Refusal] = field(default_factory=dict)
    changes: dict[ObjectKey, KubeObject | None] = field(default_factory=dict)
    """Since they were last taken."""
    refusals_changed: bool = False
    on_change: Callable[[], None] = lambda: None

    def put(self, entry: _Entry) -> ObjectKey | None:
        """An object is now so. Returns its key; None for one that nobody can tell which it is."""
        if entry.judged is None:
            return None
        key = entry.judged.key
        item = entry.judged.item or last_good(key, self.in_force) or entry.judged.stand_in
        self._set(key, item, entry.refusal)
        return key

    def drop(self, key: ObjectKey) -> None:
        """An object is gone."""
        self._set(key, None, None)

    def take(self) -> dict[ObjectKey, KubeObject | None]:
        """What changed since the last time."""
        taken, self.changes, self.refusals_changed = self.changes, {}, False
        return taken

    def _set(self, key: ObjectKey, item: KubeObject | None, refusal: Refusal | None) -> None:
        # Most of what an API server tells is of fields that are not read here: status of nodes, leases of gateways.
        if self.in_force.get(key) != item:
            if item is None:
                del self.in_force[key]
            else:
                self.in_force[key] = item
            self.changes[key] = item
            self.on_change()
        if self.refusals.get(key) != refusal:
            if refusal is None:
                del self.refusals[key]
            else:
                self.refusals[key] = refusal
            self.refusals_changed = True
            self.on_change()


@dataclass(slots=True)
class _Store:
    """One kind's objects (`kube.reflector.Store`)."""

    kind: Kind
    objects: _Objects
    keys: dict[Name, ObjectKey] = field(default_factory=dict)

    def read(self, body: Body) -> _Entry:
        return _Entry(*judge_one(body, PLACE, f"{PLACE} {self.kind}"))

    def replaced(self, items: dict[Name, _Entry]) -> None:
        for name in self.keys.keys() - items.keys():
            self.changed(name, None)
        for name, entry in items.items():
            self.changed(name, entry)

    def changed(self, name: Name, item: _Entry | None) -> None:
        former = self.keys.pop(name, None)
        key = self.objects.put(item) if item is not None else None
        if key is not None:
            self.keys[name] = key
        if former is not None and former != key:
            self.objects.drop(former)


class KubernetesSource:
    """The mesh as one API server has it.

    Args:
        client: stays the caller's.
        wanted: the kinds to read. Of those that no mesh is derived from the sink is told by being called; they are in `objects`.
    """

    def __init__(self, client: KubeClient, options: MeshOptions, wanted: Sequence[Wanted] = AGENT, pace: Pace | None = None) -> None:
        self._changed = trio.Event()
        self._derivation = Derivation(options)
        self._objects = _Objects(on_change=self._wake)
        discovery = Discovery(client)
        pace = pace or Pace()
        self.reflectors = [
            Reflector(
                client,
                discovery,
                each.kind,
                _Store(each.kind, self._objects),
                pace,
                on_phase=self._wake,
                namespace=each.namespace,
                name=each.name,
            )
            for each in wanted
        ]
        self._all_matters = any(each.kind not in MESH_KINDS for each in wanted)
        self._told: tuple[Refusal, ...] = ()

    @property
    def objects(self) -> Mapping[ObjectKey, KubeObject]:
        """What there is, as of the sink's last call."""
        return self._objects.in_force

    async def run(self, sink: Sink, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Tell the sink what there is, as soon as all of it is known; then every change, for ever.

        An API server that is away, or that refuses us, is waited for: the log says what for.
        """
        async with trio.open_nursery() as nursery:
            for reflector in self.reflectors:
                nursery.start_soon(reflector.run)
            await self._know_all()
            await self._tell(sink, first=True)
            task_status.started()
            while True:
                await self._changed.wait()
                await trio.sleep(QUIET_SECONDS)
                self._changed = trio.Event()
                began = trio.current_time()
                await self._tell(sink)
                await trio.sleep(_SHARE * (trio.current_time() - began))

    @property
    def missing(self) -> list[str]:
        """What is still to be read before anything can be told, each with why."""
        return [
            f"{reflector.kind}: {reflector.problem or reflector.phase.value}"
            for reflector in self.reflectors
            if reflector.phase not in (Phase.ABSENT, Phase.FOLLOWING)
        ]

    async def _know_all(self) -> None:
        while self.missing:
            with trio.move_on_after(_REMIND_SECONDS) as waiting:
                while self.missing:
                    await self._changed.wait()
                    self._changed = trio.Event()
            if waiting.cancelled_caught:
                log.warning("waiting for the API server: no pod is served until it is done", extra=fields(missing="; ".join(self.missing)))

    async def _tell(self, sink: Sink, *, first: bool = False) -> None:
        former = self._derivation.state
        changes = self._objects.take()
        state = self._derivation.update(changes) if changes else former
        refusals = tuple(sorted({*self._objects.refusals.values(), *self._stale()}))
        if first or state is not former or refusals != self._told or (changes and self._all_matters):
            self._told = refusals
            await sink(state, refusals)

    def _stale(self) -> list[Refusal]:
        """What is not followed at present: missing rights one by one, and for all else one line, not one for each kind."""
        problems = [reflector for reflector in self.reflectors if reflector.problem]
        missing = [each for each in problems if " is missing: " in each.problem]
        others = [each.problem for each in problems if each not in missing][:1]
        return [
            *(Refusal(PLACE, str(each.kind), "", f"{each.problem}; {_KEPT}") for each in missing),
            *(Refusal(PLACE, "", "", f"{problem}; {_KEPT}") for problem in others),
        ]

    def _wake(self) -> None:
        self._changed.set()
