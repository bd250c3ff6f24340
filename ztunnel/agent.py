"""The node agent's picture of its node, and what follows from each change of it.

A change of the mesh becomes: a delta for the worker, certificates for the identities that run here, pods to capture or to let go.
This is glue between `sources`, `ca`, `node` and the worker; each decision is made by one of those, or by `mesh`.

Order that keeps it safe: the worker knows the mesh and has the certificate before a pod is given to it, and the pod is given to
it before anything is redirected there.
"""

from __future__ import annotations

import logging
import os
import socket
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import trio

from ztunnel.ca.rotation import Rotation
from ztunnel.dataplane.channel import (
    Activity,
    AddPod,
    Answer,
    Certificate,
    Configure,
    Flows,
    NeedSockets,
    PodAdded,
    PodRemoved,
    Query,
    RemovePod,
    Sockets,
    Update,
    Withdraw,
)
from ztunnel.dataplane.flow import FlowRecord
from ztunnel.hbone.handshake import Credentials
from ztunnel.mesh.delta import Delta
from ztunnel.mesh.derive import Capture, MeshState, diff
from ztunnel.mesh.errors import LocalError
from ztunnel.mesh.identity import SpiffeId
from ztunnel.mesh.index import Index
from ztunnel.mesh.workloads import Workload
from ztunnel.node.enrolment import PodSpec
from ztunnel.node.pods import Enroller
from ztunnel.node.sockets import Listeners
from ztunnel.runtime.logs import fields
from ztunnel.runtime.workers import Outgoing, Supervised
from ztunnel.sources.objects import Refusal

log = logging.getLogger(__name__)

_REMEMBERED = 4096
"""Workloads that left the mesh and may still be named by the last records of their connections."""
_ANSWER_SECONDS = 2.0
_SOCKETS_PER_MESSAGE = 128


@dataclass(slots=True)
class _Held:
    """A pod that the worker serves: our copies of its listeners, for a worker that has to be replaced."""

    identity: SpiffeId
    listeners: list[int]
    added: trio.Event = field(default_factory=trio.Event)

    def close(self) -> None:
        for descriptor in self.listeners:
            os.close(descriptor)
        self.listeners = []


class WorkerAway(LocalError):
    """The data plane did not answer: it is being replaced, or it is stuck."""


class DataPlane:
    """The supervisor's view of its worker. Implements `runtime.workers.Feed` and `node.pods.PodSink`."""

    def __init__(self, configure: Configure, index: Index) -> None:
        self._configure = configure
        self._index = index
        self._worker: Supervised | None = None
        self._pods: dict[str, _Held] = {}
        self._removing: dict[str, trio.Event] = {}
        self._credentials: dict[SpiffeId, Credentials] = {}
        self._answers: dict[int, tuple[trio.Event, list[Answer]]] = {}
        self._questions = 0
        self._active: dict[str, int] = {}
        self.identity_of: Callable[[str], SpiffeId | None] = lambda _uid: None
        self.make_sockets: Callable[[str, int, int], list[socket.socket]] = _no_sockets
        self.on_flows: Callable[[Iterable[FlowRecord], int], None] = lambda _records, _lost: None
        self.on_limits: Callable[[dict[str, int], int], None] = lambda _limits, _bugs: None
        self.on_death: Callable[[str], None] = lambda _reason: None

    def bind(self, worker: Supervised) -> None:
        """The worker that this speaks to; composition only."""
        self._worker = worker

    # What the supervisor tells

    def update(self, delta: Delta) -> None:
        """The mesh changed; `index` has it already."""
        self._send(Update(delta))

    def certificate(self, identity: SpiffeId, credentials: Credentials | None) -> None:
        """New credentials for an identity, or none any more."""
        if credentials is None:
            self._credentials.pop(identity, None)
            self._send(Withdraw(identity))
        else:
            self._credentials[identity] = credentials
            self._send(_certificate(credentials))

    async def ask(self) -> Answer:
        """The live connections and tunnels.

        Raises:
            WorkerAway: no answer within two seconds.
        """
        self._questions += 1
        question = self._questions
        event, box = self._answers[question] = (trio.Event(), [])
        try:
            self._send(Query(question))
            with trio.move_on_after(_ANSWER_SECONDS):
                await event.wait()
        finally:
            del self._answers[question]
        if not box:
            raise WorkerAway("the data plane does not answer")
        return box[0]

    # PodSink

    async def add(self, uid: str, listeners: Listeners) -> None:
        """Serve a pod. Returns when the worker does."""
        identity = self.identity_of(uid)
        if identity is None:
            raise LocalError(f"pod {uid} is not in the mesh any more")
        former = self._pods.pop(uid, None)
        if former is not None:
            former.close()
        held = self._pods[uid] = _Held(identity, [os.dup(each.fileno()) for each in listeners])
        self._send(AddPod(uid, identity), _dup(held.listeners))
        await held.added.wait()

    async def remove(self, uid: str, drain: bool) -> None:
        """Let a pod go. Returns when the worker has."""
        held = self._pods.get(uid)
        if held is None:
            return
        if not drain:
            del self._pods[uid]
            held.close()
            self._active.pop(uid, None)
        if self._worker is None or not self._worker.is_serving:
            return
        removed = self._removing.setdefault(uid, trio.Event())
        self._send(RemovePod(uid, drain))
        await removed.wait()

    def active(self, uid: str) -> int:
        """Live connections of a pod, at most a moment old."""
        return self._active.get(uid, 0)

    # Feed

    def opening(self) -> Iterator[Outgoing]:
        """Everything that a fresh worker must know, in the order in which it needs it."""
        index = self._index
        yield Outgoing(self._configure)
        yield Outgoing(Update(Delta(tuple(index.workloads()), tuple(index.services()), tuple(index.policies()))))
        for credentials in self._credentials.values():
            yield Outgoing(_certificate(credentials))
        for uid, held in self._pods.items():
            yield Outgoing(AddPod(uid, held.identity), _dup(held.listeners))

    def received(self, message: object) -> None:
        match message:
            case Flows():
                self.on_flows(message.records, message.lost)
            case NeedSockets():
                self._give_sockets(message)
            case Activity():
                self._take_activity(message)
            case PodAdded():
                if held := self._pods.get(message.uid):
                    held.added.set()
            case PodRemoved():
                self._removed(message.uid)
            case Answer():
                if waiting := self._answers.get(message.id):
                    waiting[1].append(message)
                    waiting[0].set()
            case _:
                log.error("unexpected message of the worker", extra=fields(type=type(message).__name__))

    def worker_died(self, reason: str) -> None:
        """Its connections died with it."""
        self._active.clear()
        for uid in list(self._removing):
            self._removed(uid)
        self.on_death(reason)

    def close(self) -> None:
        """Gives up our copies of all listeners."""
        for held in self._pods.values():
            held.close()
        self._pods.clear()

    def _send(
        self, message: Update | Certificate | Withdraw | AddPod | RemovePod | Sockets | Query, descriptors: tuple[int, ...] = ()
    ) -> None:
        assert self._worker is not None, "bind comes first"
        self._worker.send(message, descriptors)

    def _removed(self, uid: str) -> None:
        event = self._removing.pop(uid, None)
        if event is not None:
            event.set()

    def _give_sockets(self, request: NeedSockets) -> None:
        family = socket.AF_INET6 if request.ipv6 else socket.AF_INET
        try:
            sockets = self.make_sockets(request.uid, family, min(max(request.count, 1), _SOCKETS_PER_MESSAGE))
        except LocalError as error:
            log.warning("cannot make sockets for the worker", extra=fields(uid=request.uid, error=error))
            sockets = []
        self._send(Sockets(request.uid, request.ipv6), tuple(sock.detach() for sock in sockets))

    def _take_activity(self, activity: Activity) -> None:
        for uid, count in activity.active.items():
            if count and uid in self._pods:
                self._active[uid] = count
            else:
                self._active.pop(uid, None)
        if activity.limits or activity.bugs:
            self.on_limits(activity.limits, activity.bugs)


class Agent:
    """Follows the mesh. `mesh_changed` is the source's sink, `certificate_changed` the rotation's."""

    def __init__(self, node: str, index: Index, plane: DataPlane) -> None:
        self._node = node
        self._index = index
        self._plane = plane
        self._gone: OrderedDict[str, Workload] = OrderedDict()
        self._swept = False
        self.on_gone: Callable[[Iterable[str]], None] = lambda _uids: None
        self.state = MeshState()
        self.refusals: tuple[Refusal, ...] = ()
        self.rotation: Rotation | None = None
        self.enroller: Enroller | None = None

    async def mesh_changed(self, state: MeshState, refusals: tuple[Refusal, ...]) -> None:
        """The sink of the source: brings worker, certificates and captures up to the new state."""
        assert self.rotation is not None and self.enroller is not None, "composition comes first"
        former, self.state = self.state, state
        self._tell_refusals(refusals)
        self.refusals = refusals
        delta = diff(former, state)
        if delta:
            self._remember(delta)
            self._index.apply(delta)
            self._plane.update(delta)
        wanted = [capture for capture in self.local_captures() if capture.wanted]
        await self.rotation.want({capture.identity for capture in wanted} | self._still_draining())
        deleted = {uid for uid in former.captures if uid not in state.captures}
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
    return PodSpec(capture.uid, capture.name, capture.namespace, capture.addresses, strict=capture.strict)


def _certificate(credentials: Credentials) -> Certificate:
    return Certificate(credentials.identity, credentials.chain_pem, credentials.key_pem, credentials.roots_pem)


def _dup(descriptors: Iterable[int]) -> tuple[int, ...]:
    return tuple(os.dup(descriptor) for descriptor in descriptors)


def _no_sockets(uid: str, _family: int, _count: int) -> list[socket.socket]:
    raise LocalError(f"no sockets for pod {uid}: the agent is not composed")
