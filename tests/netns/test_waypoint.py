"""Requests from pod to pod by way of a waypoint: agents and waypoint as they run in a cluster, all of it from manifests."""

from __future__ import annotations

import base64
import json
import os
import signal
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.mesh import Mesh
from tests.kit.polling import eventually
from tests.kit.tokens import jwks, sign
from tests.kit.waypoints import HttpApp, Waypoint
from tests.kit.web_pki import WebPki
from waypoint.questions import QuestionError, question_of
from waypoint.questions import ask as ask_proxy

VIP = "10.96.0.40"
PKI = WebPki()


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[Mesh, Waypoint]]:
    with Mesh(nodes=2) as mesh:
        mesh.pod("client", node=0, ambient=True)
        mesh.pod("server", node=1, ambient=True)
        with Waypoint(mesh, node=1) as waypoint:
            waypoint.service("web", "server", VIP, [{"name": "http", "port": 80, "targetPort": 8080}])
            mesh.settle()
            eventually(lambda: waypoint.serves(VIP), within=60, saying="the waypoint serves the service")
            yield mesh, waypoint


def ask(mesh: Mesh, request: bytes) -> bytes:
    with mesh.pods["client"].connect((VIP, 80)) as connection:
        connection.settimeout(60)
        connection.sendall(request)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_a_request_goes_by_way_of_the_waypoint(shared: tuple[Mesh, Waypoint]) -> None:
    mesh, _ = shared
    answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
    with HttpApp(mesh.pods["server"], 8080, answer) as app:
        got = ask(mesh, b"GET /a HTTP/1.1\r\nhost: web\r\nconnection: close\r\n\r\n")
        assert got.startswith(b"HTTP/1.1 200 OK\r\n")
        assert got.endswith(b"\r\n\r\nok")
        assert b"server: istio-envoy" in got
        assert any(line.startswith(b"x-request-id: ") for line in app.heads[0].split(b"\r\n"))


def workers(waypoint: Waypoint) -> list[int]:
    """Process ids of its workers."""
    assert waypoint.process is not None
    children = " ".join(file.read_text() for file in Path(f"/proc/{waypoint.process.pid}/task").glob("*/children"))
    commands = {int(pid): Path(f"/proc/{pid}/cmdline") for pid in children.split()}
    return [pid for pid, file in commands.items() if file.exists() and b"waypoint.worker" in file.read_bytes()]


def test_a_worker_that_dies_is_replaced(shared: tuple[Mesh, Waypoint]) -> None:
    mesh, waypoint = shared
    with HttpApp(mesh.pods["server"], 8080, b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"):
        request = b"GET / HTTP/1.1\r\nhost: web\r\nconnection: close\r\n\r\n"
        eventually(lambda: ask(mesh, request).endswith(b"ok"), within=60, saying="requests are answered")
        before = workers(waypoint)
        assert before
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        eventually(
            lambda: set(workers(waypoint)).isdisjoint(before) and len(workers(waypoint)) == len(before), within=60, saying="replaced"
        )

        def answered() -> bool:
            try:
                return ask(mesh, request).endswith(b"ok")
            except OSError:  # a tunnel that the agent has yet to notice is gone
                return False

        eventually(answered, within=60, saying="requests are answered again")
        assert waypoint.serves(VIP)
        eventually(lambda: waypoint.is_ready, within=60, saying="it is ready")


def test_a_policy_of_requests_is_enforced_by_the_waypoint(shared: tuple[Mesh, Waypoint]) -> None:
    mesh, waypoint = shared
    target = {"kind": "Service", "group": "", "name": "web"}
    spec: dict[str, object] = {"targetRefs": [target], "action": "DENY", "rules": [{"to": [{"operation": {"paths": ["/secret"]}}]}]}
    answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
    with HttpApp(mesh.pods["server"], 8080, answer):
        mesh.policy("secrets", spec)
        eventually(lambda: waypoint.ask("config")["policies"], within=60, saying="the waypoint knows the policy")
        secret = b"GET /secret HTTP/1.1\r\nhost: web\r\nconnection: close\r\n\r\n"
        eventually(lambda: ask(mesh, secret).startswith(b"HTTP/1.1 403 Forbidden"), within=60, saying="the policy is in force")
        assert ask(mesh, secret.replace(b"/secret", b"/open")).startswith(b"HTTP/1.1 200 OK")
        mesh.clear("AuthorizationPolicy")


def test_an_address_that_is_not_served_is_refused(shared: tuple[Mesh, Waypoint]) -> None:
    mesh, waypoint = shared
    with mesh.peer(mesh.agents[0].node, waypoint.pod) as peer:
        assert peer.request("10.96.0.41:80") == 400
        assert peer.request(f"{waypoint.pod.v4}:15000") == 400
        assert peer.request(f"{VIP}:80") == 200


def test_the_proxy_explains_what_it_would_do(shared: tuple[Mesh, Waypoint]) -> None:
    mesh, waypoint = shared
    target = {"kind": "Service", "group": "", "name": "web"}
    mesh.policy("secrets", {"targetRefs": [target], "action": "DENY", "rules": [{"to": [{"operation": {"paths": ["/secret"]}}]}]})
    eventually(lambda: waypoint.ask("config")["policies"], within=60, saying="the waypoint knows the policy")
    answer = json.loads(ask_proxy(waypoint.socket, question_of("http://web/secret", "GET", (), "default/client", "")))
    assert answer["outcome"] == "answered 403 by the proxy: denied by AuthorizationPolicy default/secrets, rules[0]"
    answer = json.loads(ask_proxy(waypoint.socket, question_of("http://web/open", "GET", (), "default/client", "")))
    assert answer["outcome"] == "taken by default"
    with pytest.raises(QuestionError, match="not a question"):
        ask_proxy(waypoint.socket, b"{}")
    mesh.clear("AuthorizationPolicy")


def test_requests_are_counted_where_prometheus_asks(shared: tuple[Mesh, Waypoint]) -> None:
    mesh, waypoint = shared
    with HttpApp(mesh.pods["server"], 8080, b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"):
        request = b"GET /counted HTTP/1.1\r\nhost: web\r\nconnection: close\r\n\r\n"
        eventually(lambda: ask(mesh, request).startswith(b"HTTP/1.1 200"), within=60, saying="a request passes")

    def scraped() -> bool:
        with mesh.pods["client"].connect((waypoint.pod.v4, 15020)) as connection:
            connection.settimeout(60)
            connection.sendall(b"GET /stats/prometheus HTTP/1.1\r\nhost: waypoint\r\nconnection: close\r\n\r\n")
            text = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
        lines = [line for line in text.splitlines() if line.startswith("istio_requests_total{") and 'response_code="200"' in line]
        wanted = (
            'reporter="waypoint"',
            'source_workload="client"',
            'destination_workload="server"',
            'destination_service="web.default.svc.cluster.local"',
            'source_principal="spiffe://cluster.local/ns/default/sa/',
            'connection_security_policy="mutual_tls"',
        )
        return any(all(label in line for label in wanted) for line in lines)

    eventually(scraped, within=60, saying="the request is counted with its labels")


class Ingress(Waypoint):
    """An ingress gateway."""

    kind = "gateway"


def test_an_ingress_gateway_serves_clients_from_outside_over_http_and_tls() -> None:
    certificate, key = (base64.b64encode(pem).decode() for pem in PKI.certificate("web.example"))
    answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
    with Mesh(nodes=2) as mesh:
        mesh.pod("outside", node=0)
        mesh.pod("server", node=1, ambient=True)
        ingress = Ingress(mesh, "ingress", node=0)
        secret = {"name": "web-tls"}
        listeners: list[dict[str, object]] = [
            {"name": "http", "port": 80, "protocol": "HTTP"},
            {"name": "https", "port": 443, "protocol": "HTTPS", "hostname": "web.example", "tls": {"certificateRefs": [secret]}},
        ]
        ingress.gateway(listeners, "istio")
        mesh.service("web", "server", {80: 8080}, (VIP,))
        mesh.apply(
            {
                "apiVersion": "v1",
                "kind": "Secret",
                "type": "kubernetes.io/tls",
                "metadata": {"name": "web-tls", "namespace": "default"},
                "data": {"tls.crt": certificate, "tls.key": key},
            }
        )
        mesh.apply(
            {
                "apiVersion": "gateway.networking.k8s.io/v1",
                "kind": "HTTPRoute",
                "metadata": {"name": "web", "namespace": "default"},
                "spec": {
                    "parentRefs": [{"name": "ingress"}],
                    "hostnames": ["web.example"],
                    "rules": [{"backendRefs": [{"name": "web", "port": 80}]}],
                },
            }
        )
        mesh.settle()
        with HttpApp(mesh.pods["server"], 8080, answer) as app, ingress:
            eventually(lambda: ingress.ask("status")["listening"] == [80, 443], within=60, saying="both ports are open")
            request = b"GET /x HTTP/1.1\r\nhost: web.example\r\nconnection: close\r\n\r\n"
            with mesh.pods["outside"].connect((ingress.pod.v4, 80)) as connection:
                connection.settimeout(60)
                connection.sendall(request)
                assert b"".join(iter(lambda: connection.recv(65536), b"")).endswith(b"\r\n\r\nok")
            assert f"x-forwarded-for: {mesh.pods['outside'].v4}".encode() in app.heads[0].split(b"\r\n")
            context = ssl.create_default_context(cadata=PKI.root_pem.decode())
            with mesh.pods["outside"].connect((ingress.pod.v4, 443)) as connection:
                connection.settimeout(60)
                with context.wrap_socket(connection, server_hostname="web.example") as tls:
                    tls.sendall(request)
                    assert b"".join(iter(lambda: tls.recv(65536), b"")).endswith(b"\r\n\r\nok")
            assert b"x-forwarded-proto: https" in app.heads[1].split(b"\r\n")


def test_tokens_are_verified_with_keys_from_their_issuer(shared: tuple[Mesh, Waypoint]) -> None:
    mesh, _ = shared
    server = mesh.pods["server"]
    keys = jwks().encode()
    published = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(keys) + keys
    rule = {"issuer": "i", "jwksUri": f"http://{server.v4}:8099/keys", "outputClaimToHeaders": [{"header": "x-sub", "claim": "sub"}]}
    meta = {"name": "jwt", "namespace": "default"}
    target = {"kind": "Service", "group": "", "name": "web"}
    mesh.policy("users", {"targetRefs": [target], "rules": [{"from": [{"source": {"requestPrincipals": ["i/alice"]}}]}]})
    with (
        HttpApp(server, 8099, published),
        HttpApp(server, 8080, b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok") as app,
    ):
        mesh.apply(
            {
                "apiVersion": "security.istio.io/v1",
                "kind": "RequestAuthentication",
                "metadata": meta,
                "spec": {"targetRefs": [target], "jwtRules": [rule]},
            }
        )

        def asked(*lines: bytes) -> bytes:
            return ask(mesh, b"\r\n".join([b"GET /me HTTP/1.1", b"host: web", b"connection: close", *lines]) + b"\r\n\r\n")

        expired = b"authorization: Bearer " + sign({"iss": "i", "exp": 1})
        eventually(lambda: asked(expired).endswith(b"Jwt is expired"), within=60, saying="tokens are looked at")
        eventually(lambda: asked().startswith(b"HTTP/1.1 403"), within=60, saying="the policy is in force")
        good = b"authorization: Bearer " + sign({"iss": "i", "sub": "alice"})
        eventually(lambda: asked(good).startswith(b"HTTP/1.1 200"), within=60, saying="a good token is accepted")
        assert b"\r\nx-sub: alice" in app.heads[-1]
        assert b"authorization" not in app.heads[-1]
        assert asked(b"authorization: Bearer " + sign({"iss": "i", "sub": "bob"})).startswith(b"HTTP/1.1 403")
        assert asked(expired).startswith(b"HTTP/1.1 401")
        mesh.clear("AuthorizationPolicy", "RequestAuthentication")
        eventually(lambda: asked(expired).startswith(b"HTTP/1.1 200"), within=60, saying="neither is in force any more")


def test_access_logs_are_written_as_mesh_config_and_telemetry_say(shared: tuple[Mesh, Waypoint]) -> None:
    mesh, waypoint = shared
    text = "accessLogFile: /dev/stdout\naccessLogEncoding: JSON\n"
    mesh.apply(
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "istio", "namespace": "istio-system"}, "data": {"mesh": text}}
    )
    logging = {"filter": {"expression": "request.url_path.startsWith('/logged')"}}
    mesh.apply(
        {
            "apiVersion": "telemetry.istio.io/v1",
            "kind": "Telemetry",
            "metadata": {"name": "logs", "namespace": "default"},
            "spec": {"accessLogging": [logging]},
        }
    )
    eventually(lambda: waypoint.ask("config")["telemetry"][""]["access_logs"], within=60, saying="the filter is known")
    meta = {"name": "istio", "namespace": "istio-system"}
    mesh.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": {"mesh": text}})
    eventually(lambda: waypoint.ask("config")["telemetry"][""]["access_logs"][0]["json"], within=60, saying="the format is known")
    with HttpApp(mesh.pods["server"], 8080, b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"):

        def logged() -> bool:
            ask(mesh, b"GET /logged HTTP/1.1\r\nhost: web\r\nuser-agent: me\r\nconnection: close\r\n\r\n")
            ask(mesh, b"GET /quiet HTTP/1.1\r\nhost: web\r\nconnection: close\r\n\r\n")
            return '"path":"/logged"' in waypoint.log

        eventually(logged, within=60, saying="a request is logged")
    line = json.loads(next(line for line in waypoint.log.splitlines() if '"path":"/logged"' in line))
    assert (line["method"], line["response_code"], line["user_agent"], line["route_name"]) == ("GET", 200, "me", "default")
    assert line["upstream_cluster"] == "inbound-vip|80|http|web.default.svc.cluster.local"
    assert '"path":"/quiet"' not in waypoint.log
    mesh.clear("Telemetry", "ConfigMap")
