"""The ways through which the same load goes: nothing at all, a pair of Envoys, our agents, a naive relay.

Each way has a client pod on one node and a server pod on another, namespaces of its own throughout, so that all ways are up at the same
time and one that is not measured costs nothing. Proxies get the same redirection, loaded by the product's own code. The model is two
nodes of one CPU each: client and outbound proxy share the near one, inbound proxy and server the far one.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from scripts.benchmarks import envoy_pair, processes
from scripts.benchmarks.errors import BenchError
from scripts.benchmarks.machine import Cpus
from scripts.benchmarks.tools import Tools
from tests.kit import envoy
from tests.kit.mesh import REPOSITORY, Mesh
from tests.kit.netns import Place, Pod, Topology
from tests.kit.pki import FakePki
from tests.kit.polling import NeverHappened, eventually
from ztunnel.hbone.handshake import Credentials
from ztunnel.mesh.ports import INBOUND_HBONE, OUTBOUND
from ztunnel.node import routes
from ztunnel.node.nft import PodTables, probe_ownership
from ztunnel.node.redirect import Stage, ruleset

APP, WEB, YIELDING, AT_ONCE = 9000, 9001, 9002, 9003
"""Ports in each server pod: our own server, nginx, and our own server twice more: giving way to everything on its CPU, and to nothing."""
GIVE_WAY = ("chrt", "--idle", "0")
"""Words before a command that is only to get the CPU time that nobody else wants."""
_POLL_SECONDS = 0.1
"""Our agents look at the manifests this often: each file that `elsewhere` changes says the same for two of their looks."""
CLIENT, SERVER = "client", "server"
ANSWER_BYTES = 1024

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
    client_body_temp_path {{directory}}/body;
    proxy_temp_path {{directory}}/proxy;
    fastcgi_temp_path {{directory}}/fastcgi;
    uwsgi_temp_path {{directory}}/uwsgi;
    scgi_temp_path {{directory}}/scgi;
    server {{{{
        listen {WEB} backlog=4096;
        location / {{{{ default_type text/plain; return 200 "{"x" * ANSWER_BYTES}"; }}}}
    }}}}
}}}}
"""


@dataclass(frozen=True, slots=True)
class Proxies:
    """The processes of a way's proxies."""

    roots: tuple[int, ...]
    """Outbound and inbound, or the one that is both: what costs CPU is these and their children."""
    data_planes: tuple[int, ...]
    """What carries the bytes, and whose memory counts."""


@dataclass(frozen=True, slots=True)
class Way:
    """One way that is up."""

    name: str
    client: Pod
    server: Pod
    neighbour: tuple[Pod, Pod]
    """Client and server of the neighbour's traffic through the same proxies."""
    proxies: Proxies | None = None
    configure: Callable[[str, str], None] | None = None
    """Ours only: `configure(name, text)` puts a file among the manifests; an empty text takes it away."""
    holds: Callable[[str], int] | None = None
    """Ours only: how many `workloads`, `policies` or `connections` each agent and its workers know of, the fewest; 0 while one is busy."""
    protocols: Callable[[], set[str]] | None = None
    """Ours only: how the connections that are open now go."""
    has_tunnel: Callable[[], bool] = field(default=lambda: True)
    """Whether the load that went through really was in a tunnel."""


def way_builders(tools: Tools, cpus: Cpus, workers: int) -> dict[str, Callable[[], AbstractContextManager[Way]]]:
    """By name, in the order of the table."""
    return {
        "direct": lambda: _direct(tools, cpus),
        "envoy": lambda: _envoy(tools, cpus, workers, "envoy", envoy_pair.DEFAULT),
        "envoy-large": lambda: _envoy(tools, cpus, workers, "envoy-large", envoy_pair.LARGE),
        "naive": lambda: _naive(tools, cpus),
        "pure": lambda: ours(replace(tools, tree=REPOSITORY), cpus, workers, "pure"),
        "ztunnel": lambda: ours(tools, cpus, workers),
    }


@contextmanager
def _direct(tools: Tools, cpus: Cpus) -> Iterator[Way]:
    with Topology() as net:
        near, far = net.node(), net.node()
        client, server = near.pod(CLIENT), far.pod(SERVER)
        with _servers(tools, cpus, [client, server], [server]):
            yield Way("direct", client, server, (client, server))


@contextmanager
def _envoy(tools: Tools, cpus: Cpus, workers: int, name: str, tuning: envoy_pair.Tuning) -> Iterator[Way]:
    pki = FakePki()
    client_id, server_id = pki.identity(CLIENT), pki.identity(SERVER)
    with Topology() as net, ExitStack() as stack:
        client, server = net.node().pod(CLIENT), net.node().pod(SERVER)
        stack.enter_context(_servers(tools, cpus, [client, server], [server]))
        applications = [(server.v4, port) for port in (APP, WEB, YIELDING, AT_ONCE)]
        configs = (
            (client, cpus.near, envoy_pair.outbound(pki.credentials(client_id), server_id, tuning)),
            (server, cpus.far, envoy_pair.inbound(pki.credentials(server_id), client_id, applications, tuning)),
        )
        pair: list[envoy.Envoy] = []
        for pod, cpu, config in configs:
            prefix = [*processes.pinned(cpu), *inside(pod)]
            try:
                pair.append(stack.enter_context(envoy.running(config, prefix=prefix, concurrency=workers)))
            except AssertionError as error:
                raise BenchError(f"Envoy does not start: {error}") from error
            stack.enter_context(_redirected(pod))
        there, here = pair[0].pid, pair[1].pid
        proxies = Proxies((there, here), (there, here))
        tunnelled = lambda: pair[1].counter("http.hbone.downstream_rq_2xx") > 0  # noqa: E731 - a question, asked once
        yield Way(name, client, server, (client, server), proxies, has_tunnel=tunnelled)


@contextmanager
def _naive(tools: Tools, cpus: Cpus) -> Iterator[Way]:
    pki = FakePki()
    with Topology() as net, ExitStack() as stack:
        client, server = net.node().pod(CLIENT), net.node().pod(SERVER)
        stack.enter_context(_servers(tools, cpus, [client, server], [server]))
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="naive-")))
        roots = []
        for pod, cpu, role, port in ((client, cpus.near, "outbound", OUTBOUND), (server, cpus.far, "inbound", INBOUND_HBONE)):
            files = _write(pki.credentials(pki.identity(pod.name)), directory / pod.name)
            command = [*processes.pinned(cpu), *inside(pod), sys.executable, "-m", "scripts.benchmarks.naive", role, *files]
            process = stack.enter_context(processes.running(command, directory / f"{role}.log"))
            roots.append(process.pid)
            await_listener(pod, port, process, directory / f"{role}.log")
            stack.enter_context(_redirected(pod))
        proxies = Proxies((roots[0], roots[1]), tuple(roots))
        yield Way("naive", client, server, (client, server), proxies)


@contextmanager
def ours(tools: Tools, cpus: Cpus, workers: int, name: str = "ztunnel", *, nodes: int = 2, settings: str = "") -> Iterator[Way]:
    """Our agents, the clients on the first node and the servers on the last, with a policy for each of the two servers.

    Args:
        nodes: two, or one for everything; its agent is then on the near CPU.
        settings: lines of YAML that each agent gets in addition.
    """
    ended: KeyboardInterrupt | BenchError | None = None
    with our_mesh(workers, tools.tree, nodes, settings) as mesh, ExitStack() as stack:
        try:
            places = ((0, CLIENT), (nodes - 1, SERVER))
            client, server = (mesh.pod(name, node=node, ambient=True, ipv6=False) for node, name in places)
            neighbour = tuple(mesh.pod(f"other-{name}", node=node, ambient=True, ipv6=False) for node, name in places)
            for served in (SERVER, f"other-{SERVER}"):
                mesh.policy(served, _callers_of(mesh, served))
            mesh.settle()
            stack.enter_context(_servers(tools, cpus, [client, server, *neighbour], [server, neighbour[1]]))
            for agent, cpu in zip(mesh.agents, (cpus.near, cpus.far), strict=False):
                processes.pin(processes.tree([agent.pid]), cpu)
            planes = tuple(pid for agent in mesh.agents for pid in agent.workers or [agent.pid])
            proxies = Proxies(tuple(agent.pid for agent in mesh.agents), planes)

            def configure(name: str, text: str) -> None:
                path = mesh.manifests / name
                if not text:
                    path.unlink(missing_ok=True)
                    return
                temporary = mesh.manifests / f".{name}"
                temporary.write_text(text)
                temporary.replace(path)

            def holds(what: str) -> int:
                # The workers answer the second question, behind all changes that their agent had sent them when it answered the first.
                try:
                    counts = [len(agent.rows(what)) for agent in mesh.agents]
                    for agent in mesh.agents:
                        agent.rows("connections")
                except TimeoutError:
                    return 0  # one is busy with taking over what it was told
                return min(counts)

            tunnelled = lambda: bool(mesh.agents[0].rows("tunnels"))  # noqa: E731 - a question, asked once
            protocols = lambda: {str(row["protocol"]) for row in mesh.agents[0].rows("connections")}  # noqa: E731 - as short
            yield Way(name, client, server, (neighbour[0], neighbour[1]), proxies, configure, holds, protocols, tunnelled)
        except (KeyboardInterrupt, BenchError) as error:
            # The mesh shows its agents' logs after an exception; nobody has asked for them here.
            ended = error
    if ended is not None:
        raise ended


@contextmanager
def our_mesh(workers: int, tree: Path, nodes: int, settings: str) -> Iterator[Mesh]:
    """Agents that are ready. What the mesh asserts of them, at the end too, is told as our own error."""
    try:
        words = f"enrolment: {{grace_seconds: 0.1}}\nworkers: {workers}\n{settings}"
        with Mesh(nodes, settings=words, tree=tree, poll_seconds=_POLL_SECONDS) as mesh:
            yield mesh
    except AssertionError as error:
        raise BenchError(f"our agents: {error.__cause__ or error}") from error


def _callers_of(mesh: Mesh, name: str) -> dict[str, object]:
    caller = mesh.identity(name.replace(SERVER, CLIENT)).principal
    source: dict[str, object] = {"source": {"principals": [caller]}}
    return {"selector": {"matchLabels": {"app": name}}, "action": "ALLOW", "rules": [{"from": [source]}]}


@contextmanager
def _servers(tools: Tools, cpus: Cpus, pods: Sequence[Pod], servers: Sequence[Pod]) -> Iterator[None]:
    """All servers in each of the `servers`; all `pods` ready for many short connections."""
    for pod in pods:
        pod.run(_allow_many_connections)
    with tempfile.TemporaryDirectory(prefix="bench-") as name, ExitStack() as stack:
        directory = Path(name)
        (directory / "nginx.conf").write_text(_NGINX.format(directory=directory))
        log = directory / "log"
        commands: dict[int, list[str | Path]] = {
            APP: [tools.load, "server", str(APP)],
            WEB: [*tools.nginx, "-p", name, "-c", directory / "nginx.conf"],
            YIELDING: [*GIVE_WAY, tools.load, "server", str(YIELDING)],
            AT_ONCE: [*tools.at_once, tools.load, "server", str(AT_ONCE)],
        }
        for pod in servers:
            for port, command in commands.items():
                words = [*processes.pinned(cpus.far), *inside(pod), *command]
                await_listener(pod, port, stack.enter_context(processes.running(words, log)), log)
        yield


def _allow_many_connections() -> None:
    # Both matter to the load and not to the proxies: a client that makes thousands of connections a second needs all ports, again soon.
    for key, value in (("ip_local_port_range", "1024 65535"), ("tcp_tw_reuse", "1")):
        with open(f"/proc/sys/net/ipv4/{key}", "w", encoding="ascii") as file:
            file.write(value)


def await_listener(place: Place, port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Returns when somebody listens there; raises BenchError when the process ends before, or nobody ever does."""

    def listens() -> bool:
        if process.poll() is not None:
            raise BenchError(f"what should listen on {place.name}:{port} has ended:\n{log.read_text()[-2000:]}")
        return f":{port:04X} " in place.run(_listeners)

    try:
        eventually(listens, within=10)
    except NeverHappened as error:
        raise BenchError(f"nobody listens on {place.name}:{port}:\n{log.read_text()[-2000:]}") from error


def _listeners() -> str:
    """Local addresses of listening sockets of the namespace of the calling thread."""
    lines = Path("/proc/thread-self/net/tcp").read_text().splitlines()[1:]
    return "".join(f"{line.split()[1]} " for line in lines if line.split()[3] == "0A")


@contextmanager
def _redirected(pod: Pod) -> Iterator[None]:
    """The rules and routes of an enrolled pod."""
    tables = pod.run(PodTables, probe_ownership())
    try:
        pod.run(routes.ensure)
        pod.run(tables.apply, ruleset(Stage.FULL))
        yield
    finally:
        tables.close()


def inside(place: Place) -> list[str]:
    """Words before a command that is to run there."""
    return ["nsenter", f"--net={place.path}"]


def _write(credentials: Credentials, directory: Path) -> list[str]:
    """Paths of chain, key and roots."""
    directory.mkdir()
    paths = [directory / name for name in ("chain.pem", "key.pem", "roots.pem")]
    for path, content in zip(paths, (credentials.chain_pem, credentials.key_pem, credentials.roots_pem), strict=True):
        path.touch(mode=0o600)
        path.write_bytes(content)
    return [str(path) for path in paths]
