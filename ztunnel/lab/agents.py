"""The node agents: an ordinary `ztunnel run` in each node's namespace, kept running, and stopped or killed for experiments.

An agent that dies unexpectedly is started again with back-off. What agents say of pods (files `status/<node>/<uid>`) becomes the pods'
redirection annotation here, as the API server's client in a real agent would write it.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import random
import signal
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import trio

from ztunnel.lab import probes
from ztunnel.lab.images import python_path
from ztunnel.lab.objects import REDIRECTION, key_of, uid_of
from ztunnel.lab.processes import Order, Process, base_environment, host_pid
from ztunnel.lab.site import NodeSite, Site, trim_log
from ztunnel.mesh.manifests.tree import Tree, drop, put, strings, text
from ztunnel.mesh.ports import READINESS
from ztunnel.settings import variable

log = logging.getLogger(__name__)

FIRST_BACKOFF_SECONDS = 0.2
LONGEST_BACKOFF_SECONDS = 5.0
STABLE_SECONDS = 10.0
STOP_SECONDS = 10.0
READY_POLL_SECONDS = 0.02
WATCH_READY_SECONDS = 1.0
GRACE_SECONDS = 0.5
PASSED_ON = (variable("workers"), variable("waypoint.fallback"))
"""Settings of the agents that the environment of `lab up` decides, as it does for `ztunnel run`."""
IN_MOVED_TO, IN_CLOSE_WRITE, IN_DELETE, IN_MOVED_FROM = 0x80, 0x08, 0x200, 0x40


class Agent:
    """One node's agent."""

    def __init__(self, site: Site, node: NodeSite) -> None:
        self._site = site
        self._node = node
        self._bell = trio.Event()
        self.is_wanted = True
        self.process: Process | None = None
        self.is_ready = False
        self.starts = 0
        self.directory = site.state / "nodes" / node.plan.name

    @property
    def name(self) -> str:
        """The node's name."""
        return self._node.plan.name

    def status(self) -> Tree:
        """For `lab status`."""
        pid = host_pid(self.process) if self.process is not None else None
        return {
            "node": self.name,
            "running": self.process is not None,
            "ready": self.is_ready,
            "wanted": self.is_wanted,
            "pid": pid,
            "starts": self.starts,
        }

    def prepare(self) -> None:
        """Write the agent's configuration."""
        (self._site.state / "status" / self.name).mkdir(parents=True)
        self.directory.mkdir(parents=True)
        (self.directory / "agent.yaml").write_text(_yaml(self._settings()))

    async def run(self) -> None:
        """Keep the agent running while it is wanted."""
        backoff = FIRST_BACKOFF_SECONDS
        while True:
            await self._until_wanted()
            began = trio.current_time()
            process = self._start()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch_readiness)
                await process.ended.wait()
                nursery.cancel_scope.cancel()
            self.process, self.is_ready = None, False
            self._site.bell.ring()
            if self._was_stopped():
                continue
            log.warning("agent of node=%s ended unexpectedly with code=%s", self.name, process.code)
            if trio.current_time() - began > STABLE_SECONDS:
                backoff = FIRST_BACKOFF_SECONDS
            await trio.sleep(backoff * random.uniform(0.8, 1.2))
            backoff = min(2 * backoff, LONGEST_BACKOFF_SECONDS)

    async def _until_wanted(self) -> None:
        while not self.is_wanted:
            await self._bell.wait()

    def _was_stopped(self) -> bool:
        return not self.is_wanted

    def start(self) -> None:
        """Want it running."""
        self.is_wanted = True
        self._ring()

    async def stop(self, number: int) -> int | None:
        """Want it not running, and end it with a signal; its exit code, None when it did not run.

        A SIGTERM that is not obeyed within STOP_SECONDS is followed by SIGKILL.
        """
        self.is_wanted = False
        process = self.process
        if process is None:
            return None
        process.signal(number)
        with trio.move_on_after(STOP_SECONDS):
            await process.ended.wait()
        process.signal(signal.SIGKILL, group=True)
        await process.ended.wait()
        return process.code

    def _ring(self) -> None:
        bell, self._bell = self._bell, trio.Event()
        bell.set()

    def _start(self) -> Process:
        output = os.open(self.directory / "agent.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        argv = [sys.executable, "-m", "ztunnel", "run", "--config", str(self.directory / "agent.yaml")]
        asked = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        environment = base_environment() | asked | {"PYTHONPATH": python_path(os.environ)}
        try:
            order = Order(argv=argv, env=environment, netns=self._node.fd, cwd="/")
            self.process = self._site.processes.start(order, nothing, output, output)
        finally:
            os.close(output)
            os.close(nothing)
        self.starts += 1
        return self.process

    async def _watch_readiness(self) -> None:
        while True:
            ready = await probes.any_http(self._node.fd, ("127.0.0.1", "::1"), READINESS, "/healthz/ready")
            if ready != self.is_ready:
                self.is_ready = ready
                self._site.bell.ring()
            trim_log(self.directory / "agent.log")
            await trio.sleep(WATCH_READY_SECONDS if ready else READY_POLL_SECONDS)

    def _settings(self) -> Mapping[str, object]:
        state = self._site.state
        return {
            "node": self.name,
            "sources": {"files": str(state / "manifests"), "redirection_status": "annotation", "poll_seconds": 0.05},
            "pods": {"netns_directory": str(state / "netns"), "status_directory": str(state / "status" / self.name)},
            "ca": {"directory": str(state / "ca")},
            "admin": {"socket": str(self.directory / "agent.sock")},
            "enrolment": {"grace_seconds": GRACE_SECONDS},
        }


def _yaml(settings: Mapping[str, object]) -> str:
    """Two levels of settings as a person would write them; JSON scalars are YAML."""
    lines = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            lines += [f"{key}:", *(f"  {inner}: {json.dumps(item)}" for inner, item in value.items())]
        else:
            lines.append(f"{key}: {json.dumps(value)}")
    return "\n".join(lines) + "\n"


class RedirectionReports:
    """Keeps the pods' redirection annotation equal to what the agents say of them."""

    def __init__(self, site: Site) -> None:
        self._site = site

    async def run(self) -> None:
        """Follow the agents' files for ever, woken by inotify."""
        libc = ctypes.CDLL(None, use_errno=True)
        watch = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if watch < 0:
            raise OSError(ctypes.get_errno(), "inotify_init1")
        try:
            for node in self._site.nodes:
                path = os.fsencode(self._site.state / "status" / node)
                if libc.inotify_add_watch(watch, path, IN_MOVED_TO | IN_MOVED_FROM | IN_CLOSE_WRITE | IN_DELETE) < 0:
                    raise OSError(ctypes.get_errno(), "inotify_add_watch", path)
            while True:
                self.look()
                await trio.lowlevel.wait_readable(watch)
                os.read(watch, 1 << 16)
        finally:
            os.close(watch)

    def look(self) -> None:
        """Bring every pod's annotation up to date."""
        for pod in self._site.cluster.pods():
            node = text(pod, "spec", "nodeName")
            said = _read(self._site.state / "status" / node / uid_of(pod)) if node else ""
            if said != strings(pod, "metadata", "annotations").get(REDIRECTION, ""):
                self._site.cluster.update(key_of(pod), uid_of(pod), partial(_annotate, said=said))


def _annotate(body: Tree, said: str) -> None:
    if said:
        put(body, said, "metadata", "annotations", REDIRECTION)
    else:
        drop(body, "metadata", "annotations", REDIRECTION)


def _read(path: Path) -> str:
    try:
        said = path.read_text().strip()
    except OSError:
        return ""
    return said if said in ("enabled", "pending") else ""
