"""What the API server is told of this node's pods, against a fake of it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import trio

from tests.kit.polling import eventually_async
from ztunnel.kube.client import KubeClient
from ztunnel.kube.config import Access
from ztunnel.kube.credentials import Files
from ztunnel.mesh.derive import Capture
from ztunnel.mesh.identity import SpiffeId
from ztunnel.node.announcements import Announcements
from ztunnel.node.enrolment import PodStatus, State
from ztunnel.runtime.http import HttpServer, Request, Response

IDENTITY = SpiffeId("cluster.local", "shop", "default")


def capture(name: str, redirection: str = "") -> Capture:
    return Capture(f"uid-{name}", name, "shop", "node", ("10.0.0.1",), IDENTITY, True, False, "", redirection=redirection)


def status(name: str, state: State = State.ENROLLED, problem: str = "") -> PodStatus:
    enrolled = state is State.ENROLLED
    return PodStatus(f"uid-{name}", name, "shop", state, True, enrolled, enrolled, problem, None)


@dataclass
class Desk:
    """A node of one pod, and an API server that notes what it is told."""

    captures: list[Capture] = field(default_factory=list)
    status: list[PodStatus] = field(default_factory=list)
    told: list[tuple[str, str, dict[str, object]]] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)

    async def __call__(self, request: Request) -> Response:
        self.told.append((request.method, request.path, json.loads(request.body)))
        return Response(self.answers.pop(0) if self.answers else 200, b"{}", "application/json")

    @property
    def words(self) -> list[object]:
        found: list[object] = []
        for method, _, body in self.told:
            metadata = body["metadata"]
            if method == "PATCH" and isinstance(metadata, dict):
                found.append((metadata["uid"], metadata["annotations"]["ambient.istio.io/redirection"]))
        return found

    @property
    def notes(self) -> list[object]:
        return [body["note"] for method, _, body in self.told if method == "POST"]


@asynccontextmanager
async def telling(desk: Desk) -> AsyncIterator[Desk]:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    async with trio.open_nursery() as nursery, KubeClient(Access(f"http://127.0.0.1:{port}", Files())) as client:
        await nursery.start(HttpServer(desk).run, listeners)
        await nursery.start(Announcements(client, "node", lambda: desk.captures, lambda: desk.status).run)
        yield desk
        nursery.cancel_scope.cancel()


async def until(question: Callable[[], object]) -> None:
    await eventually_async(lambda: question() or None, within=50)


async def test_a_pod_is_annotated_once_it_is_captured_and_no_more_when_it_left() -> None:
    desk = Desk([capture("a")], [status("a", State.OPENING)])
    async with telling(desk):
        await until(lambda: desk.words == [("uid-a", "pending")])
        desk.captures, desk.status = [capture("a", "pending")], [status("a")]
        await until(lambda: desk.words[1:] == [("uid-a", "enabled")])
        desk.captures, desk.status = [capture("a", "enabled")], []
        await until(lambda: desk.words[2:] == [("uid-a", None)])
        assert {path for _, path, _ in desk.told} == {"/api/v1/namespaces/shop/pods/a"}


async def test_what_the_pod_says_already_is_not_written_and_what_was_refused_is_tried_again() -> None:
    desk = Desk([capture("a", "enabled"), capture("b")], [status("a"), status("b")], answers=[503, 409])
    async with telling(desk):
        await until(lambda: len(desk.words) == 2)
        desk.captures.append(capture("c"))
        desk.status.append(status("c"))
        await until(lambda: len(desk.words) == 3)
        # 503: again; 409: another pod has its name by now.
        assert desk.words == [("uid-b", "enabled"), ("uid-b", "enabled"), ("uid-c", "enabled")]


async def test_each_complaint_is_made_once() -> None:
    lost = status("a", State.FAILED, "no namespace")
    desk = Desk([capture("a", "pending")], [lost])
    async with telling(desk):
        await until(lambda: len(desk.notes) == 1)
        desk.status = [replace(lost, problem="two of them"), replace(lost)]
        await until(lambda: len(desk.notes) == 2)
        desk.status = [lost, status("a")]
        desk.captures = [capture("a", "pending")]
        await until(lambda: desk.words)
        assert [str(note).rpartition(": ")[2] for note in desk.notes] == ["no namespace", "two of them"]
