"""A real waypoint in a mesh of `tests.kit.mesh`: `waypoint run` in a pod's namespace, fed with the mesh's own manifests."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.kit import apps
from tests.kit.mesh import TRUST_DOMAIN, Mesh
from tests.kit.netns import Place
from tests.kit.polling import eventually

GATEWAY_NAME = "gateway.networking.k8s.io/gateway-name"
USE_WAYPOINT = "istio.io/use-waypoint"
WORKERS = os.environ.get("WAYPOINT_WORKERS", "1")


class HttpApp(apps.Echo):
    """A server that answers each request (a head without a body) with the same bytes, and remembers the heads."""

    def __init__(self, place: Place, port: int, answer: bytes) -> None:
        super().__init__(place, port)
        self.answer = answer
        self.heads: list[bytes] = []

    def _transfer(self, session: apps._Session) -> None:
        try:
            data = session.sock.recv(1 << 16)
        except BlockingIOError:
            return  # just accepted, and the request is still on its way
        if not data:
            self._close(session)
            return
        session.pending += data
        while b"\r\n\r\n" in session.pending:
            head, _, rest = bytes(session.pending).partition(b"\r\n\r\n")
            self.heads.append(head)
            session.pending[:] = rest
            session.sock.sendall(self.answer)


class Waypoint:
    """The waypoint `name` of namespace `default` on a node. A context manager; `bind` services to it."""

    kind = "waypoint"

    def __init__(self, mesh: Mesh, name: str = "waypoint", *, node: int = 0, traffic: str = "service") -> None:
        self.mesh = mesh
        self.name = name
        account = name if self.kind == "waypoint" else f"{name}-istio"
        self.pod = mesh.pod(name, node=node, account=account, labels={GATEWAY_NAME: name})
        self.directory = mesh.root / f"waypoint-{name}"
        self.directory.mkdir()
        self.socket = self.directory / "waypoint.sock"
        self.process: subprocess.Popen[bytes] | None = None
        self.gateway([{"name": "mesh", "port": 15008, "protocol": "HBONE"}], "istio-waypoint", {"istio.io/waypoint-for": traffic})

    def gateway(self, listeners: list[dict[str, object]], of_class: str, labels: dict[str, str] | None = None) -> None:
        """Its Gateway."""
        self.mesh.apply(
            {
                "apiVersion": "gateway.networking.k8s.io/v1",
                "kind": "Gateway",
                "metadata": {"name": self.name, "namespace": "default", "labels": labels or {}},
                "spec": {
                    "gatewayClassName": of_class,
                    "addresses": [{"type": "IPAddress", "value": self.pod.v4}],
                    "listeners": listeners,
                },
            }
        )

    def __enter__(self) -> Waypoint:
        self.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if kind is not None:
            sys.stderr.write(f"---- {self.name}\n{self.log[-6000:]}\n")
        else:
            assert "Traceback" not in self.log, self.log[-6000:]

    def start(self) -> None:
        """Starts it and waits until it is ready."""
        settings = self.directory / "waypoint.yaml"
        settings.write_text(
            f"kind: {self.kind}\nname: {self.name}\nnamespace: default\ntrust_domain: {TRUST_DOMAIN}\n"
            f"workers: {WORKERS}\nlinger_seconds: 0\n"
            f"sources: {self._sources()}\n"
            f"ca: {{directory: {self.mesh.root / 'ca'}}}\nadmin: {{socket: {self.socket}}}\n"
        )
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                ["nsenter", f"--net={self.pod.path}", sys.executable, "-m", "waypoint", "run", "--config", settings],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=Path(__file__).parents[2],
            )
        eventually(lambda: self.is_ready, within=60, saying="the waypoint is ready")

    def _sources(self) -> str:
        return f"{{files: {self.mesh.manifests}, poll_seconds: 0.05}}"

    @property
    def log(self) -> str:
        """Everything it has logged."""
        file = self.directory / "log"
        return file.read_text(errors="replace") if file.exists() else ""

    @property
    def is_ready(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, f"the waypoint ended:\n{self.log[-4000:]}"
        try:
            return bool(self.ask("status")["ready"])
        except OSError:
            return False

    def ask(self, what: str) -> Any:
        """An answer of its control socket."""
        connection = http.client.HTTPConnection("waypoint", timeout=10)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(10)
        try:
            connection.sock.connect(str(self.socket))
            connection.request("GET", f"/v1/{what}")
            return json.loads(connection.getresponse().read())
        finally:
            connection.close()

    def service(self, name: str, app: str, vip: str, ports: list[dict[str, object]], **labels: str) -> None:
        """A service of the pods labelled `app`, served by this waypoint."""
        self.mesh.apply(
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": {"name": name, "namespace": "default", "labels": {USE_WAYPOINT: self.name, **labels}},
                "spec": {"clusterIP": vip, "clusterIPs": [vip], "selector": {"app": app}, "ports": ports},
            }
        )

    def serves(self, vip: str) -> bool:
        """Whether its configuration has a service with this address."""
        config = self.ask("config")
        return config is not None and any(vip in service["vips"] for service in config["services"])
