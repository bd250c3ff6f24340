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
from dataclasses import dataclass

import trio

from ztunnel.ca.rotation import Rotation
from ztunnel.hbone.handshake import Credentials
from ztunnel.mesh.delta import Delta
from ztunnel.mesh.derive import Capture, MeshState, diff, with_addresses
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


@dataclass(frozen=True, slots=True)
class _Sandbox:
    """What CNI said of a new sandbox of a pod, until the pod's object says as much."""

    addresses: tuple[str, ...]
    former: tuple[str, ...]
    """The addresses that the pod's object had then: none, or those of the sandbox before."""


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
        self._told = MeshState()
        """What the source says; `state` is that and what is known of new sandboxes."""
        self._sandboxes: dict[str, _Sandbox] = {}
        self.heard = trio.Event()
        """Set, and replaced, when `state` changes."""
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
        self._tell_refusals(refusals)
        self.refusals = refusals
        self._told = state
        self._sandboxes = {uid: sandbox for uid, sandbox in self._sandboxes.items() if _is_news(sandbox, state.captures.get(uid))}
        self._adopt()
        if self._swept:
            self._changed.set()
        else:
            await self._follow()

    def sandbox_made(self, uid: str, addresses: tuple[str, ...]) -> None:
        """A pod has a new sandbox with these addresses, which its object will have in a moment: it may be captured now."""
        known = self._told.captures.get(uid)
        self._sandboxes[uid] = _Sandbox(addresses, known.addresses if known is not None else ())
        self._adopt()
        self._changed.set()

    def sandbox_gone(self, uid: str) -> None:
        """The pod's sandbox is no more; what its object says counts again."""
        if self._sandboxes.pop(uid, None) is not None:
            self._adopt()
            self._changed.set()

    def _adopt(self) -> None:
        """Bring `state`, index and workers up to what is known."""
        known = {uid: sandbox.addresses for uid, sandbox in self._sandboxes.items()}
        former, self.state = self.state, with_addresses(self._told, known) if known else self._told
        delta = diff(former, self.state)
        if delta:
            self._remember(delta)
            self._index.apply(delta)
            self._plane.update(delta)
        self._deleted |= {uid for uid in former.captures if uid not in self.state.captures}
        heard, self.heard = self.heard, trio.Event()
        heard.set()

    async def _follow(self) -> None:
        assert self.rotation is not None and self.enroller is not None, "composition comes first"
        wanted = [capture for capture in self.local_captures() if capture.wanted]
        deleted, self._deleted = self._deleted, set()
        await self.rotation.want({capture.identity for capture in wanted} | self._still_draining())
        await self.enroller.reconcile([self._spec(capture) for capture in wanted], deleted)
        if not self._swept:
            self._swept = True
            await self.enroller.release_leftovers([self._spec(capture) for capture in self.local_captures() if not capture.wanted])

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

    def _spec(self, capture: Capture) -> PodSpec:
        return PodSpec(
            capture.uid,
            capture.name,
            capture.namespace,
            capture.addresses,
            strict=capture.strict,
            fresh=capture.uid in self._sandboxes,
            identity=capture.identity.uri,
        )

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


def _is_news(sandbox: _Sandbox, capture: Capture | None) -> bool:
    """Whether CNI still knows more of a pod than its object says."""
    return capture is not None and capture.addresses in ((), sandbox.former) and capture.addresses != sandbox.addresses
