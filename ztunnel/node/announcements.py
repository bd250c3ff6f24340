"""Tells the API server what became of this node's pods: the annotation that a pod is captured, and an Event on one that cannot be.

Other nodes send a pod plaintext until it says `ambient.istio.io/redirection: enabled`, as Istio's do. It is written once the pod's
rules are in force and the data plane serves it, `pending` while a pod that is wanted is not captured, and taken away when it leaves
the mesh. What is written is compared with what the pod says, again and again, so that nothing is missed and nobody else's change stays.

Needs the rights to patch pods and to create events; without one of them the log says so, and the rest goes on.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from random import random

import trio

from ztunnel.kube.backoff import Backoff
from ztunnel.kube.client import KubeClient
from ztunnel.kube.errors import Conflict, KubeError, NotFound
from ztunnel.kube.resources import EVENTS, PODS
from ztunnel.mesh.derive import REDIRECTION, Capture
from ztunnel.node.enrolment import PodStatus, State
from ztunnel.runtime.logs import fields

log = logging.getLogger(__name__)

ENABLED, PENDING = "enabled", "pending"
CONTROLLER = "ztunnel.io/agent"
_PERIOD_SECONDS = 0.1
_HEARD_SECONDS = 5.0
"""What was written is seen in the pod well before this; if not, it is written again."""
_EVENT_SECONDS = 600.0
"""Between two Events of the same words about one pod."""
_REMEMBERED = 4096
"""Events that are not to be repeated yet."""


@dataclass(slots=True)
class Announcements:
    """Keeps the API server told.

    Args:
        node: ours.
        captures: the enrolment decisions for this node's pods, with what each pod says now.
        status: how far the pods are.
    """

    client: KubeClient
    node: str
    captures: Callable[[], Iterable[Capture]]
    status: Callable[[], Iterable[PodStatus]]
    _written: dict[str, tuple[str, float]] = field(default_factory=dict)
    """By UID: the last word and when; dropped when the pod says it."""
    _complained: OrderedDict[tuple[str, str], float] = field(default_factory=OrderedDict)
    _failing: set[str] = field(default_factory=set)
    """Problems that are in the log already."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled. The annotations stay then: an agent that restarts has not let its pods go."""
        task_status.started()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._repeat, self._annotate)
            nursery.start_soon(self._repeat, self._complain)

    async def annotate_once(self) -> None:
        """Say now what is so, as far as the API server takes it: for an agent that will not be there to repeat it."""
        try:
            await self._annotate()
        except KubeError as error:
            self._tell(error)

    async def _repeat(self, step: Callable[[], object]) -> None:
        backoff = Backoff(random)
        while True:
            try:
                await step()  # type: ignore[misc]  # one of two methods of ours
            except KubeError as error:
                self._tell(error)
                await trio.sleep(backoff.next(getattr(error, "retry_after", None)))
            else:
                backoff.succeeded()
                await trio.sleep(_PERIOD_SECONDS)

    def _tell(self, error: KubeError) -> None:
        if str(error) not in self._failing:
            if len(self._failing) >= _REMEMBERED:
                self._failing.clear()
            self._failing.add(str(error))
            log.warning("cannot tell the API server about a pod", extra=fields(reason=error))

    # ------------------------------------------------------------------------------------------------------ annotations

    async def _annotate(self) -> None:
        words = {each.uid: ENABLED if each.enrolled else PENDING for each in self.status() if each.labelled}
        known = list(self.captures())
        self._written = {each.uid: self._written[each.uid] for each in known if each.uid in self._written}
        for capture in known:
            word = words.get(capture.uid, "")
            if word == capture.redirection:
                self._written.pop(capture.uid, None)
            elif self._is_due(capture.uid, word):
                self._written[capture.uid] = word, trio.current_time()
                await self._patch(capture, word)

    def _is_due(self, uid: str, word: str) -> bool:
        last, at = self._written.get(uid, ("", float("-inf")))
        return last != word or trio.current_time() - at >= _HEARD_SECONDS

    async def _patch(self, capture: Capture, word: str) -> None:
        # With the UID: a pod of the same name that took its place is not meant.
        body = {"metadata": {"uid": capture.uid, "annotations": {REDIRECTION: word or None}}}
        try:
            await self.client.patch(PODS, body, capture.name, capture.namespace)
        except (NotFound, Conflict):
            # Gone, or another one by now: the mesh will say so.
            pass
        except KubeError:
            self._written.pop(capture.uid, None)
            raise

    # ----------------------------------------------------------------------------------------------------------- events

    async def _complain(self) -> None:
        now = trio.current_time()
        while self._complained and next(iter(self._complained.values())) < now - _EVENT_SECONDS:
            self._complained.popitem(last=False)
        for each in self.status():
            if each.state is State.FAILED and each.problem and (each.uid, each.problem) not in self._complained:
                await self._create(each)
                self._complained[each.uid, each.problem] = now
                if len(self._complained) > _REMEMBERED:
                    self._complained.popitem(last=False)

    async def _create(self, pod: PodStatus) -> None:
        stamp = datetime.now(UTC)
        body = {
            "apiVersion": EVENTS.api_version,
            "kind": EVENTS.kind,
            "metadata": {"name": f"{pod.name[:200]}.{int(stamp.timestamp() * 1e6):x}", "namespace": pod.namespace},
            "eventTime": stamp.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "reportingController": CONTROLLER,
            "reportingInstance": self.node[:128],
            "action": "Enrol",
            "reason": "NotEnrolled",
            "type": "Warning",
            "regarding": {"apiVersion": "v1", "kind": "Pod", "namespace": pod.namespace, "name": pod.name, "uid": pod.uid},
            "note": f"not in the mesh, its traffic is refused until it is: {pod.problem}"[:1000],
        }
        try:
            await self.client.create(EVENTS, body, pod.namespace)
        except NotFound:
            # The namespace is gone, and the pod with it.
            pass
