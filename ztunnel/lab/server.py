"""The lab's Unix socket: one request per connection, streams for `watch` and `exec`. Every read, queue and connection is bounded.

`exec` gets the caller's standard input, output and error as file descriptors (SCM_RIGHTS), so bytes never pass through the controller;
after that the connection carries signals one way and the exit code the other, and its end ends the command.
"""

from __future__ import annotations

import array
import logging
import os
import signal
import socket
from contextlib import ExitStack, suppress
from pathlib import Path

import trio

from ztunnel.lab.api import Api, matches, selection
from ztunnel.lab.objects import LabError
from ztunnel.lab.pods import container_names, container_of
from ztunnel.lab.processes import Order, Process, base_environment
from ztunnel.lab.wire import MAX_REQUEST, BadMessage, decode, encode
from ztunnel.mesh.errors import LocalError
from ztunnel.mesh.manifests.tree import Tree, flag, integer, text, texts

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 256
REQUEST_SECONDS = 10.0
SEND_SECONDS = 10.0
WATCH_BACKLOG = 10_000
STDIO = 3
HANG_UP_SECONDS = 1.0
ALLOWED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP, signal.SIGWINCH, signal.SIGUSR1, signal.SIGUSR2)


class Server:
    """The socket's side of the controller."""

    def __init__(self, api: Api, path: Path) -> None:
        self._api = api
        self._path = path
        self._connections = 0

    async def run(self, *, task_status: trio.TaskStatus[list[trio.SocketListener]] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve for ever."""
        listener = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with listener:
            await listener.bind(str(self._path))
            self._path.chmod(0o600)
            listener.listen(64)
            await trio.serve_listeners(self._connection, [trio.SocketListener(listener)], task_status=task_status)

    async def _connection(self, stream: trio.SocketStream) -> None:
        self._connections += 1
        try:
            with stream.socket as sock:
                if self._connections <= MAX_CONNECTIONS:
                    await self._converse(sock)
        except (BrokenPipeError, ConnectionResetError):
            return  # the command line was interrupted
        except (OSError, trio.TooSlowError) as error:
            log.warning("request failed: %s", error)
        finally:
            self._connections -= 1

    async def _converse(self, sock: trio.socket.SocketType) -> None:
        with ExitStack() as stack:
            try:
                with trio.fail_after(REQUEST_SECONDS):
                    line, fds = await _receive(sock, stack)
                request = decode(line)
                match text(request, "verb"):
                    case "watch":
                        await self._watch(sock, request)
                    case "exec":
                        await self._exec(sock, request, fds)
                    case _:
                        await _send(sock, {"ok": await self._api.answer(request)})
            except LocalError as error:
                await _send(sock, {"error": str(error), "reason": getattr(error, "reason", "")})

    async def _watch(self, sock: trio.socket.SocketType, request: Tree) -> None:
        """Tell about the selected objects, then about each change, until the caller hangs up."""
        kind, namespace, terms = selection(request)
        name = text(request, "name")
        send, receive = trio.open_memory_channel[Tree](WATCH_BACKLOG)

        def listen(event: str, body: Tree) -> None:
            if matches(body, kind, namespace, terms) and name in ("", text(body, "metadata", "name")):
                try:
                    send.send_nowait({"event": event, "object": body})
                except trio.WouldBlock:
                    send.close()  # the caller does not read: it gets what is queued, and then the end

        for body in self._api.site.cluster.select(kind, namespace, terms):
            listen("ADDED", body)
        self._api.site.cluster.listeners.append(listen)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_until_hang_up, sock, nursery.cancel_scope)
                # Out of a nursery errors come in groups, which the connection's own handling would not know.
                with suppress(OSError, trio.TooSlowError):
                    async for message in receive:
                        await _send(sock, message)
                nursery.cancel_scope.cancel()
        finally:
            self._api.site.cluster.listeners.remove(listen)

    async def _exec(self, sock: trio.socket.SocketType, request: Tree, fds: list[int]) -> None:
        if len(fds) != STDIO:
            raise LabError("BadRequest", "exec needs three file descriptors")
        order = self._order(request)
        process = self._api.site.processes.start(order, *fds)
        for fd in fds:
            os.close(fd)
        fds.clear()
        try:
            await _send(sock, {"started": True})
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_forward_signals, sock, process)
                await process.ended.wait()
                nursery.cancel_scope.cancel()
            await _send(sock, {"exit": process.code})
        finally:
            if process.code is None:
                process.signal(signal.SIGHUP, group=True)
                with trio.move_on_after(HANG_UP_SECONDS, shield=True):
                    await process.ended.wait()
            process.signal(signal.SIGKILL, group=True)

    def _order(self, request: Tree) -> Order:
        argv, tty = texts(request, "argv"), flag(request, "tty")
        if not argv:
            raise LabError("", "you must specify at least one command for the container")
        site, name, namespace = self._api.site, text(request, "name"), text(request, "namespace")
        node = self._api.node_of(namespace, name)
        if node or name == "fabric":
            netns = site.nodes[node].fd if node else site.fabric
            return Order(argv=argv, env=base_environment() | {"NODE_NAME": node}, netns=netns, tty=tty)
        run = self._api.run_of(namespace, name)
        container = container_of(run.pod, text(request, "container"))
        if container is None:
            raise LabError(
                "BadRequest",
                f"container {text(request, 'container')} is not valid for pod {run.key.name} out of: {', '.join(container_names(run.pod))}",
            )
        return run.order(container, argv, tty)


async def _forward_signals(sock: trio.socket.SocketType, process: Process) -> None:
    """Deliver the signals that the caller sends; its hanging up, or nonsense, ends the command."""
    with suppress(OSError, LocalError):
        await _hear_signals(sock, process)
    process.signal(signal.SIGHUP, group=True)
    with trio.move_on_after(HANG_UP_SECONDS):
        await process.ended.wait()
    process.signal(signal.SIGKILL, group=True)


async def _hear_signals(sock: trio.socket.SocketType, process: Process) -> None:
    pending = b""
    while data := await sock.recv(4096):
        pending += data
        if len(pending) > 4096:
            raise BadMessage("a signal is a short message")
        *lines, pending = pending.split(b"\n")
        for line in lines:
            number = integer(decode(line), "signal")
            if number in ALLOWED_SIGNALS:
                process.signal(number, group=True)


async def _until_hang_up(sock: trio.socket.SocketType, scope: trio.CancelScope) -> None:
    with suppress(OSError):
        while await sock.recv(1024):
            continue
    scope.cancel()


async def _receive(sock: trio.socket.SocketType, stack: ExitStack) -> tuple[bytes, list[int]]:
    """The request's line and the descriptors that came with it, which are closed with `stack` if they still are in the list."""
    line, fds = bytearray(), array.array("i")
    room = socket.CMSG_SPACE(STDIO * fds.itemsize)
    kept: list[int] = []
    stack.callback(_close_all, kept)
    while not line.endswith(b"\n"):
        data, ancillary, _, _ = await sock.recvmsg(1 << 16, room, socket.MSG_CMSG_CLOEXEC)
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                received = array.array("i")
                received.frombytes(payload[: len(payload) - len(payload) % received.itemsize])
                kept.extend(received)
        if not data:
            raise ConnectionResetError("the caller hung up before its request was whole")
        line += data
        if len(line) > MAX_REQUEST:
            raise BadMessage(f"a request is at most {MAX_REQUEST} bytes")
    return bytes(line), kept


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


async def _send(sock: trio.socket.SocketType, message: Tree) -> None:
    """Send one line, to a caller that reads it in time."""
    data = memoryview(encode(message))
    with trio.fail_after(SEND_SECONDS):
        while data:
            data = data[await sock.send(data) :]
