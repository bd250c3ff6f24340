"""The lab's socket and callers that hang up, stop reading or talk nonsense: each ends its own request and nothing else."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
import trio.testing

from ztunnel.lab.server import SEND_SECONDS, Server
from ztunnel.lab.wire import encode

BODIES = [{"kind": "Pod", "metadata": {"name": f"p{number}", "namespace": "default"}, "text": "x" * 100_000} for number in range(50)]
"""More than a Unix socket holds."""


class Command:
    """A command that ends when it is told to."""

    def __init__(self) -> None:
        self.code: int | None = None
        self.ended = trio.Event()

    def signal(self, _number: int, *, group: bool) -> None:
        self.code = -1
        self.ended.set()


class Api:
    """Some objects, and a fabric to run commands in."""

    def __init__(self) -> None:
        cluster = SimpleNamespace(listeners=[], select=lambda *_: BODIES)
        processes = SimpleNamespace(start=lambda *_: Command())
        self.site = SimpleNamespace(cluster=cluster, processes=processes, fabric=0, nodes={})

    async def answer(self, _request: object) -> str:
        return "well"

    def node_of(self, _namespace: str, _name: str) -> str:
        return ""


@asynccontextmanager
async def serving(path: Path) -> AsyncIterator[Callable[[], socket.socket]]:
    """A server that still answers at the end; gives a way to connect to it."""

    def connect() -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(path))
        return sock

    async with trio.open_nursery() as nursery:
        await nursery.start(Server(cast(Any, Api()), path).run)
        yield connect
        with trio.socket.from_stdlib_socket(connect()) as last:
            await last.send(encode({"verb": "status"}))
            assert await last.recv(100) == encode({"ok": "well"})
        nursery.cancel_scope.cancel()


async def test_a_watcher_that_hangs_up(tmp_path: Path) -> None:
    async with serving(tmp_path / "s") as connect:
        with connect() as sock:
            sock.sendall(encode({"verb": "watch", "kind": "Pod"}))
            await trio.testing.wait_all_tasks_blocked(0.05)


async def test_a_watcher_that_does_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ztunnel.lab.server.SEND_SECONDS", SEND_SECONDS / 100)
    async with serving(tmp_path / "s") as connect:
        with connect() as sock:
            sock.sendall(encode({"verb": "watch", "kind": "Pod"}))
            await trio.sleep(SEND_SECONDS / 50)


async def test_nonsense_instead_of_a_signal_ends_the_command(tmp_path: Path) -> None:
    async with serving(tmp_path / "s") as connect:
        caller, ends = connect(), [os.dup(2) for _ in range(3)]
        socket.send_fds(caller, [encode({"verb": "exec", "name": "fabric", "argv": ["x"]})], ends)
        for end in ends:
            os.close(end)
        with trio.socket.from_stdlib_socket(caller) as sock:
            assert await sock.recv(100) == encode({"started": True})
            await sock.send(b"nonsense\n")
            assert await sock.recv(100) == encode({"exit": -1})
