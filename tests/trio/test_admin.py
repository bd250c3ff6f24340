"""What operators and machines get from a running agent, over its real sockets."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from tests.kit.views import CannedView
from ztunnel.admin.api import ControlApi
from ztunnel.admin.listen import control_socket, open_ports
from ztunnel.admin.readiness import Readiness
from ztunnel.admin.scrape import REST, Scrape
from ztunnel.admin.server import AdminServer
from ztunnel.runtime.http import BadRequest, Request, Response
from ztunnel.runtime.metrics import Metrics
from ztunnel.runtime.unix_listener import ListenError
from ztunnel.settings import AdminSettings

API = ControlApi(CannedView(), "node-1")


async def get(path: str, method: str = "GET", body: bytes = b"", query: dict[str, str] | None = None) -> dict[str, object]:
    answer: dict[str, object] = json.loads((await API.handle(Request(method, path, query or {}, {}, body))).body)
    return answer


async def test_listings_are_versioned() -> None:
    for name in ("connections", "tunnels", "workloads", "services", "policies", "certificates"):
        answer = await get(f"/v1/{name}")
        assert (answer["version"], answer["node"]) == (1, "node-1")
        assert isinstance(answer["items"], list)
        assert answer["items"]
    services = (await get("/v1/services"))["items"]
    assert services == [
        {
            "namespace": "shop",
            "name": "cart",
            "hostname": "cart.shop.svc.cluster.local",
            "vips": ["10.96.0.1"],
            "ports": ["80→8080"],
            "endpoints": 2,
            "ready_endpoints": 1,
            "waypoint": "",
        }
    ]


async def test_status_sums_up() -> None:
    answer = await get("/v1/status")
    assert (answer["connections"], answer["tunnels"], answer["worker"], answer["ready"]) == (1, 1, "running", True)
    assert "pods" not in answer
    items = answer["items"]
    assert isinstance(items, list)
    assert items[0]["captured"] is True


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/", 404), ("GET", "/v1/", 404), ("GET", "/v2/status", 404), ("POST", "/v1/status", 405), ("DELETE", "/v1/log-level", 405)],
)
async def test_other_requests_are_refused(method: str, path: str, status: int) -> None:
    with pytest.raises(BadRequest) as caught:
        await get(path, method)
    assert caught.value.status == status


@pytest.fixture
def log_level() -> Iterator[None]:
    before = logging.getLogger("ztunnel").level
    yield
    logging.getLogger("ztunnel").setLevel(before)


async def test_the_log_level_can_be_changed(log_level: None) -> None:
    assert (await get("/v1/log-level", "POST", b'{"level": "debug"}'))["level"] == "debug"
    assert (await get("/v1/log-level"))["level"] == "debug"
    assert (await get("/v1/log-level", "POST", query={"level": "error"}))["level"] == "error"
    for body in (b'{"level": "loud"}', b"{", b"[]", b'{"level": 5}', b"[" * 5000):
        with pytest.raises(BadRequest) as caught:
            await get("/v1/log-level", "POST", body)
        assert caught.value.status == 400


async def ask(readiness: Readiness, method: str = "GET", path: str = "/healthz/ready") -> Response:
    return await readiness.handle(Request(method, path, {}, {}))


async def test_readiness_names_what_is_pending() -> None:
    readiness = Readiness(["proxy", "certificates"])
    answer = await ask(readiness)
    assert (answer.status, answer.body) == (500, b"not ready, pending: certificates, proxy\n")
    readiness.done("proxy")
    readiness.done("certificates")
    answer = await ask(readiness)
    assert (answer.status, answer.body) == (200, b"ready\n")
    readiness.lost("proxy")
    assert (await ask(readiness)).status == 500
    readiness.done("proxy")
    serving = [1]
    readiness.watch("workers", lambda: bool(serving))
    assert readiness.ready
    serving.clear()
    assert (await ask(readiness)).body == b"not ready, pending: workers\n"
    assert (await ask(readiness, "POST")).status == 405
    assert (await ask(readiness, path="/")).status == 404


class CostlyMetrics(Metrics):
    """Each exposition takes two seconds of the test's clock."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.made = 0

    def exposition(self, accept: str) -> tuple[str, bytes]:
        self.made += 1
        self.now += 2
        return super().exposition(accept)


async def test_who_scrapes_without_pause_costs_the_daemon_a_small_part_of_its_time() -> None:
    metrics = CostlyMetrics()
    scrape = Scrape(metrics, lambda: metrics.now)
    first = await scrape.handle(Request("GET", "/metrics", {}, {}))
    for _ in range(100):
        assert (await scrape.handle(Request("GET", "/metrics", {}, {}))).body is first.body
    assert metrics.made == 1
    metrics.bugs.add(1)
    metrics.now += 2 * REST
    assert b"ztunnel_bugs_total 1.0" in (await scrape.handle(Request("GET", "/metrics", {}, {}))).body
    assert metrics.made == 2


async def test_metrics_paths() -> None:
    scrape = Scrape(Metrics("1.2"))
    for path in ("/metrics", "/stats/prometheus"):
        answer = await scrape.handle(Request("GET", path, {}, {}))
        assert answer.content_type == "text/plain; charset=utf-8"
        assert b'istio_build{component="ztunnel",tag="1.2"} 1.0' in answer.body
    accepting = {"accept": "application/openmetrics-text;version=1.0.0"}
    assert (await scrape.handle(Request("GET", "/metrics", {}, accepting))).body.endswith(b"# EOF\n")
    assert (await scrape.handle(Request("GET", "/", {}, {}))).status == 404
    assert (await scrape.handle(Request("PUT", "/metrics", {}, {}))).status == 405


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@asynccontextmanager
async def serving(path: Path) -> AsyncIterator[AdminSettings]:
    metrics_port, readiness_port = free_ports(2)
    settings = AdminSettings(socket=path, address="127.0.0.1", metrics_port=metrics_port, readiness_port=readiness_port)
    async with trio.open_nursery() as nursery:
        await nursery.start(AdminServer(API, Readiness([]), Metrics(), settings).run)
        yield settings
        nursery.cancel_scope.cancel()


async def fetch(stream: trio.SocketStream, path: str) -> bytes:
    async with stream:
        await stream.send_all(b"GET %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" % path.encode())
        return b"".join([bytes(data) async for data in stream])


async def test_all_three_listeners(tmp_path: Path) -> None:
    path = tmp_path / "run" / "agent.sock"
    async with serving(path) as settings:
        assert path.stat().st_mode & 0o777 == 0o600
        assert b'"version":1' in await fetch(await trio.open_unix_socket(path), "/v1/status")
        assert b"ztunnel_bugs_total" in await fetch(await trio.open_tcp_stream("127.0.0.1", settings.metrics_port), "/metrics")
        assert b"ready\n" in await fetch(await trio.open_tcp_stream("127.0.0.1", settings.readiness_port), "/healthz/ready")
        assert b" 404 " in await fetch(await trio.open_tcp_stream("127.0.0.1", settings.metrics_port), "/v1/status")
    assert not path.exists()


async def test_a_socket_of_a_dead_process_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        dead.listen()
    with control_socket(path) as listener:
        assert path.stat().st_mode & 0o777 == 0o600
        await listener.aclose()


async def test_a_live_socket_and_other_files_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    with control_socket(path), pytest.raises(ListenError, match="an agent already answers"), control_socket(path):
        pass
    path.write_text("mine")
    with pytest.raises(ListenError, match="is not a socket"), control_socket(path):
        pass
    assert path.read_text() == "mine"
    with pytest.raises(ListenError, match="cannot listen"), control_socket(path / "below"):
        pass


async def test_the_successors_socket_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    with control_socket(path):
        path.unlink()
        with socket.socket(socket.AF_UNIX) as successor:
            successor.bind(str(path))
    assert path.exists()
    with control_socket(tmp_path / "other.sock"):
        (tmp_path / "other.sock").unlink()


async def test_the_umask_is_given_back(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with control_socket(tmp_path / "agent.sock"):
            assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)


async def test_a_port_that_is_taken_is_named() -> None:
    (listener,) = await open_ports("127.0.0.1", 0, "admin.metrics_port")
    port = listener.socket.getsockname()[1]
    async with listener:
        with pytest.raises(ListenError, match=rf"admin\.metrics_port: cannot listen on 127\.0\.0\.1 port {port}"):
            await open_ports("127.0.0.1", port, "admin.metrics_port")
    for wildcard in await open_ports("*", 0, "admin.metrics_port"):
        await wildcard.aclose()
