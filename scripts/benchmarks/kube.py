"""`scripts/bench kube`: what it costs a node to follow a real API server: time, memory, CPU, requests, and how late a change is known.

A kube-apiserver with thousands of pods and services, one agent as a node runs it, and beside it the source alone in this process, which
tells when each change of a pod has become a change of the mesh. Pods are written by threads over connections of their own.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import trio

from scripts.benchmarks import machine, processes
from scripts.benchmarks.conduct import conduct, say
from scripts.benchmarks.errors import BenchError
from scripts.benchmarks.figures import OURS, Figure, Measurement, judge
from scripts.benchmarks.rows import MEGA, Against, Better, Row, Values
from scripts.benchmarks.table import table
from tests.kit import kube_crds
from tests.kit.kube_api import ApiServer, tools
from tests.kit.kube_mesh import KubeMesh
from tests.kit.mesh import Agent
from tests.kit.polling import eventually
from tests.kit.reflected import access
from ztunnel.kube.client import KubeClient
from ztunnel.mesh.derive import MeshOptions, MeshState
from ztunnel.sources.kubernetes import KubernetesSource
from ztunnel.sources.objects import Refusal

NAMESPACES, NODES, WRITERS = 50, 100, 4
KNOWN_SECONDS = 120.0
SYNC, IDLE, CHURN = "sync", "idle", "churn"

Write = Callable[[str, str, object], None]


def _row(name: str, title: str, scenario: str, value: Callable[[Values], float], floor: float, aim: float) -> Row:
    return Row(name, title, (scenario,), lambda samples: value(samples[scenario]), Against.NOTHING, Better.LOWER, floor, aim)


ROWS = (
    _row("sync-seconds", "from start to ready, s", SYNC, lambda v: v["seconds"], 15, 5),
    _row("sync-cpu", "CPU of that, s", SYNC, lambda v: v["cpu"], 10, 4),
    _row("sync-requests", "requests of that", SYNC, lambda v: v["requests"], 60, 40),
    _row("memory", "memory of supervisor and worker, MB per 1,000 pods", SYNC, lambda v: v["bytes"] / MEGA / v["pods"] * 1000, 20, 10),
    _row("idle-requests", "requests a minute while nothing happens", IDLE, lambda v: v["requests"] / v["seconds"] * 60, 12, 6),
    _row("idle-cpu", "CPU while nothing happens, % of one", IDLE, lambda v: v["cpu"] / v["seconds"] * 100, 5, 2),
    _row("event-cpu", "CPU of a pod's change, supervisor and worker, ms", CHURN, lambda v: v["cpu"] / v["changes"] * 1e3, 5, 2),
    _row("event-requests", "requests for 1,000 changes", CHURN, lambda v: v["requests"] / v["changes"] * 1e3, 50, 10),
    _row("late-p50", "written to known, p50, ms", CHURN, lambda v: v["p50_ms"], 100, 30),
    _row("late-p99", "written to known, p99, ms", CHURN, lambda v: v["p99_ms"], 500, 150),
    _row("growth", "memory after 1,000 changes more, MB", CHURN, lambda v: v["grown"] / MEGA / v["changes"] * 1e3, 10, 2),
)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run does."""

    pods: int
    services: int
    seconds: float
    rate: float
    json: Path | None


def plan(words: Sequence[str]) -> Plan:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(prog="scripts/bench kube", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of everything")
    parser.add_argument("--pods", type=int, default=5000)
    parser.add_argument("--services", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=20.0, help="of changes, and as long of silence")
    parser.add_argument("--rate", type=float, default=50.0, help="changes of pods a second")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measurement")
    given = parser.parse_args(words)
    share = 10 if given.quick else 1
    return Plan(given.pods // share, given.services // share, given.seconds / (2 if given.quick else 1), given.rate, given.json)


def main(words: Sequence[str]) -> int:
    """Exit code: see `conduct`."""
    asked = plan(words)
    return conduct(lambda measurements: measure(asked, measurements), lambda measurements: conclude(asked, measurements))


def measure(asked: Plan, measurements: list[Measurement]) -> None:
    """Adds all measurements of the run, as they are taken.

    Raises:
        BenchError: something that must be there is not.
    """
    directory, refusal = tools()
    if directory is None:
        raise BenchError(refusal)
    machine.isolate()
    with ApiServer.started() as api:
        kube_crds.define(api)
        with KubeMesh(api, nodes=1, start=False) as mesh:
            agent = mesh.agents[0]
            empty = _started(mesh, agent)["bytes"]
            agent.stop()
            say(f"writing {asked.pods} pods and {asked.services} services")
            fill(api, asked.pods, asked.services)
            say("reading them")
            sync = _started(mesh, agent)
            _must_know(agent, asked.pods)
            measurements.append(Measurement(0, SYNC, OURS, {**sync, "bytes": _bytes(agent) - empty, "pods": asked.pods}))
            with _spent(agent) as idle:
                time.sleep(asked.seconds)
            measurements.append(Measurement(0, IDLE, OURS, dict(idle)))
            say(f"changing pods for {asked.seconds:g} s")
            measurements.append(Measurement(0, CHURN, OURS, _churn(api, agent, asked)))


def _started(mesh: KubeMesh, agent: Agent) -> dict[str, float]:
    began = time.monotonic()
    mesh.start(0)
    pids = processes.tree([agent.pid])
    values = {"seconds": time.monotonic() - began, "cpu": processes.cpu_seconds(pids), "requests": _requests(agent)}
    return {**values, "bytes": _bytes(agent)}


def _must_know(agent: Agent, pods: int) -> None:
    eventually(lambda: len(agent.rows("workloads")) >= pods, within=KNOWN_SECONDS, saying="the agent knows all pods")


def _requests(agent: Agent) -> float:
    return agent.metric("ztunnel_kubernetes_requests_total")


def _bytes(agent: Agent) -> float:
    return float(sum(processes.resident_bytes(pid) for pid in processes.tree([agent.pid])))


@contextmanager
def _spent(agent: Agent) -> Iterator[dict[str, float]]:
    """What the agent takes while the block lasts."""
    values: dict[str, float] = {}
    before = time.monotonic(), processes.cpu_seconds(processes.tree([agent.pid])), _requests(agent)
    yield values
    cpu = processes.cpu_seconds(processes.tree([agent.pid]))
    values.update(seconds=time.monotonic() - before[0], cpu=cpu - before[1], requests=_requests(agent) - before[2])


# ------------------------------------------------------------------------------------------------------------ the cluster


def fill(api: ApiServer, pods: int, services: int) -> None:
    """Namespaces in the mesh, and in them pods that run elsewhere and services that select ten pods each."""
    for number in range(NAMESPACES):
        api.namespace(f"ns{number}", {"istio.io/dataplane-mode": "ambient"})
    _all(api, [service(number) for number in range(services)])
    _all(api, [pod(number, services) for number in range(pods)])


def service(number: int) -> list[tuple[str, str, object]]:
    """The requests that make a service."""
    spec = {"selector": {"app": f"a{number}"}, "ports": [{"port": 80, "targetPort": 8080}]}
    return [("POST", f"/api/v1/namespaces/ns{number % NAMESPACES}/services", {"metadata": {"name": f"s{number}"}, "spec": spec})]


def pod(number: int, services: int) -> list[tuple[str, str, object]]:
    """The requests that make a pod and let it run, as large as a Deployment's are."""
    app = number % services
    path = f"/api/v1/namespaces/ns{app % NAMESPACES}/pods"
    variables = [{"name": f"VARIABLE_{each}", "value": "x" * 40} for each in range(20)]
    containers = [{"name": "app", "image": "registry.example/app:1", "env": variables, "ports": [{"containerPort": 8080}]}]
    labels = {"app": f"a{app}", "pod-template-hash": "5d4f8c7b9"}
    body = {
        "metadata": {"name": f"p{number}", "labels": labels},
        "spec": {"nodeName": f"elsewhere-{number % NODES}", "containers": containers, "terminationGracePeriodSeconds": 0},
    }
    return [("POST", path, body), status_of(number, services, ready=True)]


def status_of(number: int, services: int, *, ready: bool) -> tuple[str, str, object]:
    """The request by which a pod's kubelet tells of it."""
    address = f"10.{100 + number // 62500}.{number // 250 % 250}.{number % 250 + 1}"
    conditions = [{"type": "Ready", "status": "True" if ready else "False"}]
    status = {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}], "conditions": conditions}
    return "PATCH", f"/api/v1/namespaces/ns{number % services % NAMESPACES}/pods/p{number}/status", {"status": status}


def _all(api: ApiServer, groups: Sequence[Sequence[tuple[str, str, object]]]) -> None:
    def some(mine: Sequence[Sequence[tuple[str, str, object]]]) -> None:
        with writing(api) as write:
            for group in mine:
                for request in group:
                    write(*request)

    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(some, [groups[first::WRITERS] for first in range(WRITERS)]))


@contextmanager
def writing(api: ApiServer) -> Iterator[Write]:
    """Requests over one connection."""
    connection = http.client.HTTPSConnection(api.address, api.port, timeout=60, context=api.tls(api.admin))

    def write(method: str, path: str, body: object) -> None:
        kind = "application/strategic-merge-patch+json" if method == "PATCH" else "application/json"
        connection.request(method, path, json.dumps(body), {"Content-Type": kind})
        response = connection.getresponse()
        text = response.read()
        if response.status >= 300:
            raise BenchError(f"{method} {path}: {response.status}: {text[:300].decode(errors='replace')}")

    try:
        yield write
    finally:
        connection.close()


# ----------------------------------------------------------------------------------------------------------- the changes


@dataclass(slots=True)
class Watched:
    """The source alone, in a thread: when each pod's readiness became known."""

    api: ApiServer
    known: dict[tuple[str, bool], float] = field(default_factory=dict)
    """By name and readiness, the first time since it was asked for."""
    wanted: dict[str, bool] = field(default_factory=dict)
    ready: threading.Event = field(default_factory=threading.Event)
    _leave: Callable[[], None] = lambda: None

    def run(self) -> None:
        """Until `end`."""
        trio.run(self._run)

    def end(self) -> None:
        """Soon."""
        self._leave()

    async def _run(self) -> None:
        async with KubeClient(access(self.api)) as client, trio.open_nursery() as nursery:
            await nursery.start(KubernetesSource(client, MeshOptions()).run, self._told)
            token = trio.lowlevel.current_trio_token()
            self._leave = partial(token.run_sync_soon, nursery.cancel_scope.cancel)
            self.ready.set()

    async def _told(self, state: MeshState, refusals: tuple[Refusal, ...]) -> None:
        del refusals
        now = time.monotonic()
        if self.wanted:
            by_name = {each.name: each for each in state.workloads.values() if each.name in self.wanted}
            for name, ready in list(self.wanted.items()):
                if name in by_name and by_name[name].ready is ready:
                    self.known.setdefault((name, ready), now)
                    self.wanted.pop(name, None)


def _churn(api: ApiServer, agent: Agent, asked: Plan) -> Mapping[str, float]:
    watched = Watched(api)
    thread = threading.Thread(target=watched.run, daemon=True)
    thread.start()
    try:
        if not watched.ready.wait(KNOWN_SECONDS):
            raise BenchError("the source alone has not read the API server in time")
        return _changes(api, agent, asked, watched)
    finally:
        watched.end()
        thread.join(KNOWN_SECONDS)


def _changes(api: ApiServer, agent: Agent, asked: Plan, watched: Watched) -> Mapping[str, float]:
    before, sent = _bytes(agent), dict[tuple[str, bool], float]()
    numbers = random.sample(range(asked.pods), min(asked.pods, max(1, int(asked.seconds * asked.rate))))
    with writing(api) as write, _spent(agent) as spent:
        began = time.monotonic()
        for done, number in enumerate(numbers):
            time.sleep(max(0.0, began + done / asked.rate - time.monotonic()))
            watched.wanted[f"p{number}"] = False
            sent[f"p{number}", False] = time.monotonic()
            write(*status_of(number, asked.services, ready=False))
        eventually(lambda: not watched.wanted, within=KNOWN_SECONDS, saying="every change is known")
    late = sorted((watched.known[key] - at) * 1e3 for key, at in sent.items())
    quantiles = statistics.quantiles(late, n=100) if len(late) > 1 else late * 99
    return {**spent, "changes": len(late), "p50_ms": quantiles[49], "p99_ms": quantiles[98], "grown": max(0.0, _bytes(agent) - before)}


def conclude(asked: Plan, measurements: Sequence[Measurement]) -> list[Figure]:
    """The table, and the report if one is asked for."""
    figures = [judge(row, measurements, ()) for row in ROWS]
    print("\n".join(table(figures, (OURS,), None)))
    print(f"{asked.pods} pods, {asked.services} services, {NAMESPACES} namespaces, {asked.rate:g} changes a second; one run")
    if asked.json is not None:
        told = {
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "plan": asdict(asked),
            "figures": {figure.row.name: figure.ratio for figure in figures if figure.ratios},
            "measurements": [{"scenario": each.scenario, **each.values} for each in measurements],
        }
        asked.json.write_text(json.dumps(told, indent=1, default=str) + "\n")
    return figures
