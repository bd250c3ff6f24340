"""The agent's side of the CNI socket: who is served, how much, how long. In namespaces for the sake of root, whom alone it serves."""

from __future__ import annotations

import logging
import os
import socket
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from tests.kit.polling import eventually_async
from ztunnel.cni.endpoint import Bounds, Endpoint
from ztunnel.cni.request import GREETING, MAX_REQUEST_BYTES, Code, Refusal, Request

ADD = GREETING + b"CNI_COMMAND=ADD\0CNI_CONTAINERID=c\0CNI_NETNS=/n\0CNI_IFNAME=eth0\0CNI_ARGS=\0{}"
DEFAULTS = Bounds()


@dataclass
class Gate:
    """Answers as it is told; None as an error: a mistake of ours."""

    reply: Refusal | None = None
    fails: bool = False
    opened: trio.Event | None = None
    asked: list[Request] = field(default_factory=list)

    async def __call__(self, request: Request) -> Refusal | None:
        self.asked.append(request)
        if self.opened is not None:
            await self.opened.wait()
        if self.fails:
            raise RuntimeError("a mistake of ours")
        return self.reply


@asynccontextmanager
async def serving(path: Path, gate: Gate, bounds: Bounds = DEFAULTS) -> AsyncIterator[Endpoint]:
    async with trio.open_nursery() as nursery:
        endpoint = Endpoint(path, gate, bounds)
        await nursery.start(endpoint.run)
        yield endpoint
        nursery.cancel_scope.cancel()
    assert path.name not in os.listdir(path.parent)


async def ask(path: Path, message: bytes) -> bytes:
    stream = await trio.open_unix_socket(path)
    async with stream:
        try:
            await stream.send_all(message)
            await stream.send_eof()
        except trio.BrokenResourceError:
            pass  # answered before we were done
        return b"".join([chunk async for chunk in stream])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cni.sock"


async def test_answers(path: Path) -> None:
    told: list[tuple[str, str]] = []
    gate = Gate()
    async with serving(path, gate) as endpoint:
        endpoint.on_answer = lambda command, answer: told.append((command, answer))
        assert os.stat(path).st_mode & 0o777 == 0o600
        assert await ask(path, ADD) == b"ok\n"
        gate.reply = Refusal(Code.TRY_LATER, "not yet")
        assert await ask(path, ADD) == b"refused 11 not yet\n"
    assert [request.container for request in gate.asked] == ["c", "c"]
    assert told == [("ADD", "ok"), ("ADD", "refused")]


@pytest.mark.parametrize("message", [b"", b"nonsense", ADD[:-1], ADD.replace(b"ADD", b"VERSION"), ADD + b" " * MAX_REQUEST_BYTES])
async def test_what_is_no_request_never_reaches_the_gate(path: Path, message: bytes) -> None:
    gate = Gate()
    async with serving(path, gate):
        assert (await ask(path, message)).startswith(b"refused 7 ")
    assert gate.asked == []


async def test_who_does_not_speak_is_not_waited_for(path: Path) -> None:
    async with serving(path, Gate(), Bounds(request_seconds=0.05)), await trio.open_unix_socket(path) as silent:
        assert b"did not come within 0.05 s" in b"".join([chunk async for chunk in silent])


async def test_a_gate_that_does_not_answer_is_not_waited_for(path: Path) -> None:
    async with serving(path, Gate(opened=trio.Event()), Bounds(gate_seconds=0.05)):
        assert await ask(path, ADD) == b"refused 11 no decision within 0.05 s\n"


async def test_one_too_many_is_told_to_come_again(path: Path) -> None:
    limits: list[int] = []
    opened = trio.Event()
    async with serving(path, Gate(opened=opened), Bounds(requests=2)) as endpoint, trio.open_nursery() as nursery:
        endpoint.on_limit = lambda: limits.append(1)
        for _ in range(2):
            nursery.start_soon(ask, path, ADD)
        await eventually_async(lambda: endpoint.open_requests == 2, within=30)
        assert await ask(path, ADD) == b"refused 11 more than 2 pods are being made at once\n"
        opened.set()
        await eventually_async(lambda: endpoint.open_requests == 0, within=30)
        assert await ask(path, ADD) == b"ok\n"
    assert limits == [1]


async def test_a_mistake_of_ours_costs_one_request(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gate, bugs = Gate(fails=True), list[int]()
    async with serving(path, gate) as endpoint:
        endpoint.on_bug = lambda: bugs.append(1)
        with caplog.at_level(logging.CRITICAL + 1):
            assert (await ask(path, ADD)).startswith(b"refused 11 the node agent failed")
        gate.fails = False
        assert await ask(path, ADD) == b"ok\n"
    assert bugs == [1]


async def test_whoever_goes_away_is_forgotten(path: Path) -> None:
    opened = trio.Event()
    async with serving(path, Gate(opened=opened)) as endpoint:
        stream = await trio.open_unix_socket(path)
        await stream.send_all(ADD)
        await stream.send_eof()
        await eventually_async(lambda: endpoint.open_requests == 1, within=30)
        await stream.aclose()
        opened.set()
        await eventually_async(lambda: endpoint.open_requests == 0, within=30)


def connected_as(uid: int, path: Path) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    os.seteuid(uid)
    try:
        made.connect(str(path))
    except BaseException:
        made.close()
        raise
    finally:
        os.seteuid(0)
    made.setblocking(False)
    return made


async def test_only_root_is_served() -> None:
    if os.stat("/proc/1").st_uid == 65534:
        pytest.skip("there is no second user in this user namespace")
    gate = Gate()
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        path = Path(directory, "cni.sock")
        async with serving(path, gate):
            with pytest.raises(PermissionError):
                connected_as(65534, path)
            os.chmod(path, 0o666)  # somebody had a way in
            with connected_as(65534, path) as stranger:
                stream = trio.SocketStream(trio.socket.from_stdlib_socket(stranger))
                try:
                    await stream.send_all(ADD)
                    assert b"".join([chunk async for chunk in stream]) == b""
                except trio.BrokenResourceError:
                    pass
    assert gate.asked == []


async def test_a_flood_is_closed(path: Path) -> None:
    async with serving(path, Gate(), Bounds(requests=1)) as endpoint:
        held = [await trio.open_unix_socket(path) for _ in range(4)]
        await eventually_async(lambda: endpoint.open_requests == 4, within=30)
        async with await trio.open_unix_socket(path) as one_more:
            assert b"".join([chunk async for chunk in one_more]) == b""
        for each in held:
            await each.aclose()
