"""The lab's processes: started through the launcher, waited for in one place.

The controller is the first process of its process namespace, so the orphans of every pod are its children too. One task reaps them
all with wait(2); nobody else in the controller may wait for a child. Starting is synchronous and happens on trio's thread, so that a
process is registered before the reaper can possibly meet it.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import trio

from ztunnel.lab import isolation

LAUNCHER = str(Path(__file__).with_name("launcher.py"))
POD_VARIABLE = "ZTUNNEL_LAB_POD"
"""In the environment of everything that runs in a pod; children inherit it, so stragglers are found by it."""

FIRST_COPY = 10
KEPT_VARIABLES = ("PATH", "HOME", "LANG", "LC_ALL", "TERM", "USER", "LOGNAME", "VIRTUAL_ENV", "TZ")


@dataclass(slots=True)
class Process:
    """One child. `code` is its exit code once it has ended: 128 + signal when one killed it, as shells say."""

    pid: int
    code: int | None = None
    ended: trio.Event = field(default_factory=trio.Event)

    def signal(self, number: int, group: bool = False) -> None:
        """Send a signal to it, or to its whole process group; nothing happens when it has ended."""
        try:
            if self.code is None:
                os.kill(self.pid, number)
            if group:
                os.killpg(self.pid, number)
        except ProcessLookupError:
            return

    async def stop(self, grace_seconds: float) -> int:
        """End it: SIGTERM, then SIGKILL to its process group when the grace is over; its exit code."""
        with trio.move_on_after(grace_seconds):
            self.signal(signal.SIGTERM)
            await self.ended.wait()
        self.signal(signal.SIGKILL, group=True)
        await self.ended.wait()
        return self.code or 0


@dataclass(frozen=True, slots=True)
class Order:
    """What to run and where. `hostname` empty means: no namespaces of its own besides the network (a node's program)."""

    argv: Sequence[str]
    env: Mapping[str, str]
    netns: int
    hostname: str = ""
    resolv_conf: str = ""
    cwd: str = "/"
    tty: bool = False
    capabilities: tuple[int, ...] | None = None
    """Those that it may have at most; None: as many as we."""

    def document(self) -> bytes:
        """As the launcher reads it."""
        return json.dumps(
            {
                "argv": list(self.argv),
                "env": dict(self.env),
                "hostname": self.hostname,
                "resolv_conf": self.resolv_conf,
                "cwd": self.cwd,
                "tty": self.tty,
                "capabilities": self.capabilities,
            }
        ).encode()


class Processes:
    """Every child of the controller, by process id."""

    def __init__(self) -> None:
        self._live: dict[int, Process] = {}

    def start(self, order: Order, stdin: int, stdout: int, stderr: int) -> Process:
        """Start a program.

        Args:
            stdin, stdout, stderr: file descriptors for it; they stay the caller's to close.

        Raises:
            OSError: no process can be made. A command that does not exist shows as exit code 127 of the process.
        """
        note = os.memfd_create("order")
        try:
            os.write(note, order.document())
            os.lseek(note, 0, os.SEEK_SET)
            # Copies above the fixed numbers first: a source that already sits on 0..4 must not be overwritten by an earlier dup2.
            sources = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FIRST_COPY) for fd in (stdin, stdout, stderr, note, order.netns)]
            try:
                actions = [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(sources)]
                argv = [sys.executable, "-I", "-S", LAUNCHER]
                pid = os.posix_spawn(
                    sys.executable, argv, dict(order.env), file_actions=actions, setsigmask=(), setsigdef=(signal.SIGPIPE,)
                )
            finally:
                for fd in sources:
                    os.close(fd)
        finally:
            os.close(note)
        process = Process(pid)
        self._live[pid] = process
        return process

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Reap children for ever."""
        with trio.open_signal_receiver(signal.SIGCHLD) as arrivals:
            task_status.started()
            self._reap()
            async for _ in arrivals:
                self._reap()

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            process = self._live.pop(pid, None)
            if process is not None:  # else an orphan of some pod
                code = os.waitstatus_to_exitcode(status)
                process.code = code if code >= 0 else 128 - code
                process.ended.set()


def base_environment() -> dict[str, str]:
    """What programs in the lab see of the environment in which it was brought up."""
    kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    return {"PATH": os.defpath, **kept}


def kill_stragglers(pod_uid: str) -> int:
    """Kill what still runs for a pod besides what we started: daemons that left their process group. Their number."""
    marker, killed = f"{POD_VARIABLE}={pod_uid}".encode(), 0
    for entry in os.listdir("/proc"):
        if entry.isdigit() and marker in _environment(entry):
            pid = _pid_here(entry)
            if pid is not None:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
                killed += 1
    return killed


def _environment(entry: str) -> list[bytes]:
    try:
        return Path("/proc", entry, "environ").read_bytes().split(b"\0")
    except OSError:  # gone, or somebody else's
        return []


def _pid_here(entry: str) -> int | None:
    """The number in the lab's process namespace; None for a process of the host."""
    try:
        status = Path("/proc", entry, "status").read_text()
    except OSError:
        return None
    for line in status.splitlines():
        if line.startswith("NSpid:"):
            numbers = line.split()[1:]
            own_depth = len(_own_depth())
            return int(numbers[own_depth - 1]) if len(numbers) >= own_depth else None
    return None


def _own_depth() -> list[str]:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("NSpid:"):
            return line.split()[1:]
    return []


def host_pid(process: Process) -> int | None:
    """The process' number outside of the lab, while it runs."""
    return isolation.host_pid(process.pid) if process.code is None else None
