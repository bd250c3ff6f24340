"""Keeps the pods of this node captured exactly as wanted: the trio shell around `enrolment` and `Foothold`.

Per pod one record and one lock; every step is "look (`Sight`), ask (`next_event`), do (`Action`)". What fails is retried with
growing waits, for ever, and shows in `status`. Rules are checked for drift and healed. Nothing here fails open: rules are only
removed when a pod leaves the mesh; when the agent ends they stay, and the next agent replaces them in one transaction.

Order within a capture: listeners, data plane, routes, rules; so that nothing is redirected to where nobody listens.

Length: one state machine's shell; what it is asked (captured where, since when, what is wrong) reads the records that its steps write.
"""

from __future__ import annotations

import logging
import math
import os
import random as _random
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from socket import socket
from typing import Protocol, TypeVar, TypeVarTuple

import trio

from ztunnel.mesh.errors import LocalError
from ztunnel.node.enrolment import (
    HELD,
    Action,
    EnrolmentCounters,
    EnrolmentSettings,
    Event,
    Namespace,
    PodSpec,
    PodStatus,
    Sight,
    State,
    next_event,
    retry_seconds,
    transition,
)
from ztunnel.node.find import NetnsFinder
from ztunnel.node.foothold import Foothold, sweep
from ztunnel.node.netns import NetnsId
from ztunnel.node.nft import Ownership, probe_ownership
from ztunnel.node.redirect import Stage
from ztunnel.node.sockets import Listeners, make_sockets
from ztunnel.runtime.logs import fields

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

log = logging.getLogger(__name__)

# One look leads to three steps at most; more means that the finder contradicts itself, and that can wait for the next look.
_MOST_STEPS = 8


class NotEnrolledError(LocalError):
    """Something was asked for a pod whose namespace is not in our hands."""


class PodSink(Protocol):
    """The data plane, as the enroller needs it.

    A call that raises LocalError, or takes longer than the setting `sink_seconds`, has failed and is retried.
    """

    async def add(self, uid: str, listeners: Listeners) -> None:
        """Serve the pod: accept on duplicates of these listeners. Repeated for a pod that was draining: serve it fully again."""
        ...

    async def remove(self, uid: str, drain: bool) -> None:
        """Let go of the pod; unknown ones are no error.

        With `drain`, live connections go on, and late ones (a peer that has not heard yet) are served or refused but not left
        waiting. Without, all end now, and on return no duplicate of the listeners is open.
        """
        ...

    def active(self, uid: str) -> int:
        """How many connections of the pod live."""
        ...


@dataclass(slots=True, eq=False)
class _Pod:
    spec: PodSpec
    state: State = State.WANTED
    wanted: bool = True
    deleted: bool = False
    foothold: Foothold | None = None
    served_as: str = ""  # the identity with which the foothold was opened
    over_at: float = math.inf  # see Sight.over
    linger_until: float = -math.inf  # see Sight.active
    retry_at: float = -math.inf  # see Sight.waiting
    look_at: float = -math.inf  # next drift check
    poll_at: float = math.inf  # next look at a draining pod's connections
    captured: bool = False
    is_cut: bool = False  # strict, and connections that are older than the capture were ended
    failures: int = 0
    problem: str = ""
    lock: trio.Lock = field(default_factory=trio.Lock)

    @property
    def label(self) -> str:
        return f"{self.spec.namespace}/{self.spec.name}"

    @property
    def due_at(self) -> float:
        """When there is something to do at the latest."""
        if self.lock.locked():
            return math.inf
        if self.state in HELD:
            return min(self.look_at, max(self.retry_at, min(self.over_at, self.poll_at)))
        # The others rest only to wait for a retry, or because a step was cancelled.
        return self.retry_at


class Enroller:
    """Captures and releases the pods of this node. Runs under trio; `run` must be running for timers, retries and drift checks."""

    def __init__(
        self,
        finder: NetnsFinder,
        sink: PodSink,
        settings: EnrolmentSettings | None = None,
        *,
        ownership: Ownership | None = None,
        random: Callable[[], float] = _random.random,
    ) -> None:
        """Nothing is touched before the first `reconcile`.

        Args:
            ownership: None: find out what the kernel can do.
            random: spreads retries and drift checks; uniform in [0, 1).
        """
        self._finder = finder
        self._sink = sink
        self._settings = settings or EnrolmentSettings()
        self._ownership = ownership
        self._random = random
        self._pods: dict[str, _Pod] = {}
        self._counters = EnrolmentCounters()
        self._threads = trio.CapacityLimiter(self._settings.threads)
        self._changed = trio.Event()

    async def reconcile(self, desired: Sequence[PodSpec], deleted: Collection[str] = ()) -> None:
        """Make `desired` the pods of the mesh. Returns when each pod that this concerns was tried once; failures are retried by `run`.

        Args:
            desired: all of them; a pod that is held and not listed leaves the mesh and is drained.
            deleted: uids of pods that exist no more: those are dropped at once, without draining.
        """
        concerned = []
        specs = {spec.uid: spec for spec in desired}
        for uid, spec in specs.items():
            pod = self._pods.get(uid)
            if pod is None:
                self._pods[uid] = pod = _Pod(spec)
            elif pod.wanted and pod.spec == spec:
                continue
            elif pod.state is State.FAILED:
                pod.retry_at = -math.inf
            pod.spec, pod.wanted, pod.deleted = spec, True, False
            concerned.append(pod)
        for uid, pod in self._pods.items():
            if uid not in specs and (pod.wanted or uid in deleted):
                pod.wanted, pod.deleted = False, uid in deleted
                concerned.append(pod)
        try:
            await self._advance_all(concerned)
        finally:
            self._changed.set()

    async def release_leftovers(self, unwanted: Sequence[PodSpec]) -> None:
        """Remove the rules that an earlier agent left in pods that are not in the mesh (any more). Once, after the first `reconcile`.

        A pod whose namespace cannot be found or changed is logged and passed over.
        """
        async with trio.open_nursery() as nursery:
            for spec in unwanted:
                if spec.uid not in self._pods:
                    nursery.start_soon(self._sweep, spec)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Work off timers, retries and drift checks until cancelled."""
        task_status.started()
        while True:
            self._changed = trio.Event()
            now = trio.current_time()
            await self._advance_all([pod for pod in self._pods.values() if pod.due_at <= now])
            next_at = min((pod.due_at for pod in self._pods.values()), default=math.inf)
            with trio.move_on_at(next_at):
                await self._changed.wait()

    async def close(self, remove: bool) -> None:
        """Let every namespace go.

        Args:
            remove: False, an agent that ends or is replaced: rules stay, so that traffic fails closed until the next agent has
                taken over. True, the mesh leaves this node: rules and routes are removed first.
        """
        async with trio.open_nursery() as nursery:
            for pod in list(self._pods.values()):
                nursery.start_soon(self._close, pod, remove)

    def status(self) -> list[PodStatus]:
        """Every pod that is wanted or not yet let go, by namespace and name."""
        now = trio.current_time()
        return [_status(pod, now) for pod in sorted(self._pods.values(), key=lambda pod: (pod.spec.namespace, pod.spec.name, pod.spec.uid))]

    def captured_in(self, uid: str) -> NetnsId | None:
        """The namespace in which the pod's traffic is redirected and served; None while that is nowhere so."""
        pod = self._pods.get(uid)
        if pod is None or pod.foothold is None or not pod.captured or not pod.wanted or pod.lock.locked():
            return None
        return pod.foothold.netns_id

    def captured_addresses(self) -> frozenset[str]:
        """Of the pods whose traffic is redirected, as far as we know."""
        captured = (pod for pod in self._pods.values() if pod.state in (State.GUARDED, State.ENROLLED))
        return frozenset(address for pod in captured for address in pod.spec.addresses)

    def problem(self, uid: str) -> str:
        """What stands in the way of capturing a pod; empty when nothing is known."""
        pod = self._pods.get(uid)
        return "" if pod is None else pod.problem

    def hurry(self, uid: str) -> None:
        """Have `run` look at the pod, its namespace and its rules now, whatever its timers say. Unknown ones are no error."""
        pod = self._pods.get(uid)
        if pod is not None:
            pod.look_at = pod.retry_at = -math.inf
            self._changed.set()

    async def verify(self, uid: str) -> str:
        """Check a pod's namespace, rules and routes now, and mend what is wrong.

        Returns: what is wrong still, empty when the pod is captured.
        """
        pod = self._pods.get(uid)
        if pod is None:
            return "the pod is not being captured"
        pod.look_at = -math.inf
        await self._advance(pod)
        return pod.problem or ("" if pod.captured else f"the pod is {pod.state.value}")

    def counters(self) -> EnrolmentCounters:
        """Totals so far."""
        return self._counters

    def make_sockets(self, uid: str, family: int, count: int) -> list[socket]:
        """Marked transparent sockets in the pod's namespace, see `sockets.make_sockets`. Microseconds each; the caller's to close.

        Raises: NotEnrolledError when the pod is not held; LocalError when the kernel refuses.
        """
        pod = self._pods.get(uid)
        if pod is None or pod.foothold is None:
            raise NotEnrolledError(f"no namespace is held for pod {uid}")
        return make_sockets(pod.foothold.netns_fd, family, count)

    async def _advance_all(self, pods: Sequence[_Pod]) -> None:
        async with trio.open_nursery() as nursery:
            for pod in pods:
                nursery.start_soon(self._advance, pod)

    async def _advance(self, pod: _Pod) -> None:
        async with pod.lock:
            if self._pods.get(pod.spec.uid) is not pod:
                return
            for _ in range(_MOST_STEPS):
                event = next_event(pod.state, self._look(pod))
                if event is None:
                    break
                await self._take(pod, event)
            if pod.state is State.REMOVED:
                del self._pods[pod.spec.uid]
                return
            if pod.state is State.ENROLLED and not await self._cut(pod):
                return
            if pod.state in HELD and pod.look_at <= trio.current_time():
                await self._check(pod)
            pod.poll_at = trio.current_time() + self._settings.drain_poll_seconds if pod.state is State.DRAINING else math.inf

    def _look(self, pod: _Pod) -> Sight:
        now = trio.current_time()
        return Sight(
            wanted=pod.wanted,
            deleted=pod.deleted,
            strict=pod.spec.strict,
            held=pod.foothold is not None,
            namespace=self._namespace_of(pod),
            waiting=now < pod.retry_at,
            over=pod.over_at <= now,
            active=max(self._sink.active(pod.spec.uid), int(now < pod.linger_until)) if pod.state is State.DRAINING else 0,
        )

    def _namespace_of(self, pod: _Pod) -> Namespace:
        if pod.foothold is None:
            return Namespace.NONE
        found = self._finder.identity(pod.spec.uid)
        if found is None:
            return Namespace.NONE
        # Somebody else in the same place: a manifest that was written anew under the same UID.
        is_other = found != pod.foothold.netns_id or (pod.wanted and pod.served_as != pod.spec.identity)
        return Namespace.OTHER if is_other else Namespace.SAME

    async def _take(self, pod: _Pod, event: Event) -> None:
        """One transition and its action; what the action leads to is a transition in turn."""
        outcome: Event | None = event
        while outcome is not None:
            before = pod.state
            pod.state, action = transition(before, outcome)
            log.debug("pod step", extra=fields(pod=pod.label, before=before.value, event=outcome.name.lower(), state=pod.state.value))
            try:
                outcome = await self._act(pod, action)
            except (LocalError, trio.TooSlowError) as error:
                self._failed(pod, error)
                outcome = Event.PROBLEM
            else:
                self._arrived(pod, before)

    async def _act(self, pod: _Pod, action: Action) -> Event | None:
        match action:
            case Action.NOTHING:
                return None
            case Action.OPEN:
                return await self._open(pod)
            case Action.REOPEN:
                self._count(replaced=1)
                await self._drop(pod)
                return await self._open(pod)
            case Action.RECAPTURE:
                return await self._capture(pod, Stage.DRAIN)
            case Action.COMPLETE:
                await self._load(pod, Stage.FULL)
            case Action.DRAIN:
                pod.over_at = trio.current_time() + self._settings.drain_seconds
                pod.linger_until = trio.current_time() + self._settings.linger_seconds
                await self._load(pod, Stage.DRAIN)
                await self._bounded(self._sink.remove(pod.spec.uid, drain=True))
            case Action.REMOVE:
                await self._in_thread(_held(pod).unload)
                await self._drop(pod)
            case Action.DROP:
                await self._drop(pod)
            case Action.SWEEP:
                await self._sweep(pod.spec)
        return None

    async def _open(self, pod: _Pod) -> Event:
        if self._ownership is None:
            self._ownership = await self._in_thread(probe_ownership)
        pod.served_as = pod.spec.identity
        pod.foothold, found = await self._in_thread(_open_foothold, self._finder, pod.spec, self._ownership)
        return await self._capture(pod, found)

    async def _capture(self, pod: _Pod, found: Stage | None) -> Event:
        """Serve and redirect the pod, in whose namespace the rules of stage `found` are in force (None: unknown ones of ours)."""
        await self._bounded(self._sink.add(pod.spec.uid, _held(pod).listeners))
        if found not in (Stage.REMOVED, Stage.DRAIN):
            self._count(adopted=1)
        # Where everything is captured already, a guard would protect nothing and open a gap.
        full = pod.spec.strict or pod.spec.fresh or found in (Stage.FULL, None)
        await self._load(pod, Stage.FULL if full else Stage.GUARDED)
        return Event.FULL_LOADED if full else Event.GUARD_LOADED

    async def _load(self, pod: _Pod, stage: Stage) -> None:
        pod.captured = pod.is_cut = False
        await self._in_thread(_held(pod).load, stage)
        pod.captured = stage in (Stage.FULL, Stage.GUARDED)
        pod.look_at = self._next_look()

    async def _drop(self, pod: _Pod) -> None:
        """Let go of everything that keeps the namespace alive, also when the data plane does not answer."""
        foothold, pod.foothold, pod.captured = pod.foothold, None, False
        if foothold is None:
            return
        try:
            await self._bounded(self._sink.remove(pod.spec.uid, drain=False))
        finally:
            foothold.close()

    async def _cut(self, pod: _Pod) -> bool:
        """Nothing passes a strict pod's capture by, however old it is. False: it failed, and is tried again."""
        if not pod.spec.strict or pod.is_cut:
            pod.is_cut = pod.spec.strict
            return True
        try:
            cut = await self._in_thread(_held(pod).cut_uncaptured)
        except LocalError as error:
            self._failed(pod, error)
            return False
        pod.is_cut = True
        if cut:
            log.info("plaintext connections cut", extra=fields(pod=pod.label, uid=pod.spec.uid, count=cut))
        return True

    async def _check(self, pod: _Pod) -> None:
        """One drift check, and the mending of what it finds."""
        foothold = _held(pod)
        try:
            difference = await self._in_thread(foothold.check)
            self._count(checked=1)
            if difference is not None:
                self._count(drifted=1)
                log.warning("redirection has drifted", extra=fields(pod=pod.label, problem=difference))
                pod.captured, pod.problem = False, difference
                await self._in_thread(foothold.heal)
                # E.g. a rule that the application put before ours: then the pod is not captured, and saying so is all we can do.
                if (remaining := await self._in_thread(foothold.check)) is not None:
                    raise LocalError(f"cannot be healed: {remaining}")
                self._count(healed=1)
        except LocalError as error:
            self._failed(pod, error)
            return
        pod.captured, pod.problem, pod.failures, pod.retry_at = pod.state is not State.DRAINING, "", 0, -math.inf
        pod.look_at = self._next_look()

    def _failed(self, pod: _Pod, error: Exception) -> None:
        pod.failures += 1
        pod.captured = False
        pod.problem = str(error) or "the data plane did not answer in time"
        self._count(failed=1)
        wait = retry_seconds(pod.failures, self._settings.retry_seconds, self._settings.retry_limit_seconds, self._random)
        pod.look_at = pod.retry_at = trio.current_time() + wait
        log.warning(
            "pod has a problem", extra=fields(pod=pod.label, state=pod.state.value, problem=pod.problem, retry_seconds=round(wait, 1))
        )

    def _arrived(self, pod: _Pod, before: State) -> None:
        """Timers, totals and the log line of a transition whose action succeeded."""
        match pod.state:
            case State.GUARDED:
                pod.over_at = trio.current_time() + self._settings.grace_seconds
            case State.ENROLLED | State.REMOVED:
                pod.over_at = math.inf
            case State.WANTED | State.OPENING | State.DRAINING | State.FAILED:
                return
        pod.failures, pod.problem, pod.retry_at = 0, "", -math.inf
        if before is State.OPENING:
            self._count(enrolled=1)
            log.info("pod enrolled", extra=fields(pod=pod.label, uid=pod.spec.uid, state=pod.state.value))
        elif pod.state is State.REMOVED:
            self._count(removed=1)
            log.info("pod removed", extra=fields(pod=pod.label, uid=pod.spec.uid))

    async def _sweep(self, spec: PodSpec) -> None:
        try:
            if self._ownership is None:
                self._ownership = await self._in_thread(probe_ownership)
            if await self._in_thread(_sweep_pod, self._finder, spec, self._ownership):
                log.info("leftover redirection removed", extra=fields(pod=f"{spec.namespace}/{spec.name}", uid=spec.uid))
        except LocalError as error:
            log.info("cannot look for leftover redirection", extra=fields(pod=f"{spec.namespace}/{spec.name}", uid=spec.uid, problem=error))

    async def _close(self, pod: _Pod, remove: bool) -> None:
        async with pod.lock:
            self._pods.pop(pod.spec.uid, None)
            foothold, pod.foothold = pod.foothold, None
            if foothold is None:
                return
            try:
                if remove:
                    await self._in_thread(foothold.unload)
                    await self._bounded(self._sink.remove(pod.spec.uid, drain=False))
            except (LocalError, trio.TooSlowError) as error:
                log.warning("pod not released cleanly", extra=fields(pod=pod.label, problem=error))
            finally:
                foothold.close()

    def _next_look(self) -> float:
        return trio.current_time() + self._settings.drift_seconds * (0.9 + 0.2 * self._random())

    async def _bounded(self, call: Awaitable[None]) -> None:
        with trio.fail_after(self._settings.sink_seconds):
            await call

    async def _in_thread(self, fn: Callable[[*Ts], T], *args: *Ts) -> T:
        # The functions given here enter namespaces on threads of their own only (netns.run_inside).
        return await trio.to_thread.run_sync(fn, *args, limiter=self._threads)  # noqa: TID251

    def _count(self, **more: int) -> None:
        counters = self._counters
        self._counters = replace(counters, **{name: getattr(counters, name) + n for name, n in more.items()})


def _open_foothold(finder: NetnsFinder, spec: PodSpec, ownership: Ownership) -> tuple[Foothold, Stage | None]:
    foothold = Foothold.open(finder.open(spec.uid, spec.addresses), f"{spec.namespace}/{spec.name}", ownership)
    try:
        return foothold, foothold.found_stage()
    except BaseException:
        foothold.close()
        raise


def _sweep_pod(finder: NetnsFinder, spec: PodSpec, ownership: Ownership) -> bool:
    fd = finder.open(spec.uid, spec.addresses)
    try:
        return sweep(fd, ownership)
    finally:
        os.close(fd)


def _held(pod: _Pod) -> Foothold:
    assert pod.foothold is not None, "the table leads here only with a foothold"
    return pod.foothold


def _status(pod: _Pod, now: float) -> PodStatus:
    waits = bool(pod.failures) and (pod.state in HELD or pod.state is State.FAILED)
    return PodStatus(
        uid=pod.spec.uid,
        name=pod.spec.name,
        namespace=pod.spec.namespace,
        state=pod.state,
        labelled=pod.wanted,
        enrolled=pod.state in (State.GUARDED, State.ENROLLED),
        captured=pod.captured,
        problem=pod.problem,
        retry_in_seconds=max(0.0, pod.due_at - now) if waits else None,
    )
