"""Requests, answers, resets and silences in any order: nothing raises, everybody hears something, and every count returns to zero."""

from __future__ import annotations

import random

import h2.exceptions
import pytest

from tests.kit.http2 import H2End
from tests.kit.waypoint import CLUSTER, App, Bytes, LoopbackWaypoint
from ztunnel.mesh.l7.clusters import Outlier, PoolLimits, UpstreamHttp
from ztunnel.mesh.l7.routes import Backend, Fault, Mirror, Retry, RetryOn, Route

ROUTE = Route(
    "r",
    backends=(Backend(CLUSTER),),
    mirrors=(Mirror("copy", share=0.3),),
    retry=Retry(on=(RetryOn.FIVE_XX, RetryOn.RESET, RetryOn.CONNECT_FAILURE), attempts=2, base=0.001, maximum=0.004, per_try=0.05),
    fault=Fault(delay=0.005, delay_share=0.2, abort_status=418, abort_share=0.1),
    timeout=0.2,
)


class Storm:
    """One run with dice of its own."""

    def __init__(self, waypoint: LoopbackWaypoint, seed: int, http: UpstreamHttp) -> None:
        self.dice = random.Random(seed)
        self.waypoint = waypoint
        self.apps = [waypoint.app() for _ in range(3)]
        limits = PoolLimits(max_connections=4, max_pending=8, max_requests=16, max_retries=4, max_requests_per_connection=5)
        outlier = Outlier(consecutive_5xx=3, max_ejection_percent=60)
        endpoints = [waypoint.endpoint(app) for app in self.apps]
        waypoint.cluster(*endpoints[:2], limits=limits, outlier=outlier, http=http)
        waypoint.cluster(endpoints[2], key="copy", http=http)
        waypoint.serve(ROUTE)
        self.clients: list[Bytes] = []
        self.all_clients: list[Bytes] = []
        self.speakers: dict[int, H2End] = {}
        """Of clients and endpoints that speak HTTP/2, by their end."""
        for app in self.apps:
            app.on_data = self.hear

    def hear(self, end: Bytes) -> None:
        """An endpoint's connection says something for the first time."""
        if end.data.startswith(b"PRI * HTTP/2.0"):
            self.speakers[id(end)] = H2End(end, client=False)

    def step(self) -> None:
        action = self.dice.randrange(10)
        if action < 3:
            self.ask()
        elif action < 7:
            self.answer()
        elif action == 7 and self.clients:
            self.leave(self.dice.choice(self.clients))
        elif action == 8 and self.clients:
            self.go_on(self.dice.choice(self.clients))
        self.waypoint.turn(self.dice.randrange(4))

    def ask(self) -> None:
        if self.clients and self.dice.random() < 0.7:
            client = self.dice.choice(self.clients)
        else:
            client = self.waypoint.client()
            self.clients.append(client)
            self.all_clients.append(client)
            if self.dice.random() < 0.4:
                self.speakers[id(client)] = H2End(client, client=True)
        if client.is_over:
            return
        speaker = self.speakers.get(id(client))
        body = bytes(self.dice.randrange(3) * self.dice.randrange(60_000))
        if speaker is not None:
            self.ask_http2(speaker, body)
        elif self.dice.random() < 0.5:
            client.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        else:
            client.send(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
            client.send(b"%x\r\n" % len(body) + body + b"\r\n" if body else b"")
            client.send(b"0\r\n\r\n" if self.dice.random() < 0.8 else b"")

    def ask_http2(self, speaker: H2End, body: bytes) -> None:
        try:
            stream = speaker.get(method=b"POST", end=not body)
            if body:
                room = speaker.connection.local_flow_control_window(stream)
                speaker.send(stream, body[: min(room, 16_000)], end=self.dice.random() < 0.8)
        except h2.exceptions.ProtocolError:
            pass  # the connection is over

    def answer(self) -> None:
        app = self.dice.choice(self.apps)
        connections = [each for each in app.connections if not each.is_over]
        if not connections:
            return
        end = self.dice.choice(connections)
        speaker = self.speakers.get(id(end))
        if speaker is not None:
            self.answer_http2(speaker)
            return
        body = bytes(self.dice.randrange(70_000))
        match self.dice.randrange(8):
            case 0:
                end.close()
            case 1:
                end.end()
            case 2:
                end.send(b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n")
            case 3:
                end.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body[: len(body) // 2])
            case 4:
                end.send(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n")
            case 5:
                end.send(b"nonsense")
            case _:
                end.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        end.take()

    def answer_http2(self, speaker: H2End) -> None:
        waiting = [stream for stream in speaker.heads if not speaker.is_over(stream) or stream not in speaker.resets]
        if not waiting:
            return
        stream = self.dice.choice(waiting)
        try:
            match self.dice.randrange(6):
                case 0:
                    speaker.reset(stream, self.dice.choice((0, 2, 7, 8)))
                case 1:
                    speaker.respond(stream, status=b"503", end=True)
                case 2:
                    speaker.end.close()
                case 3:
                    speaker.respond(stream)
                case _:
                    speaker.respond(stream)
                    speaker.send(stream, bytes(self.dice.randrange(10_000)), end=True)
        except (h2.exceptions.ProtocolError, h2.exceptions.StreamClosedError, KeyError):
            pass

    def leave(self, client: Bytes) -> None:
        self.clients.remove(client)
        if self.dice.random() < 0.5:
            client.end()
        else:
            client.close()

    def go_on(self, client: Bytes) -> None:
        stream = client.stream
        if stream is not None and not client.is_over:
            if self.dice.random() < 0.5:
                stream.pause()
            else:
                stream.resume()


@pytest.mark.slow
@pytest.mark.parametrize("http", list(UpstreamHttp))
@pytest.mark.parametrize("seed", range(4))
def test_a_storm_leaves_nothing_behind(waypoint: LoopbackWaypoint, seed: int, http: UpstreamHttp) -> None:
    storm = Storm(waypoint, seed, http)
    for _ in range(300):
        storm.step()
        assert waypoint.loop.bugs == 0
    for client in storm.all_clients:
        client.close()
    clusters = [waypoint.engine.clusters.get(key) for key in (CLUSTER, "copy")]

    def settled() -> bool:
        for app in storm.apps:
            calm(app)
        for cluster in clusters:
            assert cluster is not None
            breakers = cluster.work.breakers
            if breakers.requests or breakers.pending or breakers.retries or any(each.active for each in cluster.work.endpoints):
                return False
        return not waypoint.proxy.connections.http and not waypoint.proxy.connections.http2

    waypoint.run_until(settled)
    waypoint.proxy.clusters.retire_all()
    waypoint.run_until(lambda: all(each is not None and each.work.breakers.connections == 0 for each in clusters))


def calm(app: App) -> None:
    """Whoever still waits there waits no longer."""
    for end in app.connections:
        end.close()
