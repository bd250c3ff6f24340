"""The supervisor's end of a data-plane worker: start it, bring it up to date, exchange messages, start it again when it dies.

What a worker must know is not kept here: a new one is given `Feed.opening()`, the whole picture as of now, and then what is sent.
Listening sockets belong to the supervisor, so connections wait in the backlog while a worker is being replaced.
Bounds: messages that a worker does not read are limited in bytes; one that stalls longer than the limit lets is replaced.
"""

from __future__ import annotations

import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import trio

from ztunnel.dataplane.channel import MAX_DESCRIPTORS, ChannelError, Decoder, Drain, Drained, Message, encode
from ztunnel.mesh.errors import LocalError
from ztunnel.runtime.launcher import Launcher
from ztunnel.runtime.logs import fields

log = logging.getLogger(__name__)

_READ_BYTES = 1 << 16
"""A message of news is smaller, and the memory of such a read is at hand: larger ones are mapped and given back each time."""
_ANCILLARY = socket.CMSG_SPACE(MAX_DESCRIPTORS * 4)
_MAX_QUEUED_BYTES = 512 << 20
"""What may wait for a worker: two snapshots of a very large mesh. One that lets more pile up is stuck."""
_MAX_QUEUED_DESCRIPTORS = 16_384
"""Descriptors, open here, that may wait for a worker beside those of its opening, or a quarter of what this process may have open
if that is less: one that asks for sockets and takes none would use them all up."""
_EXIT_SECONDS = 2.0
_FIRST_RETRY_SECONDS = 0.05
_LONGEST_RETRY_SECONDS = 5.0
_STEADY_SECONDS = 30.0
"""A worker that lived this long died of something new: its successor is started without delay again."""


@dataclass(slots=True)
class Outgoing:
    """A message and the descriptors that go with it. They are this object's: closed once sent, or when it never will be."""

    message: Message
    descriptors: tuple[int, ...] = ()

    def close(self) -> None:
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors = ()


class Feed(Protocol):
    """What the rest of the supervisor gives a worker and takes from it."""

    def opening(self) -> Iterable[Outgoing]:
        """The messages that bring a fresh worker up to date."""

    def received(self, message: object) -> None:
        """One message of the worker. Must not block."""

    def worker_died(self, reason: str) -> None:
        """The worker is gone with all its connections; another one is coming."""

    def worker_left(self) -> None:
        """The worker has drained and gone, and none follows."""


class Running(Protocol):
    """A started worker."""

    async def wait(self) -> str:
        """Returns when it has ended, with the reason in words."""

    def kill(self) -> None:
        """Ends it at once, if it can be."""


Spawn = Callable[[socket.socket], Awaitable[Running]]
"""Starts a worker on its end of the channel; the caller keeps its own copy and closes it."""


class ProcessWorker:
    """A worker in a process of its own, which the kernel kills when the supervisor dies."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    async def wait(self) -> str:
        if self._process.returncode is None:
            ended = os.pidfd_open(self.pid)
            try:
                await trio.lowlevel.wait_readable(ended)
            finally:
                os.close(ended)
        code = self._process.wait()
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"

    def kill(self) -> None:
        self._process.kill()


async def spawn_process(
    theirs: socket.socket, launcher: Launcher, *, log_format: str, log_level: str, module: str = "ztunnel.worker_process"
) -> ProcessWorker:
    """Starts `python -m` the worker's module; its log lines go to our stderr, in our form."""
    fd = theirs.fileno()
    command = [sys.executable, "-m", module, "--channel-fd", str(fd), "--parent", str(os.getpid())]
    command += ["--log-format", log_format, "--log-level", log_level]
    return ProcessWorker(await launcher.launch(command, [fd]))


class Supervised:
    """One worker's place: there is a worker in it from `run`'s start to its cancellation, or until it was drained."""

    def __init__(self, feed: Feed, spawn: Spawn, kinds: object = None) -> None:
        """`kinds`: the union of the messages that the worker sends, where it is not the node agent's."""
        self._feed = feed
        self._kinds = kinds
        self._spawn = spawn
        self._queue: deque[tuple[bytes, Outgoing]] = deque()
        self._queued = trio.Event()
        self._queued_bytes = 0
        self._queued_descriptors = 0
        self._most_descriptors = 0
        self._condemned = False
        """It let too much pile up: nothing that it says counts any more."""
        self._serving = False
        self._drained: Drained | None = None
        self._leaving = trio.Event()
        self._ended = trio.Event()
        self.running: Running | None = None
        self.restarts = 0

    @property
    def is_serving(self) -> bool:
        """Whether there is a worker that messages reach."""
        return self._serving

    def send(self, message: Message, descriptors: tuple[int, ...] = ()) -> None:
        """Queues a message; takes over the descriptors. Without a worker it is dropped: the next one's `opening` will say it."""
        outgoing = Outgoing(message, descriptors)
        if not self._serving or self._condemned:
            outgoing.close()
            return
        self._enqueue(outgoing)
        if (self._queued_bytes > _MAX_QUEUED_BYTES or self._queued_descriptors > self._most_descriptors) and self.running is not None:
            waiting = fields(queued_bytes=self._queued_bytes, queued_descriptors=self._queued_descriptors)
            log.error("worker does not read its messages", extra=waiting)
            self._condemned = True
            self.running.kill()

    def _enqueue(self, outgoing: Outgoing) -> None:
        frame = encode(outgoing.message, len(outgoing.descriptors))
        self._queue.append((frame, outgoing))
        self._queued_bytes += len(frame)
        self._queued_descriptors += len(outgoing.descriptors)
        self._queued.set()

    async def drain(self, seconds: float) -> Drained | None:
        """Asks the worker to end its connections; returns when it has gone, at the latest a little after the deadline."""
        self._leaving.set()
        self.send(Drain(seconds))
        if self._serving:
            with trio.move_on_after(seconds + _EXIT_SECONDS):
                await self._ended.wait()
        return self._drained

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keeps a worker alive. Started once the first one has been sent its opening."""
        delay = _FIRST_RETRY_SECONDS
        while not self._leaving.is_set():
            began = trio.current_time()
            reason = await (self._serve_one(task_status) if self.restarts == 0 else self._serve_another())
            if self._leaving.is_set():
                self._feed.worker_left()
                return
            self.restarts += 1
            log.error("worker died", extra=fields(reason=reason, restarts=self.restarts))
            self._feed.worker_died(reason)
            if trio.current_time() - began > _STEADY_SECONDS:
                delay = _FIRST_RETRY_SECONDS
            await trio.sleep(delay)
            delay = min(delay * 2, _LONGEST_RETRY_SECONDS)

    async def _serve_another(self) -> str:
        try:
            return await self._serve_one(trio.TASK_STATUS_IGNORED)
        except (OSError, LocalError) as error:
            # The first must start or the agent says why it cannot; a later one may find the node short for a while.
            return f"its successor could not be started: {error.strerror if isinstance(error, OSError) else error}"

    async def _serve_one(self, task_status: trio.TaskStatus[None]) -> str:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        channel = trio.socket.from_stdlib_socket(ours)
        try:
            with theirs:
                self.running = await self._spawn(theirs)
            self._ended = trio.Event()
            self._serving, self._condemned = True, False
            for outgoing in self._feed.opening():
                self._enqueue(outgoing)
            self._most_descriptors = self._queued_descriptors + _descriptors_to_spare()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write, channel)
                task_status.started()
                await self._read(channel)
                nursery.cancel_scope.cancel()
        finally:
            self._serving = False
            self._ended.set()
            channel.close()
            for _, outgoing in self._queue:
                outgoing.close()
            self._queue.clear()
            self._queued_bytes = self._queued_descriptors = 0
            reason = await self._reap()
        return reason

    async def _reap(self) -> str:
        running = self.running
        if running is None:
            return "did not start"
        reason = "did not end"
        with trio.move_on_after(_EXIT_SECONDS, shield=True):
            reason = await running.wait()
            self.running = None
            return reason
        running.kill()
        with trio.move_on_after(_EXIT_SECONDS, shield=True):
            reason = f"{await running.wait()} (it did not end by itself)"
        self.running = None
        return reason

    async def _write(self, channel: trio.socket.SocketType) -> None:
        while True:
            self._queued = trio.Event()
            while self._queue:
                frame, outgoing = self._queue.popleft()
                self._queued_bytes -= len(frame)
                self._queued_descriptors -= len(outgoing.descriptors)
                try:
                    await _send_frame(channel, frame, outgoing.descriptors)
                except (BrokenPipeError, ConnectionResetError):
                    return
                finally:
                    outgoing.close()
            await self._queued.wait()

    async def _read(self, channel: trio.socket.SocketType) -> None:
        decoder = Decoder(to_worker=False, kinds=self._kinds)
        while True:
            try:
                data = await channel.recv(_READ_BYTES)
            except ConnectionResetError:
                return
            if not data:
                return
            try:
                received = decoder.feed(data, [])
            except ChannelError as error:
                log.critical("worker broke the channel", extra=fields(error=error))
                return
            for each in received:
                if self._condemned:
                    return
                if isinstance(each.message, Drained):
                    self._drained = each.message
                else:
                    self._feed.received(each.message)


def _descriptors_to_spare() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MAX_QUEUED_DESCRIPTORS if soft < 0 else min(_MAX_QUEUED_DESCRIPTORS, soft // 4)


async def _send_frame(channel: trio.socket.SocketType, frame: bytes, descriptors: tuple[int, ...]) -> None:
    view = memoryview(frame)
    sent = 0
    if descriptors:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, _pack(descriptors))]
        sent = await channel.sendmsg([view], rights)
    while sent < len(view):
        sent += await channel.send(view[sent:])


def _pack(descriptors: tuple[int, ...]) -> bytes:
    return b"".join(descriptor.to_bytes(4, sys.byteorder) for descriptor in descriptors)


class _Thread:
    """A worker's loop in a thread of this process, for debugging (`workers: 0`). It cannot be killed, only left."""

    def __init__(self, serve: Callable[[socket.socket], None], theirs: socket.socket) -> None:
        self._ended = trio.Event()
        self._token = trio.lowlevel.current_trio_token()
        threading.Thread(target=self._serve, args=(serve, theirs), name="worker", daemon=True).start()

    def _serve(self, serve: Callable[[socket.socket], None], theirs: socket.socket) -> None:
        try:
            serve(theirs)
        finally:
            # A supervisor that was told to leave at once does not wait for this thread, which then has nobody left to tell.
            with suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._ended.set)

    async def wait(self) -> str:
        await self._ended.wait()
        return "its thread ended"

    def kill(self) -> None:
        log.error("a worker in a thread cannot be killed")


async def spawn_thread(theirs: socket.socket, serve: Callable[[socket.socket], None]) -> Running:
    """A worker in this process. `serve` is its program, which ends when the channel does."""
    return _Thread(serve, theirs.dup())
