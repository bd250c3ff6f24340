"""Where the CNI plugin reaches the agent: a Unix socket, one request for each connection, one answer.

The gate decides; this is the shell that keeps it from being hurt. Only root is served. A request has a size and a deadline, so have
answers, and so many at once; one more is told to try again, as is whoever meets an error of ours.
"""

from __future__ import annotations

import logging
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import trio

from ztunnel.cni.request import MAX_REQUEST_BYTES, BadRequest, Code, Refusal, Request, answer, parse
from ztunnel.runtime.logs import fields
from ztunnel.runtime.unix_listener import unix_listener

log = logging.getLogger(__name__)

_CHUNK = 64 << 10
_ANSWER_SECONDS = 5.0
_HOPELESS = 4
"""So many times the requests that are answered may wait to be told that they are too many; others are closed."""
_CREDENTIALS = struct.Struct("3i")

Gate = Callable[[Request], Awaitable[Refusal | None]]
"""Answers a request; within `Bounds.gate_seconds`, or the pod is refused."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What callers may take."""

    requests: int = 64
    """At once. A node that starts has all of its pods made at the same time, by a runtime that makes a few at once."""
    request_seconds: float = 10.0
    gate_seconds: float = 20.0

    @property
    def longest_seconds(self) -> float:
        """Until the plugin has its answer, at the latest."""
        return self.request_seconds + self.gate_seconds + _ANSWER_SECONDS


@dataclass(slots=True)
class Endpoint:
    """Serves the plugin.

    Args:
        path: the socket.
        gate: see there.
        on_answer: told of each answer: CNI's command, and `ok` or `refused`.
        on_limit: told of each request that was one too many.
        on_bug: told of each error that the gate let escape, after the log.
    """

    path: Path
    gate: Gate
    bounds: Bounds = Bounds()
    on_answer: Callable[[str, str], None] = lambda _command, _answer: None
    on_limit: Callable[[], None] = lambda: None
    on_bug: Callable[[], None] = lambda: None
    open_requests: int = 0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serves until cancelled. "Started" means that the plugin finds the socket.

        Raises: ListenError.
        """
        with unix_listener(self.path, "cni.socket") as listener:
            async with trio.open_nursery() as nursery:
                await nursery.start(trio.serve_listeners, self._serve, [listener])
                task_status.started()

    async def _serve(self, stream: trio.SocketStream) -> None:
        async with stream:
            if not _is_root(stream):
                log.warning("somebody who is not root talks to the CNI socket")
                return
            if self.open_requests >= _HOPELESS * self.bounds.requests:
                self.on_limit()
                return
            self.open_requests += 1
            try:
                reply = answer(await self._answer(stream))
                with trio.move_on_after(_ANSWER_SECONDS):
                    await stream.send_all(reply)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                # The plugin was killed, or gave up: whoever called it will call again.
                pass
            finally:
                self.open_requests -= 1

    async def _answer(self, stream: trio.SocketStream) -> Refusal | None:
        is_crowd = self.open_requests > self.bounds.requests
        # Read in any case: closing what has not been read resets the connection, and the answer may be lost with it.
        with trio.move_on_after(self.bounds.request_seconds) as reading:
            message = await _read(stream)
        if reading.cancelled_caught:
            return Refusal(Code.TRY_LATER, f"the request did not come within {self.bounds.request_seconds:g} s")
        if is_crowd:
            self.on_limit()
            return Refusal(Code.TRY_LATER, f"more than {self.bounds.requests} pods are being made at once")
        try:
            request = parse(message)
        except BadRequest as error:
            log.warning("bad request of the CNI plugin", extra=fields(problem=error))
            return Refusal(Code.BAD_CONFIGURATION, str(error))
        refusal = await self._ask_gate(request)
        self.on_answer(request.command.value, "ok" if refusal is None else "refused")
        return refusal

    async def _ask_gate(self, request: Request) -> Refusal | None:
        with trio.move_on_after(self.bounds.gate_seconds):
            try:
                return await self.gate(request)
            except Exception:
                log.exception("bug: the CNI gate failed")
                self.on_bug()
                return Refusal(Code.TRY_LATER, "the node agent failed; see its log")
        return Refusal(Code.TRY_LATER, f"no decision within {self.bounds.gate_seconds:g} s")


async def _read(stream: trio.SocketStream) -> bytes:
    """Until the end. One that is too large is read as well, and is nothing."""
    message, too_large = bytearray(), False
    while chunk := await stream.receive_some(_CHUNK):
        too_large = too_large or len(message) + len(chunk) > MAX_REQUEST_BYTES
        if not too_large:
            message += chunk
    return b"" if too_large else bytes(message)


def _is_root(stream: trio.SocketStream) -> bool:
    """unix(7), SO_PEERCRED: who called connect(2)."""
    _, uid, _ = _CREDENTIALS.unpack(stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return int(uid) == 0
