"""The small HTTP server over memory streams: well-formed, hostile and slow clients."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
import trio
import trio.testing

from ztunnel.runtime.http import BadRequest, Bounds, HttpServer, Request, Response

BOUNDS = Bounds(header_bytes=1024, body_bytes=256, connections=2, requests=3)


async def echo(request: Request) -> Response:
    if request.path == "/bug":
        raise KeyError("ours")
    if request.path == "/bad":
        raise BadRequest(404, "no such thing")
    if request.path == "/slow":
        await trio.sleep_forever()
    text = f"{request.method} {request.path} {json.dumps(request.query)} {len(request.body)}"
    return Response(200, text.encode(), headers=(("x-test", "1"),))


async def talk(sent: bytes, server: HttpServer | None = None, *, half_close: bool = True) -> bytes:
    """What the server answers to these bytes, until it closes."""
    ours, theirs = trio.testing.memory_stream_pair()
    answer = bytearray()
    async with trio.open_nursery() as nursery:
        nursery.start_soon((server or HttpServer(echo, BOUNDS)).serve, theirs)
        await ours.send_all(sent)
        if half_close:
            await ours.send_eof()
        async for data in ours:
            answer += data
    return bytes(answer)


def statuses(answer: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+)", answer)]


async def test_get_head_and_post() -> None:
    answer = await talk(b"GET /a/b?x=1&y= HTTP/1.1\r\nHost: x\r\n\r\n")
    assert answer.endswith(b'GET /a/b {"x": "1", "y": ""} 0')
    assert b"x-test: 1\r\n" in answer
    answer = await talk(b"HEAD /a HTTP/1.1\r\nHost: x\r\n\r\n")
    assert answer.endswith(b"\r\n\r\n")
    assert b"content-length: 12" in answer
    answer = await talk(b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc")
    assert answer.endswith(b"POST /a {} 3")
    answer = await talk(b"POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n")
    assert answer.endswith(b"POST /a {} 3")


async def test_keep_alive_and_pipelining_up_to_a_number_of_requests() -> None:
    answer = await talk(b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n" * 5, half_close=False)
    assert statuses(answer) == [200, 200, 200]
    answer = await talk(b"GET /a HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" * 2, half_close=False)
    assert statuses(answer) == [200]
    answer = await talk(b"GET /a HTTP/1.0\r\n\r\n", half_close=False)
    assert statuses(answer) == [200]


async def test_expect_continue() -> None:
    answer = await talk(b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n", half_close=True)
    assert statuses(answer)[0] == 100


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\n bad\x00: 1\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"GET http://[::1 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET /?" + b"&".join(b"a=%d" % number for number in range(40)) + b" HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 2000, 431),
        (b"G" * 5000, 431),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 300\r\n\r\n" + b"z" * 300, 413),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\na", 400),
    ],
)
async def test_hostile_input_is_refused_and_the_connection_ends(sent: bytes, status: int) -> None:
    answer = await talk(sent)
    assert statuses(answer) == [status]
    assert b"connection: close" in answer.lower()


async def test_any_bytes_end_in_an_answer_or_a_close() -> None:
    chance = random.Random(15021)
    for _ in range(200):
        await talk(b"GET / HTTP/1.1\r\n"[: chance.randrange(17)] + chance.randbytes(chance.randrange(300)))


async def test_a_bug_costs_one_request() -> None:
    bugs: list[int] = []
    server = HttpServer(echo, BOUNDS, on_bug=lambda: bugs.append(1))
    answer = await talk(
        b"GET /bug HTTP/1.1\r\nHost: x\r\n\r\nGET /bad HTTP/1.1\r\nHost: x\r\n\r\nGET /a HTTP/1.1\r\nHost: x\r\n\r\n", server
    )
    assert statuses(answer) == [500, 404, 200]
    assert b"KeyError" not in answer
    assert bugs == [1]


async def test_a_slow_handler_is_503(mock_clock: trio.testing.MockClock) -> None:
    assert statuses(await talk(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")) == [503]
    assert trio.current_time() == pytest.approx(30)


@pytest.mark.parametrize(
    ("sent", "expected", "seconds"),
    [
        (b"", [], 5),
        (b"GET / HT", [408], 5),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nab", [408], 10),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", [200], 60),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\nGET / HT", [200, 408], 5),
    ],
)
async def test_silence_ends_the_connection(sent: bytes, expected: list[int], seconds: float, mock_clock: trio.testing.MockClock) -> None:
    assert statuses(await talk(sent, half_close=False)) == expected
    assert trio.current_time() == pytest.approx(seconds)


async def test_a_drip_of_bytes_does_not_extend_the_deadline(mock_clock: trio.testing.MockClock) -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(HttpServer(echo, BOUNDS).serve, theirs)

        async def drip() -> None:
            while True:
                await ours.send_all(b"G")
                await trio.sleep(1)

        nursery.start_soon(drip)
        assert statuses(bytes(await ours.receive_some(1000))) == [408]
        nursery.cancel_scope.cancel()
    assert trio.current_time() == pytest.approx(5)


async def test_a_client_that_does_not_take_its_answer_is_dropped(mock_clock: trio.testing.MockClock) -> None:
    ours, theirs = trio.testing.lockstep_stream_pair()
    server = HttpServer(echo, BOUNDS)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve, theirs)
        await ours.send_all(b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n")
    assert server.open_connections == 0
    assert trio.current_time() == pytest.approx(30)


async def test_connections_are_bounded() -> None:
    limits: list[int] = []
    server = HttpServer(echo, BOUNDS, on_limit=lambda: limits.append(1))
    pairs = [trio.testing.memory_stream_pair() for _ in range(3)]
    async with trio.open_nursery() as nursery:
        for _, theirs in pairs:
            nursery.start_soon(server.serve, theirs)
            await trio.testing.wait_all_tasks_blocked()
        assert await pairs[0][0].receive_some(10) == b"", "the one that was silent for longest makes room"
        assert limits == [1]
        await pairs[1][0].aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert server.open_connections == 1
        assert statuses(await talk(b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n", server)) == [200]
        nursery.cancel_scope.cancel()
    assert server.open_connections == 0


@pytest.mark.parametrize(
    "held", [b"", b"GET /a HTTP/1.1\r\n", b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n", b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\n"]
)
async def test_slow_clients_lock_nobody_out(held: bytes) -> None:
    """Whether they say nothing, not all of it, or ask again and again."""
    server = HttpServer(echo, BOUNDS)
    async with trio.open_nursery() as nursery:
        for _ in range(2):
            ours, theirs = trio.testing.memory_stream_pair()
            nursery.start_soon(server.serve, theirs)
            await ours.send_all(held)
            await trio.testing.wait_all_tasks_blocked()
        for _ in range(5):
            assert statuses(await talk(b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n", server)) == [200]
        nursery.cancel_scope.cancel()


async def test_a_connection_that_waits_for_us_is_not_ended_for_another() -> None:
    server = HttpServer(echo, BOUNDS)
    async with trio.open_nursery() as nursery:
        for _ in range(2):
            ours, theirs = trio.testing.memory_stream_pair()
            nursery.start_soon(server.serve, theirs)
            await ours.send_all(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
            await trio.testing.wait_all_tasks_blocked()
        ours, theirs = trio.testing.memory_stream_pair()
        await server.serve(theirs)
        assert await ours.receive_some(10) == b""
        assert server.open_connections == 2
        nursery.cancel_scope.cancel()


async def test_it_serves_tcp_and_unix_listeners(tmp_path: Path) -> None:
    unix = trio.socket.socket(trio.socket.AF_UNIX)
    await unix.bind(str(tmp_path / "s"))
    unix.listen(4)
    (tcp,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        await nursery.start(HttpServer(echo, BOUNDS).run, [trio.SocketListener(unix), tcp])
        port = tcp.socket.getsockname()[1]
        streams: list[trio.SocketStream] = [await trio.open_unix_socket(str(tmp_path / "s")), await trio.open_tcp_stream("127.0.0.1", port)]
        for stream in streams:
            async with stream:
                await stream.send_all(b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n")
                assert statuses(bytes(await stream.receive_some(1000))) == [200]
        nursery.cancel_scope.cancel()


async def test_clients_that_do_not_read_hold_no_copy_of_the_answer_each() -> None:
    body = bytes(1 << 16)
    sent: list[object] = []

    class Unread(trio.abc.SendStream):
        async def send_all(self, data: bytes | bytearray | memoryview) -> None:
            sent.append(data)

        async def wait_send_all_might_not_block(self) -> None:
            pass

        async def aclose(self) -> None:
            pass

    async def large(_: Request) -> Response:
        return Response(200, body)

    receiving = trio.testing.MemoryReceiveStream()
    receiving.put_data(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    receiving.put_eof()
    await HttpServer(large, BOUNDS).serve(trio.StapledStream(Unread(), receiving))
    assert any(part is body for part in sent)
