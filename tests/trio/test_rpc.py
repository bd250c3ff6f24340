"""gRPC over real loopback connections: our client and our server together, and callers that do not behave."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import h2.events
import h2.settings
import pytest
import trio
import trio.testing

from tests.kit.pki import FakePki
from tests.kit.polling import eventually_async
from tests.kit.rpc import raw_client, serving
from ztunnel.rpc.client import Target, unary
from ztunnel.rpc.messages import RpcError, Status, framed, request_headers
from ztunnel.rpc.server import Bounds, Call
from ztunnel.rpc.tls import TlsError, client_context, server_context

PKI = FakePki()
PATH = "/test.Service/Echo"


async def echo(call: Call) -> bytes:
    match call.message:
        case b"refuse":
            raise RpcError(Status.PERMISSION_DENIED, "no, 100 % no: ä")
        case b"bug":
            raise KeyError("ours")
        case b"hang":
            await trio.sleep_forever()
    return call.metadata.get("x-test", "").encode() + call.message + call.peer.encode()


async def ask(target: Target, message: bytes, seconds: float = 30.0, path: str = PATH, pki: FakePki = PKI) -> bytes:
    return await unary(target, client_context(pki.root_pem), path, message, {"x-test": "meta:"}, seconds)


async def refused(target: Target, message: bytes = b"x", seconds: float = 30.0, path: str = PATH, pki: FakePki = PKI) -> RpcError:
    with pytest.raises(RpcError) as caught:
        await ask(target, message, seconds, path, pki)
    return caught.value


async def test_a_call_and_its_answer() -> None:
    async with serving(PKI, {PATH: echo}) as (target, server):
        assert await ask(target, b"hello ") == b"meta:hello 127.0.0.1"
        await eventually_async(lambda: server.open_connections == 0, within=30)


async def test_messages_larger_than_windows_pass_both_ways() -> None:
    async with serving(PKI, {PATH: echo}, Bounds(message_bytes=1 << 20)) as (target, _):
        large = bytes(500_000)
        assert len(await ask(target, large)) == len(large) + 14


@pytest.mark.parametrize(
    ("message", "path", "status", "text"),
    [
        (b"refuse", PATH, Status.PERMISSION_DENIED, "no, 100 % no: ä"),
        (b"bug", PATH, Status.INTERNAL, "internal error; see the server's log"),
        (b"x", "/test.Service/Other", Status.UNIMPLEMENTED, "no such method"),
        (bytes(100_001), PATH, Status.RESOURCE_EXHAUSTED, "a message of 100001 bytes; 100000 are taken"),
    ],
)
async def test_refusals_reach_the_caller(message: bytes, path: str, status: Status, text: str) -> None:
    async with serving(PKI, {PATH: echo}, Bounds(message_bytes=100_000)) as (target, _):
        error = await refused(target, message, path=path)
        assert (error.status, error.text) == (status, text)


async def test_a_method_that_takes_too_long_is_given_up() -> None:
    async with serving(PKI, {PATH: echo}, Bounds(answer_seconds=2)) as (target, _):
        error = await refused(target, b"hang")
        assert (error.status, error.text) == (Status.DEADLINE_EXCEEDED, "no answer in time")


async def test_bugs_are_counted() -> None:
    found: list[int] = []
    async with serving(PKI, {PATH: echo}) as (target, server):
        server.on_bug = lambda: found.append(1)
        await refused(target, b"bug")
    assert found == [1]


async def test_the_callers_deadline_counts_at_both_ends() -> None:
    async with serving(PKI, {PATH: echo}) as (target, _):
        assert (await refused(target, b"hang", 0.3)).status is Status.DEADLINE_EXCEEDED


async def test_servers_that_cannot_be_trusted_or_reached() -> None:
    async with serving(PKI, {PATH: echo}) as (target, _):
        error = await refused(target, pki=FakePki())
        assert error.status is Status.UNAVAILABLE
        assert "certificate" in error.text
        error = await refused(Target(target.host, target.port, "other.test"))
        assert "Hostname mismatch" in error.text
    listener = trio.socket.socket()
    await listener.bind(("127.0.0.1", 0))
    error = await refused(Target("127.0.0.1", listener.getsockname()[1]))
    listener.close()
    assert "cannot connect" in error.text


async def test_many_calls_at_once_on_one_connection() -> None:
    async with serving(PKI, {PATH: echo}, Bounds(streams=5)) as (target, _), raw_client(PKI, target) as client:
        client.http.initiate_connection()
        for number in range(1, 11, 2):
            client.http.send_headers(number, request_headers("x", PATH, 30, {}))
            client.http.send_data(number, framed(b"%d" % number), end_stream=True)
        await client.flush()
        ended = [await client.next(h2.events.TrailersReceived) for _ in range(5)]
        assert all((b"grpc-status", b"0") in (event.headers or []) for event in ended if isinstance(event, h2.events.TrailersReceived))


async def test_a_caller_without_http2_is_left() -> None:
    async with serving(PKI, {PATH: echo}) as (target, _), raw_client(PKI, target, alpn="http/1.1") as client:
        assert await client.until_closed() == b""


def no_preface() -> bytes:
    return b""


def half_a_preface() -> bytes:
    return b"PRI * HTTP"


def another_protocol() -> bytes:
    return b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


def unknown_frames_of_the_largest_kind() -> bytes:
    return b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff\xff\xff\x00\x00\x00\x00\x00\x01"


def endless_continuations() -> bytes:
    frames = b"\0\0\1\1\0\0\0\0\1\x82" + b"\0\0\0\x09\0\0\0\0\1" * 500
    return b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0" + frames


@pytest.mark.parametrize(
    "hostile", [no_preface, half_a_preface, another_protocol, unknown_frames_of_the_largest_kind, endless_continuations]
)
async def test_hostile_bytes_end_their_connection_only(hostile: Callable[[], bytes]) -> None:
    async with serving(PKI, {PATH: echo}, Bounds(idle_seconds=0.3)) as (target, server), raw_client(PKI, target) as client:
        try:
            await client.stream.send_all(hostile())
        except trio.BrokenResourceError:
            # Closed already: it was silent for too long.
            pass
        await client.until_closed()
        await eventually_async(lambda: server.open_connections == 0, within=30)
        server.bounds = Bounds()
        assert await ask(target, b"") == b"meta:127.0.0.1"


@pytest.mark.parametrize("ending", [b"\0\0\x08\7\0\0\0\0\0" + bytes(8), b"\0\0\1\6\0\0\0\0\0x"], ids=["GOAWAY", "nonsense"])
async def test_a_caller_that_ends_its_connection_during_a_call_costs_nobody_else_anything(ending: bytes) -> None:
    asked, may_answer, answered = trio.Event(), trio.Event(), trio.Event()

    async def slow(call: Call) -> bytes:
        if call.message == b"slow":
            asked.set()
            try:
                await may_answer.wait()
            finally:
                answered.set()
        return call.message

    async with serving(PKI, {PATH: slow}) as (target, server):
        async with raw_client(PKI, target) as client:
            client.http.initiate_connection()
            client.http.send_headers(1, request_headers("x", PATH, 30.0, {}))
            client.http.send_data(1, framed(b"slow"), end_stream=True)
            await client.flush()
            await asked.wait()
            await client.stream.send_all(ending)
            await trio.testing.wait_all_tasks_blocked(0.05)
            may_answer.set()
            await answered.wait()
            assert await ask(target, b"other", pki=PKI) == b"other"
        await eventually_async(lambda: server.open_connections == 0, within=30)


async def test_an_error_that_nobody_foresaw_ends_its_connection_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_self: object, _data: bytes) -> list[h2.events.Event]:
        raise KeyError("ours")

    async with serving(PKI, {PATH: echo}) as (target, server):
        bugs: list[bool] = []
        server.on_bug = lambda: bugs.append(True)
        async with raw_client(PKI, target) as client:
            with monkeypatch.context() as patched:
                patched.setattr("h2.connection.H2Connection.receive_data", broken)
                await client.stream.send_all(b"x")
                await eventually_async(lambda: bool(bugs), within=30)
        assert await ask(target, b"") == b"meta:127.0.0.1"


async def test_calls_taken_back_without_end_close_the_connection() -> None:
    async with serving(PKI, {PATH: echo}, Bounds(resets=5)) as (target, _), raw_client(PKI, target) as client:
        client.http.initiate_connection()
        for number in range(1, 41, 2):
            client.http.send_headers(number, request_headers("x", PATH, 30, {}))
            client.http.reset_stream(number)
        await client.flush()
        await client.next(h2.events.ConnectionTerminated)


async def test_a_connection_takes_so_many_calls_and_no_more() -> None:
    async with serving(PKI, {PATH: echo}, Bounds(calls=2)) as (target, _), raw_client(PKI, target) as client:
        client.http.initiate_connection()
        for number in (1, 3):
            client.http.send_headers(number, request_headers("x", PATH, 30, {}))
            client.http.send_data(number, framed(b""), end_stream=True)
            await client.flush()
            await client.next(h2.events.TrailersReceived)
        event = await client.next(h2.events.ConnectionTerminated)
        assert isinstance(event, h2.events.ConnectionTerminated)
        assert event.error_code == 0


async def test_an_old_connection_is_told_to_go() -> None:
    async with serving(PKI, {PATH: echo}, Bounds(life_seconds=2)) as (target, _), raw_client(PKI, target) as client:
        client.http.initiate_connection()
        await client.flush()
        await client.next(h2.events.ConnectionTerminated)
        await client.until_closed()


@pytest.mark.parametrize("sent", [b"", framed(b"abc")[:-1]])
async def test_a_call_that_does_not_arrive_is_answered_all_the_same(sent: bytes) -> None:
    async with serving(PKI, {PATH: echo}, Bounds(request_seconds=0.3)) as (target, _), raw_client(PKI, target) as client:
        client.http.initiate_connection()
        client.http.send_headers(1, request_headers("x", PATH, 30, {}))
        client.http.send_data(1, sent)
        await client.flush()
        event = await client.next(h2.events.ResponseReceived)
        assert isinstance(event, h2.events.ResponseReceived)
        assert (b"grpc-status", b"4") in (event.headers or [])


@pytest.mark.parametrize("sent", [b"", framed(b"a") + framed(b"b"), framed(b"abc")[:-1]])
async def test_a_call_is_one_whole_message(sent: bytes) -> None:
    async with serving(PKI, {PATH: echo}) as (target, _), raw_client(PKI, target) as client:
        client.http.initiate_connection()
        client.http.send_headers(1, request_headers("x", PATH, 30, {}))
        client.http.send_data(1, sent, end_stream=True)
        await client.flush()
        event = await client.next(h2.events.ResponseReceived)
        assert isinstance(event, h2.events.ResponseReceived)
        assert (b"grpc-status", b"3") in (event.headers or [])


async def test_a_caller_that_takes_no_answer_is_left() -> None:
    async with serving(PKI, {PATH: echo}, Bounds(answer_seconds=0.5)) as (target, server), raw_client(PKI, target) as client:
        client.http.local_settings = h2.settings.Settings(initial_values={h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 0})
        client.http.initiate_connection()
        client.http.send_headers(1, request_headers("x", PATH, 30, {}))
        client.http.send_data(1, framed(b"abc"), end_stream=True)
        await client.flush()
        await client.until_closed()
        await eventually_async(lambda: server.open_connections == 0, within=30)


@pytest.mark.parametrize("bounds", [Bounds(connections=1), Bounds(connections_per_address=1)], ids=["all", "of one address"])
async def test_one_connection_too_many_ends_the_idlest(bounds: Bounds) -> None:
    limits: list[int] = []
    async with serving(PKI, {PATH: echo}, bounds) as (target, server), raw_client(PKI, target) as client:
        server.on_limit = lambda: limits.append(1)
        client.http.initiate_connection()
        await client.flush()
        await eventually_async(lambda: bool(server.idle), within=30)
        assert await ask(target, b"") == b"meta:127.0.0.1"
        await client.until_closed()
    assert limits == [1]


async def test_one_address_does_not_take_the_places_of_others() -> None:
    async with serving(PKI, {PATH: echo}, Bounds(connections_per_address=1)) as (target, server), raw_client(PKI, target) as busy:
        busy.http.initiate_connection()
        busy.http.send_headers(1, request_headers("x", PATH, 30.0, {}))
        busy.http.send_data(1, framed(b"hang"), end_stream=True)
        await busy.flush()
        await eventually_async(lambda: server.open_connections == 1 and not server.idle, within=30)
        with pytest.raises((trio.BrokenResourceError, ssl.SSLError)):
            async with raw_client(PKI, target):
                pass
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.run, listeners)
            port = listeners[0].socket.getsockname()[1]
            async with other_address(port) as stream:
                await stream.send_all(b"x")
                await eventually_async(lambda: server.open_connections == 2, within=30)
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def other_address(port: int) -> AsyncIterator[trio.SocketStream]:
    """A connection from another address of this machine than everybody else's."""
    with trio.socket.socket() as socket:
        await socket.bind(("127.0.0.2", 0))
        await socket.connect(("127.0.0.1", port))
        yield trio.SocketStream(socket)


async def test_calls_under_way_hold_so_much_together_and_no_more() -> None:
    bounds = Bounds(message_bytes=1000, header_bytes=1000, held_bytes=5000)
    async with serving(PKI, {PATH: echo}, bounds) as (target, _), raw_client(PKI, target) as client:
        client.http.initiate_connection()
        for number in range(1, 21, 2):
            client.http.send_headers(number, request_headers("x", PATH, 30.0, {}))
            client.http.send_data(number, framed(bytes(999))[:-1])
        await client.flush()
        event = await client.next(h2.events.ResponseReceived)
        assert isinstance(event, h2.events.ResponseReceived)
        assert (b"grpc-status", b"%d" % Status.RESOURCE_EXHAUSTED) in (event.headers or [])


async def test_a_drain_ends_what_is_idle_and_answers_what_is_under_way() -> None:
    entered, leave = trio.Event(), trio.Event()

    async def wait(call: Call) -> bytes:
        entered.set()
        await leave.wait()
        return b"done"

    async with serving(PKI, {PATH: wait}) as (target, server), raw_client(PKI, target) as idle, raw_client(PKI, target) as busy:
        for client in (idle, busy):
            client.http.initiate_connection()
        busy.http.send_headers(1, request_headers("x", PATH, 30, {}))
        busy.http.send_data(1, framed(b""), end_stream=True)
        await busy.flush()
        await entered.wait()
        await idle.flush()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.drain)
            await idle.until_closed()
            leave.set()
            await busy.next(h2.events.TrailersReceived)
            await busy.until_closed()
        assert server.open_connections == 0


def test_credentials_that_cannot_be_used_are_refused() -> None:
    credentials, others = PKI.credentials(), PKI.credentials()
    with pytest.raises(TlsError):
        server_context(credentials.chain_pem, others.key_pem)
    with pytest.raises(TlsError):
        server_context(b"", b"")
    with pytest.raises(TlsError):
        client_context(b"no certificate")


def test_only_tls_1_3_is_spoken() -> None:
    credentials = PKI.credentials()
    context = server_context(credentials.chain_pem, credentials.key_pem)
    assert context.minimum_version is ssl.TLSVersion.TLSv1_3
