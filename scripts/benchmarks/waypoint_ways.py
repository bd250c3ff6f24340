"""The meshes of `scripts/bench waypoint`: the same agent, client and servers around our waypoint and around an Envoy.

Everything but the waypoint shares the near CPU; the waypoint has the far one to itself, so that it is what a load waits for.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from scripts.benchmarks import envoy_waypoint, processes
from scripts.benchmarks.errors import BenchError
from scripts.benchmarks.figures import OURS
from scripts.benchmarks.machine import Cpus
from scripts.benchmarks.tools import Tools, found
from scripts.benchmarks.waypoint_manifests import NAME, PORT, Service, gateway, manifests
from scripts.benchmarks.ways import ANSWER_BYTES, CLIENT, SERVER, Proxies, Way, await_listener, inside, our_mesh
from tests.kit import envoy
from tests.kit.mesh import Mesh
from tests.kit.netns import Pod
from ztunnel.mesh.ports import INBOUND_HBONE

RIVAL = "envoy"
WEB, GRPC, SINK = 9001, 9004, 9005
BODY_BYTES = 100_000_000
APP = Service("app", "10.96.9.1", WEB, 10)
MANY = Service("many", "10.96.9.2", WEB, 1000)
UNARY = Service("unary", "10.96.9.3", GRPC, 10, grpc=True)
PLAIN = Service("plain", "10.96.9.4", WEB, 0)
SERVICES = (APP, MANY, UNARY, PLAIN)
MESSAGE = b"\0\0\0\0\5hello"
"""Of gRPC: what is asked and what is answered."""

_NGINX = f"""daemon off;
user root root;
master_process off;
worker_processes 1;
pid {{directory}}/nginx.pid;
error_log stderr error;
worker_rlimit_nofile 8192;
events {{{{ worker_connections 4096; }}}}
http {{{{
    access_log off;
    keepalive_requests 1000000000;
    client_max_body_size 0;
    client_body_temp_path {{directory}}/body;
    proxy_temp_path {{directory}}/proxy;
    fastcgi_temp_path {{directory}}/fastcgi;
    uwsgi_temp_path {{directory}}/uwsgi;
    scgi_temp_path {{directory}}/scgi;
    sendfile on;
    server {{{{
        listen {WEB} backlog=4096;
        location / {{{{ default_type text/plain; return 200 "{"x" * ANSWER_BYTES}"; }}}}
        location ~ /down$ {{{{ alias {{directory}}/large; }}}}
        location ~ /up$ {{{{ proxy_pass http://127.0.0.1:{SINK}; proxy_pass_request_body off; proxy_set_header content-length ""; }}}}
    }}}}
    server {{{{ listen {SINK}; location / {{{{ return 200 "taken"; }}}} }}}}
}}}}
"""
_SETTINGS = """name: {name}
namespace: default
sources: {{files: {manifests}, poll_seconds: 0.1}}
ca: {{directory: {ca}}}
admin: {{socket: {directory}/waypoint.sock, metrics_port: 0}}
workers: {workers}
"""


def way_builders(tools: Tools, cpus: Cpus, workers: int) -> Mapping[str, Callable[[], AbstractContextManager[Way]]]:
    """By name, in the order of the table."""
    return {RIVAL: lambda: _way(tools, cpus, workers, RIVAL, _envoy), OURS: lambda: _way(tools, cpus, workers, OURS, _ours)}


@dataclass(frozen=True, slots=True)
class Site:
    """Where a waypoint is to run."""

    tree: Path
    cpu: int | None
    workers: int
    mesh: Mesh
    pod: Pod
    server: Pod
    directory: Path

    def command(self, words: Sequence[str | Path]) -> list[str | Path]:
        """That command in the waypoint's pod, on its CPU."""
        return [*processes.pinned(self.cpu), *inside(self.pod), *words]


Starter = Callable[[Site], AbstractContextManager[int]]
"""Starts a waypoint: the process."""


@contextmanager
def _way(tools: Tools, cpus: Cpus, workers: int, name: str, start: Starter) -> Iterator[Way]:
    ended: KeyboardInterrupt | BenchError | None = None
    with our_mesh(1, tools.tree, 1, "") as mesh, ExitStack() as stack:
        try:
            client, server = (mesh.pod(each, node=0, ambient=True, ipv6=False) for each in (CLIENT, SERVER))
            waypoint = mesh.pod(NAME, node=0, ipv6=False, labels={"gateway.networking.k8s.io/gateway-name": NAME})
            mesh.settle()
            mesh.apply(gateway(waypoint.v4))
            for service in SERVICES:
                for document in manifests(service):
                    mesh.apply(document)
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
            stack.enter_context(_servers(tools, cpus, server, directory))
            processes.pin(processes.tree([mesh.agents[0].pid]), cpus.near)
            process = stack.enter_context(start(Site(tools.tree, cpus.far, workers, mesh, waypoint, server, directory)))
            yield Way(name, client, server, (client, server), Proxies((process,), (process,)))
        except (KeyboardInterrupt, BenchError) as error:
            ended = error  # as in `ways.ours`: nobody has asked for the agents' logs here
    if ended is not None:
        raise ended


@contextmanager
def _servers(tools: Tools, cpus: Cpus, server: Pod, directory: Path) -> Iterator[None]:
    (directory / "nginx.conf").write_text(_NGINX.format(directory=directory))
    with (directory / "large").open("wb") as large:
        large.truncate(BODY_BYTES)
    served = directory / "grpc" / UNARY.url.rpartition("/")[0].rpartition("/")[2]
    served.mkdir(parents=True)
    (served / "Method").write_bytes(MESSAGE)
    log = directory / "log"
    commands: dict[int, Sequence[str | Path]] = {
        WEB: [*tools.nginx, "-p", directory, "-c", directory / "nginx.conf"],
        GRPC: [found("nghttpd"), "--no-tls", "-d", directory / "grpc", "--trailer", "grpc-status: 0", f"{GRPC}"],
    }
    with ExitStack() as stack:
        for port, command in commands.items():
            process = stack.enter_context(processes.running([*processes.pinned(cpus.near), *inside(server), *command], log))
            await_listener(server, port, process, log)
        yield


@contextmanager
def _envoy(site: Site) -> Iterator[int]:
    served = [
        envoy_waypoint.Served(f"{each.vip}:{PORT}", (site.server.v4, each.target), each.size, each.grpc) for each in SERVICES if each.size
    ]
    mesh = site.mesh
    config = envoy_waypoint.waypoint(mesh.credentials(NAME), mesh.identity(CLIENT), mesh.identity(SERVER), served)
    prefix = [str(word) for word in site.command(())]
    try:
        with envoy.running(config, prefix=prefix, concurrency=site.workers) as running:
            yield running.pid
    except AssertionError as error:
        raise BenchError(f"Envoy does not start: {error}") from error


@contextmanager
def _ours(site: Site) -> Iterator[int]:
    file, log = site.directory / "waypoint.yaml", site.directory / "waypoint.log"
    mesh, directory = site.mesh, site.directory
    file.write_text(_SETTINGS.format(name=NAME, manifests=mesh.manifests, ca=mesh.root / "ca", directory=directory, workers=site.workers))
    words: list[str | Path] = ["env", f"--chdir={site.tree}", sys.executable, "-m", "waypoint", "run", "--config", file]
    with processes.running(site.command(words), log) as process:
        await_listener(site.pod, INBOUND_HBONE, process, log)
        yield process.pid
        died = process.poll()
        if died is not None:
            raise BenchError(f"our waypoint has ended ({died}):\n{log.read_text()[-3000:]}")
