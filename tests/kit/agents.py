"""An agent without a kernel: real index, certificates and captures; its worker is played by the test, and no namespace is ever found."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio
import trio.testing

from tests.kit.builders import mesh
from tests.kit.proxies import SETTINGS
from tests.kit.workers import FakeWorker
from ztunnel.admin.readiness import Readiness
from ztunnel.agent import Agent
from ztunnel.ca.authority import Authority
from ztunnel.ca.root import open_root
from ztunnel.ca.rotation import Rotation
from ztunnel.dataplane.channel import Message
from ztunnel.flows import FlowReporter
from ztunnel.mesh.derive import MeshState
from ztunnel.mesh.index import Index
from ztunnel.node.find import DirectoryFinder
from ztunnel.node.pods import Enroller
from ztunnel.overview import Overview, Watched
from ztunnel.plane import DataPlane, Listener
from ztunnel.runtime.metrics import Metrics
from ztunnel.sources.objects import Refusal


class Desk:
    """The parts of an agent on the node `node`, composed as the daemon composes them."""

    def __init__(self, directory: Path) -> None:
        self.worker: FakeWorker | None = None
        self.now = 1000.0
        self.index = Index()
        self.metrics = Metrics()
        self.plane = DataPlane(SETTINGS, self.index, self._spawn, 1)
        self.agent = Agent("node", self.index, self.plane)
        self.rotation = Rotation(
            Authority(open_root(directory / "ca", "cluster.local", time.time()), 24), self.agent.certificate_changed, time.time
        )
        self.enroller = Enroller(DirectoryFinder(str(directory)), self.plane)
        self.reporter = FlowReporter(self.metrics, self.agent.workload, lambda: self.now)
        self.agent.rotation, self.agent.enroller = self.rotation, self.enroller
        self.plane.identity_of = self.agent.identity_of
        self.plane.listener = Listener(self.reporter.take)
        self.readiness = Readiness(("mesh",))
        parts = (self.index, self.agent, self.plane, self.rotation, self.enroller, self.reporter, self.readiness)
        self.overview = Overview(Watched("node", "1.2.3", "cluster.local", False, *parts), lambda: self.now, time.time)
        self.overview.watch(self.metrics)

    async def _spawn(self, theirs: socket.socket) -> FakeWorker:
        self.worker = FakeWorker(theirs.dup())
        return self.worker

    @asynccontextmanager
    async def running(self) -> AsyncIterator[trio.Nursery]:
        """With a worker that reads when it is asked, and the agent following the mesh."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self.plane.run)
            await nursery.start(self.agent.run)
            await self.heard()
            yield nursery
            if self.worker is not None:
                self.worker.leave()
            nursery.cancel_scope.cancel()
        await self.enroller.close(remove=False)
        self.plane.close()

    async def heard(self) -> list[Message]:
        """What the worker has heard since the last time."""
        await trio.testing.wait_all_tasks_blocked()
        messages: list[Message] = []
        assert self.worker is not None
        for received in self.worker.hear():
            for descriptor in received.descriptors:
                os.close(descriptor)
            assert isinstance(received.message, Message)
            messages.append(received.message)
        return messages

    async def says(self, message: Message) -> None:
        """The worker says something."""
        assert self.worker is not None
        self.worker.say(message)
        await trio.testing.wait_all_tasks_blocked()

    async def becomes(self, *manifests: object, refusals: tuple[Refusal, ...] = ()) -> MeshState:
        """The source has read these manifests."""
        state = mesh(*manifests)
        await self.agent.mesh_changed(state, refusals)
        return state
