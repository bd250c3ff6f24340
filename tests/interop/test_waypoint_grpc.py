"""The reference gRPC, client and server, with a waypoint's data path between them: every kind of call, deadlines, errors, cancelling."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent import futures

import grpc
import pytest

from tests.kit.waypoint import CLUSTER, LoopbackWaypoint
from ztunnel.mesh.l7.clusters import Endpoint, UpstreamHttp
from ztunnel.mesh.l7.config import GatewayServer, ListenerProtocol, VirtualHost
from ztunnel.mesh.l7.routes import Backend, Fault, Route

ROUTE = Route("grpc", backends=(Backend(CLUSTER),))
SECONDS = 60.0


class Service(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpcio publishes no types
    """Bytes in, bytes out."""

    def __init__(self) -> None:
        self.waiting = threading.Event()
        """A call waits that has not been cancelled yet."""
        self.cancelled = threading.Event()

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        kinds = {
            "/s/Unary": grpc.unary_unary_rpc_method_handler(self.unary),
            "/s/ServerStream": grpc.unary_stream_rpc_method_handler(self.server_stream),
            "/s/ClientStream": grpc.stream_unary_rpc_method_handler(self.client_stream),
            "/s/Both": grpc.stream_stream_rpc_method_handler(self.both),
            "/s/Fails": grpc.unary_unary_rpc_method_handler(self.fails),
            "/s/Waits": grpc.unary_unary_rpc_method_handler(self.waits),
        }
        return kinds.get(details.method)

    def unary(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        context.set_trailing_metadata((("x-sum", str(len(request))),))
        return request[::-1]

    def server_stream(self, request: bytes, _context: grpc.ServicerContext) -> Iterator[bytes]:
        for _ in range(int(request)):
            yield b"x" * 10_000

    def client_stream(self, requests: Iterator[bytes], _context: grpc.ServicerContext) -> bytes:
        return str(sum(len(each) for each in requests)).encode()

    def both(self, requests: Iterator[bytes], _context: grpc.ServicerContext) -> Iterator[bytes]:
        for each in requests:
            yield each.upper()

    def fails(self, _request: bytes, context: grpc.ServicerContext) -> bytes:
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, "as was to be expected: 100 %")
        return b""

    def waits(self, _request: bytes, context: grpc.ServicerContext) -> bytes:
        if context.add_callback(self.cancelled.set):
            self.waiting.set()
        self.cancelled.wait(SECONDS)
        return b""


class Between:
    """The waypoint's loop in a thread of its own, and a channel through it."""

    def __init__(self, port: int) -> None:
        self.waypoint = LoopbackWaypoint()
        self.waypoint.cluster(Endpoint("127.0.0.1", port), http=UpstreamHttp.HTTP2)
        self.serve(ROUTE)
        host, number = self.waypoint.ports[80]
        self.channel = grpc.insecure_channel(f"{host}:{number}")
        self._stop = threading.Event()
        self._changes: list[Route] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def serve(self, route: Route) -> None:
        self.waypoint.outside(GatewayServer("g", 80, ListenerProtocol.HTTP, virtual_hosts=(VirtualHost(("*",), (route,)),)))

    def change(self, route: Route) -> None:
        """The loop's thread takes it over."""
        self._changes.append(route)
        deadline = time.monotonic() + SECONDS
        while self._changes and time.monotonic() < deadline:
            time.sleep(0.01)

    def _run(self) -> None:
        while not self._stop.is_set():
            self.waypoint.loop.run_once(0.02)
            if self._changes:
                self.serve(self._changes[0])
                self._changes.clear()

    def close(self) -> None:
        self.channel.close()
        self._stop.set()
        self._thread.join()
        self.waypoint.close()


@pytest.fixture(name="service", scope="module")
def fixture_service() -> Iterator[tuple[Service, int]]:
    service = Service()
    server = grpc.server(futures.ThreadPoolExecutor(8), handlers=(service,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield service, port
    server.stop(0).wait()


@pytest.fixture(name="between")
def fixture_between(service: tuple[Service, int]) -> Iterator[Between]:
    between = Between(service[1])
    yield between
    between.close()


def test_every_kind_of_call(between: Between) -> None:
    channel = between.channel
    answer, call = channel.unary_unary("/s/Unary").with_call(b"abc" * 100_000, timeout=SECONDS)
    assert answer == b"cba" * 100_000
    assert dict(call.trailing_metadata())["x-sum"] == "300000"
    assert [len(each) for each in channel.unary_stream("/s/ServerStream")(b"100", timeout=SECONDS)] == [10_000] * 100
    assert channel.stream_unary("/s/ClientStream")(iter([b"x" * 9999] * 50), timeout=SECONDS) == b"499950"
    assert list(channel.stream_stream("/s/Both")(iter([b"a", b"b", b"c"]), timeout=SECONDS)) == [b"A", b"B", b"C"]


def test_many_calls_at_once(between: Between) -> None:
    calls = [between.channel.unary_unary("/s/Unary").future(b"%d" % number, timeout=SECONDS) for number in range(200)]
    assert [call.result() for call in calls] == [(b"%d" % number)[::-1] for number in range(200)]


def test_errors_of_the_application_and_our_own(between: Between) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        between.channel.unary_unary("/s/Fails")(b"", timeout=SECONDS)
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.FAILED_PRECONDITION, "as was to be expected: 100 %")
    with pytest.raises(grpc.RpcError) as caught:
        between.channel.unary_unary("/s/Nobody")(b"", timeout=SECONDS)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    between.change(Route("grpc", fault=Fault(abort_grpc=8, abort_share=1.0), backends=ROUTE.backends))
    with pytest.raises(grpc.RpcError) as caught:
        between.channel.unary_unary("/s/Unary")(b"", timeout=SECONDS)
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "fault filter abort")
    between.change(Route("grpc"))
    with pytest.raises(grpc.RpcError) as caught:
        between.channel.unary_unary("/s/Unary")(b"", timeout=SECONDS)
    assert caught.value.code() is grpc.StatusCode.UNKNOWN


def test_deadlines_and_cancelling_reach_the_server(between: Between, service: tuple[Service, int]) -> None:
    handler = service[0]
    handler.cancelled.clear()
    for seconds in (0.2, 2.0, SECONDS):  # a busy machine may need longer than a deadline to get there
        with pytest.raises(grpc.RpcError) as caught:
            between.channel.unary_unary("/s/Waits")(b"", timeout=seconds)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        if handler.waiting.is_set():
            break
    assert handler.cancelled.wait(SECONDS)
    handler.cancelled.clear()
    handler.waiting.clear()
    call = between.channel.unary_unary("/s/Waits").future(b"", timeout=SECONDS)
    assert handler.waiting.wait(SECONDS)
    call.cancel()
    assert handler.cancelled.wait(SECONDS)
