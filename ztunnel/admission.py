"""Whether a new pod may start: it may, once its traffic is captured, or if it is not to be. The gate behind `cni.endpoint`.

Glue between `cni`, `agent` and `node`: who is in the mesh is the mesh's decision, capturing is the enroller's. ADD returns only when rules
and listeners are in place in the very namespace that it names, so that nothing leaves or enters a meshed pod past them. A pod that the
mesh does not know (yet) is not let through: the runtime's call may be faster than the API server's news, and kubelet tries again.

Also keeps the list that answers for the agent while it is away (`cni.known`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import trio

from ztunnel.agent import Agent
from ztunnel.cni.known import MAX_BYTES, Known, text
from ztunnel.cni.request import Code, Command, PodName, Refusal, Request
from ztunnel.mesh.derive import Capture, MeshOptions
from ztunnel.node.find_on_node import NodeFinder
from ztunnel.node.netns import NetnsError
from ztunnel.node.pods import Enroller
from ztunnel.runtime.logs import fields
from ztunnel.settings import CniSettings

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.02
"""Between two looks whether the pod is captured by now; capturing takes some tens of milliseconds."""
_QUIET_SECONDS = 0.2
"""The list is written once for all changes in this time."""


class Admission:
    """Answers the CNI plugin."""

    def __init__(self, agent: Agent, enroller: Enroller, finder: NodeFinder, settings: CniSettings) -> None:
        self._agent = agent
        self._enroller = enroller
        self._finder = finder
        self._excluded = MeshOptions().excluded_namespaces
        self._known_file = settings.known_file
        self._seconds = settings.add_seconds
        self._sandboxes: dict[str, str] = {}
        """Of the pods that came through ADD, by UID: the sandbox's container."""
        self._written = ""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keeps the list up to date until cancelled, and at that moment; "started" means that it was written once."""
        self._write_list()
        task_status.started()
        try:
            while True:
                await self._agent.heard.wait()
                await trio.sleep(_QUIET_SECONDS)
                self._write_list()
        finally:
            self._write_list()

    async def gate(self, request: Request) -> Refusal | None:
        """See `cni.endpoint.Gate`."""
        match request.command:
            case Command.ADD:
                return await self._add(request)
            case Command.CHECK:
                return await self._check(request)
            case Command.DEL:
                self._gone(lambda container: container == request.container)
            case Command.GC:
                remaining = request.attachments or frozenset()
                self._gone(lambda container: container not in remaining)
            case Command.STATUS:
                pass
        return None

    async def _add(self, request: Request) -> Refusal | None:
        pod = request.pod
        if pod is None or pod.namespace in self._excluded:
            return None
        with trio.move_on_after(self._seconds):
            while (capture := self._capture_of(pod)) is None:
                await self._agent.heard.wait()
            if not self._is_meshed(capture):
                return None
            return await self._captured(request, capture)
        capture = self._capture_of(pod)
        if capture is None:
            return Refusal(Code.TRY_LATER, f"the mesh does not know pod {pod.namespace}/{pod.name} yet")
        problem = self._enroller.problem(capture.uid) or "no reason is known"
        return Refusal(Code.TRY_LATER, f"pod {pod.namespace}/{pod.name} was not captured within {self._seconds:g} s: {problem}")

    async def _captured(self, request: Request, capture: Capture) -> Refusal | None:
        """Returns when the pod is captured, or is not wanted in the mesh any more."""
        if not request.addresses:
            return Refusal(Code.BAD_CONFIGURATION, "the plugins before this one gave the pod no address")
        try:
            namespace = self._finder.announce(capture.uid, request.namespace_path)
        except NetnsError as error:
            return Refusal(Code.TRY_LATER, f"{error}; does the agent see the host's directory, with mount propagation HostToContainer?")
        self._sandboxes[capture.uid] = request.container
        self._agent.sandbox_made(capture.uid, request.addresses)
        self._enroller.hurry(capture.uid)
        while self._enroller.captured_in(capture.uid) != namespace:
            await trio.sleep(_LOOK_SECONDS)
            now = self._agent.state.captures.get(capture.uid)
            if now is None:
                return Refusal(Code.TRY_LATER, f"pod {capture.namespace}/{capture.name} was deleted before it was captured")
            if not self._is_meshed(now):
                return None
        log.info("new pod captured", extra=fields(pod=f"{capture.namespace}/{capture.name}", uid=capture.uid))
        return None

    async def _check(self, request: Request) -> Refusal | None:
        capture = None if request.pod is None else self._capture_of(request.pod)
        if capture is None or not self._is_meshed(capture):
            return None
        problem = await self._enroller.verify(capture.uid)
        return Refusal(Code.TRY_LATER, f"pod {capture.namespace}/{capture.name}: {problem}") if problem else None

    def _gone(self, is_gone: Callable[[str], bool]) -> None:
        """No namespace is touched: the caller's is on its way out, and ours is let go when it cannot be seen any more."""
        for uid, container in list(self._sandboxes.items()):
            if is_gone(container):
                del self._sandboxes[uid]
                self._agent.sandbox_gone(uid)

    def _capture_of(self, pod: PodName) -> Capture | None:
        """The decision on a pod as the runtime names it. A name alone may be that of the pod before it."""
        captures = self._agent.state.captures
        if pod.uid in captures:
            return captures[pod.uid]
        named = (each for each in self._agent.local_captures() if (each.namespace, each.name) == (pod.namespace, pod.name))
        return next((each for each in named if pod.uid in (each.sandbox_uid, "")), None)

    def _is_meshed(self, capture: Capture) -> bool:
        return capture.wanted or capture.uid in self._agent.state.awaited

    def _write_list(self) -> None:
        known = set(self._agent.state.captures)
        self._sandboxes = {uid: container for uid, container in self._sandboxes.items() if uid in known}
        pods = tuple((each.sandbox_uid or each.uid, self._is_meshed(each)) for each in self._agent.local_captures())
        content = text(Known(self._agent.state.outside, pods))
        if content == self._written:
            return
        temporary = self._known_file.with_name(f".{self._known_file.name}")
        try:
            if len(content.encode()) > MAX_BYTES:
                raise OSError(0, "too much to say")
            self._known_file.parent.mkdir(parents=True, exist_ok=True)
            temporary.unlink(missing_ok=True)
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
                file.write(content)
            temporary.replace(self._known_file)
            self._written = content
        except OSError as error:
            log.error("cannot write the list of pods outside of the mesh", extra=fields(file=self._known_file, error=error.strerror))
