"""The node agent's picture of its node, and what follows from each change of it.

A change of the mesh becomes: a delta for the worker, certificates for the identities that run here, pods to capture or to let go.
This is glue between `sources`, `ca`, `node` and the worker; each decision is made by one of those, or by `mesh`.

Order that keeps it safe: the worker knows the mesh and has the certificate before a pod is given to it, and the pod is given to
it before anything is redirected there.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable

import trio

from ztunnel.ca.rotation import Rotation
from ztunnel.hbone.handshake import Credentials
from ztunnel.mesh.delta import Delta
from ztunnel.mesh.derive import Capture, MeshState, diff
from ztunnel.mesh.identity import SpiffeId
from ztunnel.mesh.index import Index
from ztunnel.mesh.workloads import Workload
from ztunnel.node.enrolment import PodSpec
from ztunnel.node.pods import Enroller
from ztunnel.plane import DataPlane
from ztunnel.runtime.logs import fields
from ztunnel.sources.objects import Refusal

log = logging.getLogger(__name__)

_REMEMBERED = 4096
"""Workloads that left the mesh and may still be named by the last records of their connections."""


class Agent:
    """Follows the mesh. `mesh_changed` is the source's sink, `certificate_changed` the rotation's."""

    def __init__(self, node: str, index: Index, plane: DataPlane) -> None:
        self._node = node
        self._index = index
        self._plane = plane
        self._gone: OrderedDict[str, Workload] = OrderedDict()
        self._swept = False
        self._changed = trio.Event()
        self._deleted: set[str] = set()
        """UIDs of pods that went since captures were last brought up to date."""
        self.on_gone: Callable[[Iterable[str]], None] = lambda _uids: None
        self.state = MeshState()
        self.refusals: tuple[Refusal, ...] = ()
        self.rotation: Rotation | None = None
        self.enroller: Enroller | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Brings certificates and captures up to the latest state, again and again: a pod that takes long delays no policy."""
        task_status.started()
        while True:
            await self._changed.wait()
            self._changed = trio.Event()
            await self._follow()

    async def mesh_changed(self, state: MeshState, refusals: tuple[Refusal, ...]) -> None:
        """The sink of the source. The workers hear of the change at once; the first time it returns when pods were tried as well."""
        former, self.state = self.state, state
        self._tell_refusals(refusals)
        self.refusals = refusals
        delta = diff(former, state)
        if delta:
            self._remember(delta)
            self._index.apply(delta)
            self._plane.update(delta)
        self._deleted |= {uid for uid in former.captures if uid not in state.captures}
        if self._swept:
            self._changed.set()
        else:
            await self._follow()

    async def _follow(self) -> None:
        assert self.rotation is not None and self.enroller is not None, "composition comes first"
        wanted = [capture for capture in self.local_captures() if capture.wanted]
        deleted, self._deleted = self._deleted, set()
        await self.rotation.want({capture.identity for capture in wanted} | self._still_draining())
        await self.enroller.reconcile([_spec(capture) for capture in wanted], deleted)
        if not self._swept:
            self._swept = True
            await self.enroller.release_leftovers([_spec(capture) for capture in self.local_captures() if not capture.wanted])

    async def certificate_changed(self, identity: SpiffeId, credentials: Credentials | None) -> None:
        """The sink of the rotation."""
        self._plane.certificate(identity, credentials)

    def identity_of(self, uid: str) -> SpiffeId | None:
        """Of a pod that is to be captured here."""
        capture = self.state.captures.get(uid)
        return capture.identity if capture is not None else None

    def local_captures(self) -> list[Capture]:
        """The enrolment decisions for this node's pods."""
        return [capture for capture in self.state.captures.values() if capture.node == self._node]

    def workload(self, uid: str) -> Workload | None:
        """Also one that has just left: the last records of its connections still name it."""
        return self._index.workload(uid) or self._gone.get(uid)

    def _still_draining(self) -> set[SpiffeId]:
        """Pods that left the mesh and whose tunnels live on keep their certificates until they are let go."""
        assert self.enroller is not None
        identities = {self.identity_of(status.uid) for status in self.enroller.status()}
        return {identity for identity in identities if identity is not None}

    def _remember(self, delta: Delta) -> None:
        for uid in delta.removed_workloads:
            workload = self._index.workload(uid)
            if workload is not None:
                self._gone[uid] = workload
        while len(self._gone) > _REMEMBERED:
            self._gone.popitem(last=False)
        self.on_gone(delta.removed_workloads)

    def _tell_refusals(self, refusals: tuple[Refusal, ...]) -> None:
        for refusal in refusals:
            if refusal not in self.refusals:
                log.error(
                    "manifest refused",
                    extra=fields(file=refusal.file, object=refusal.object, field=refusal.field, reason=refusal.reason),
                )


def _spec(capture: Capture) -> PodSpec:
    return PodSpec(capture.uid, capture.name, capture.namespace, capture.addresses, strict=capture.strict, identity=capture.identity.uri)
