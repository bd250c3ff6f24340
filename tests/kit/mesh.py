"""A mesh for end-to-end tests: real agents in the nodes of a `Topology`, fed with manifests, and words to say what should be there.

    with Mesh(nodes=2) as mesh:
        client = mesh.pod("client", node=0, ambient=True)
        server = mesh.pod("server", node=1, ambient=True)
        mesh.settle()
        with server.listener(8080) as listening, client.connect((server.v4, 8080)) as connection: ...

Each agent is `ztunnel run` in its own process, killed when the test ends. Pods are namespaces that belong to the test process, so
applications are plain sockets here. Leaving a mesh, and `check`, assert that no agent met a bug of its own.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.kit.hbone import HbonePeer
from tests.kit.netns import Node, Place, Pod, Topology
from tests.kit.polling import eventually
from ztunnel.ca.authority import Authority
from ztunnel.ca.root import open_root
from ztunnel.hbone.handshake import Credentials
from ztunnel.mesh.identity import SpiffeId
from ztunnel.mesh.ports import INBOUND_HBONE

REPOSITORY = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "ztunnel"]
TRUST_DOMAIN = "cluster.local"
DEFAULT_SETTINGS = "enrolment: {grace_seconds: 0.3, linger_seconds: 0.4, drift_seconds: 1}\n"
AMBIENT = "istio.io/dataplane-mode"
PATIENCE_SECONDS = 90.0
"""For agents to start, to answer, to follow and to end. Seconds suffice; on a machine with ten other things to do they do not."""
Json = dict[str, object]


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("agent", timeout=PATIENCE_SECONDS)
        self._path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(PATIENCE_SECONDS)
        self.sock.connect(self._path)


@dataclass
class Agent:
    """One node's agent."""

    node: Node
    directory: Path
    tree: Path = REPOSITORY
    """Where its `ztunnel` is imported from."""
    process: subprocess.Popen[bytes] | None = None
    prefix: list[str] = field(default_factory=list)
    """Of its command."""
    program: list[str] = field(default_factory=lambda: list(COMMAND))
    """`ztunnel`."""
    overrides: dict[str, str] = field(default_factory=dict)
    """Settings that it starts with, as environment variables: more than the tests' own `--workers` and its file."""

    @property
    def socket(self) -> Path:
        return self.directory / "agent.sock"

    @property
    def log(self) -> str:
        """Everything it has logged."""
        file = self.directory / "agent.log"
        return file.read_text(errors="replace") if file.exists() else ""

    def start(self) -> None:
        """Starts it; `ready` says when it is."""
        with (self.directory / "agent.log").open("ab") as log:
            self.process = subprocess.Popen(
                ["nsenter", f"--net={self.node.path}", *self.prefix, *self.program, "run", "--config", self.directory / "agent.yaml"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.tree,
                env={**os.environ, **self.overrides},
            )

    def ask(self, what: str) -> Json:
        """An answer of the control API."""
        connection = _UnixConnection(self.socket)
        try:
            connection.request("GET", f"/v1/{what}")
            answer: Json = json.loads(connection.getresponse().read())
        finally:
            connection.close()
        return answer

    def rows(self, what: str) -> list[Json]:
        """The items of a listing."""
        items = self.ask(what)["items"]
        assert isinstance(items, list)
        return items

    def status(self) -> Json | None:
        """None while it cannot be reached."""
        try:
            return self.ask("status")
        except OSError:
            return None

    @property
    def is_ready(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, f"the agent ended:\n{self.log[-4000:]}"
        status = self.status()
        return status is not None and status["ready"] is True

    def await_ready(self) -> None:
        """Returns when it serves."""
        eventually(lambda: self.is_ready, within=PATIENCE_SECONDS, saying=f"{self.node.name} is ready")

    @property
    def is_running(self) -> bool:
        """Whether its process lives."""
        return self.process is not None and self.process.poll() is None

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def workers(self) -> list[int]:
        """Process ids of its data plane; none with `workers: 0`."""
        return children_of(self.pid)

    def row(self, pod: Pod) -> Json:
        """A pod's row of `status`; empty if it has none."""
        return next((row for row in self.rows("status") if row["uid"] == pod.uid), {})

    @property
    def problems(self) -> list[str]:
        """What `status` says is wrong, each as one line."""
        problems = self.ask("status")["problems"]
        assert isinstance(problems, list)
        return [" ".join(str(part) for part in problem.values()) for problem in problems]

    def said(self, *words: str) -> bool:
        """Whether one log line holds all of these words."""
        return any(all(word in line for word in words) for line in self.log.splitlines())

    def send(self, how: signal.Signals) -> None:
        """Sends a signal and does not wait."""
        assert self.process is not None
        self.process.send_signal(how)

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Ends it; returns its exit status."""
        self.send(how)
        return self.wait()

    def wait(self) -> int:
        """Its exit status, once it has ended."""
        assert self.process is not None
        return self.process.wait(PATIENCE_SECONDS)

    def check(self) -> None:
        """Asserts that it has met no bug of its own so far."""
        assert "Traceback" not in self.log, f"{self.node.name} logged a traceback:\n{self.log[self.log.index('Traceback') - 600 :][:4000]}"
        if self.is_running and self.status() is not None:
            assert self.metric("ztunnel_bugs_total") == 0, f"{self.node.name} counted a bug"

    def metric(self, name: str, **labels: str) -> float:
        """The sum of all series of a metric that carry these labels."""
        address = ("127.0.0.1", 15020)
        with self.node.tcp_socket(socket.AF_INET) as sock:
            sock.connect(address)
            sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            page = b"".join(iter(lambda: sock.recv(65536), b"")).decode()
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        lines = [line for line in page.splitlines() if line.split("{")[0].split(" ")[0] == name and all(each in line for each in wanted)]
        return sum(float(line.rpartition(" ")[2]) for line in lines)


class Mesh:
    """A topology, its manifests and its agents. A context manager."""

    def __init__(
        self,
        nodes: int = 2,
        *,
        settings: str = DEFAULT_SETTINGS,
        start: bool = True,
        leaf_hours: float = 24,
        tree: Path | None = None,
        poll_seconds: float = 0.05,
    ) -> None:
        """`settings`: lines of YAML that each agent's configuration gets in addition. `leaf_hours`: life of a certificate. `tree`: where
        the agents' `ztunnel` is; default: what the environment says with TESTED_TREE, or this repository. `poll_seconds`: between two
        looks at the manifests; the product's default is five times as long as ours."""
        self._tree = tree or Path(os.environ.get("TESTED_TREE", REPOSITORY))
        self.net = Topology()
        self._root = tempfile.TemporaryDirectory(prefix="mesh-")
        self.root = Path(self._root.name)
        self.manifests = self.root / "manifests"
        self.netns = self.root / "netns"
        for directory in (self.manifests, self.netns):
            directory.mkdir()
        self.pods: dict[str, Pod] = {}
        self._documents: dict[str, Json] = {}
        self._namespaces: dict[str, str] = {}
        self.namespace("default")
        self._leaf_hours = leaf_hours
        self._poll_seconds = poll_seconds
        self.agents = [self._agent(self.net.node(), settings) for _ in range(nodes)]
        if start:
            try:
                self.start()
            except BaseException as error:
                self.__exit__(type(error))  # the block that would leave it is never entered
                raise

    def __enter__(self) -> Mesh:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.check()
            else:
                self.tell()
        finally:
            for agent in self.agents:
                if agent.process is not None and agent.is_running:
                    agent.process.kill()
                    agent.process.wait()
            self.net.close()
            self._root.cleanup()

    def check(self) -> None:
        """Asserts that no agent has met a bug of its own."""
        for agent in self.agents:
            agent.check()

    def tell(self) -> None:
        """Shows the ends of the logs, for whoever looks at a failure."""
        for agent in self.agents:
            sys.stderr.write(f"---- {agent.node.name}\n{agent.log[-6000:]}\n")

    def start(self, *numbers: int) -> None:
        """Starts the agents that do not run, or those of them with these numbers, and waits until they are ready."""
        agents = [self.agents[number] for number in numbers or range(len(self.agents))]
        for agent in agents:
            if not agent.is_running:
                agent.start()
        for agent in agents:
            agent.await_ready()

    def pretend(self, pod: Pod) -> None:
        """Says of a pod on a node whose agent does not run that it is captured."""
        word = self.agent_of(pod).directory / "status" / pod.uid
        word.parent.mkdir(exist_ok=True)
        word.write_text("enabled")

    def _agent(self, node: Node, settings: str) -> Agent:
        directory = self.root / node.name
        directory.mkdir()
        (directory / "agent.yaml").write_text(
            f"node: {node.name}\n"
            f"sources: {{files: {self.manifests}, poll_seconds: {self._poll_seconds}, redirection_status: annotation}}\n"
            f"pods: {{netns_directory: {self.netns}, status_directory: {directory / 'status'}}}\n"
            f"ca: {{directory: {self.root / 'ca'}, leaf_hours: {self._leaf_hours}}}\n"
            f"admin: {{socket: {directory / 'agent.sock'}}}\n" + settings
        )
        return Agent(node, directory, self._tree)

    # What there is

    def apply(self, document: Json) -> None:
        """Creates or replaces an object."""
        metadata = document["metadata"]
        assert isinstance(metadata, dict)
        name = f"{document['kind']}-{metadata.get('namespace', '')}-{metadata['name']}"
        self._documents[name] = document
        temporary = self.manifests / f".{name}"
        temporary.write_text(json.dumps(document))
        temporary.replace(self.manifests / f"{name}.json")

    def delete(self, kind: str, name: str, namespace: str = "default") -> None:
        """Removes an object."""
        key = f"{kind}-{namespace}-{name}"
        del self._documents[key]
        (self.manifests / f"{key}.json").unlink()

    def namespace(self, name: str, **labels: str) -> None:
        """Creates or replaces a namespace."""
        self.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})

    def pod(
        self,
        name: str,
        *,
        node: int,
        ambient: bool = False,
        account: str = "",
        namespace: str = "default",
        labels: dict[str, str] | None = None,
        ports: dict[str, int] | None = None,
        ipv6: bool = True,
    ) -> Pod:
        """A running pod; its service account is its own name unless told. Names are unique in the mesh."""
        pod = self.net.nodes[node].pod(name, ipv6=ipv6)
        self.pods[name] = pod
        self._namespaces[name] = namespace
        (self.netns / pod.uid).symlink_to(pod.path)
        labels = {"app": name, **(labels or {}), **({AMBIENT: "ambient"} if ambient else {})}
        named = [{"name": each, "containerPort": port} for each, port in (ports or {}).items()]
        containers = [{"name": "app", "image": "app", "ports": named}]
        self.apply(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": pod.name, "namespace": namespace, "uid": pod.uid, "labels": labels, "annotations": {}},
                "spec": {"nodeName": pod.node, "serviceAccountName": account or name, "containers": containers},
                "status": {
                    "phase": "Running",
                    "podIP": pod.v4,
                    "podIPs": [{"ip": address} for address in pod.addresses],
                    "conditions": [{"type": "Ready", "status": "True"}],
                },
            }
        )
        return pod

    def remove_pod(self, name: str) -> None:
        """What a container runtime and an API server do when a pod is deleted: its interface and namespace go, then the object."""
        pod = self.pods.pop(name)
        node = next(node for node in self.net.nodes if node.name == pod.node)
        (self.netns / pod.uid).unlink()
        pod.command("ip", "link", "delete", "eth0")
        self.net.forget(node, pod)
        self.delete("Pod", name, self._namespaces.pop(name))

    def agent_of(self, pod: Pod) -> Agent:
        """The agent of a pod's node."""
        return next(agent for agent in self.agents if agent.node.name == pod.node)

    def identity(self, name: str) -> SpiffeId:
        """The identity of a pod whose service account is its name."""
        return SpiffeId(TRUST_DOMAIN, self._namespaces.get(name, "default"), name)

    def credentials(self, account: str, *, trust_domain: str = TRUST_DOMAIN) -> Credentials:
        """Credentials of any identity in `default`, signed by the mesh's own root."""
        now = time.time()
        return Authority(open_root(self.root / "ca", trust_domain, now)).issue(SpiffeId(trust_domain, "default", account), now)

    def peer(self, place: Place, to: Pod, *, account: str = "stranger", family: int = socket.AF_INET) -> HbonePeer:
        """A tunnel from a place without ztunnel to a pod's 15008, by somebody whom the mesh's root has certified."""
        sock = place.tcp_socket(family)
        sock.connect((to.address(family), INBOUND_HBONE))
        return HbonePeer(sock, self.credentials(account), self.identity(to.name))

    def service(self, name: str, app: str, ports: dict[int, int | str], vips: tuple[str, ...] = ()) -> None:
        """A service of the pods labelled `app`; headless without `vips`."""
        self.apply(
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": {"name": name, "namespace": "default"},
                "spec": {
                    "clusterIP": vips[0] if vips else "None",
                    "clusterIPs": list(vips) or ["None"],
                    "selector": {"app": app},
                    "ports": [{"name": f"p{port}", "port": port, "targetPort": target} for port, target in ports.items()],
                },
            }
        )

    def policy(self, name: str, spec: Json, kind: str = "AuthorizationPolicy", namespace: str = "default") -> None:
        """Creates or replaces a policy."""
        self.apply({"apiVersion": "security.istio.io/v1", "kind": kind, "metadata": {"name": name, "namespace": namespace}, "spec": spec})

    def clear(self, *kinds: str) -> None:
        """Removes all objects of these kinds."""
        for key in [key for key in self._documents if key.partition("-")[0] in kinds]:
            del self._documents[key]
            (self.manifests / f"{key}.json").unlink()

    def relabel(self, name: str, label: str, value: str | None) -> None:
        """Sets a pod's label; None removes it."""
        document = self._pod_document(name)
        if value is None:
            document["metadata"]["labels"].pop(label, None)
        else:
            document["metadata"]["labels"][label] = value
        self.apply(document)

    def reassign(self, name: str, account: str) -> None:
        """Gives a pod another service account, which no API server would do to a pod that keeps its UID; files can say anything."""
        document = self._pod_document(name)
        document["spec"]["serviceAccountName"] = account
        self.apply(document)

    def enrol(self, name: str, ambient: bool = True) -> None:
        """Puts a pod into the mesh or takes it out, at run time."""
        self.relabel(name, AMBIENT, "ambient" if ambient else None)

    def ready(self, name: str, is_ready: bool) -> None:
        """What the kubelet says of a pod's readiness probe."""
        document = self._pod_document(name)
        document["status"]["conditions"] = [{"type": "Ready", "status": str(is_ready)}]
        self.apply(document)

    def _pod_document(self, name: str) -> Any:
        """A copy."""
        return json.loads(json.dumps(self._documents[f"Pod-{self._namespaces[name]}-{name}"]))

    def annotate(self) -> bool:
        """What an API server's client does: the agents' word about their pods becomes an annotation. Whether any changed."""
        changed = False
        for name, pod in self.pods.items():
            path = self.agent_of(pod).directory / "status" / pod.uid
            word = path.read_text().strip() if path.exists() else ""
            document = self._pod_document(name)
            annotations = {"ambient.istio.io/redirection": word} if word else {}
            if document["metadata"]["annotations"] != annotations:
                document["metadata"]["annotations"] = annotations
                self.apply(document)
                changed = True
        return changed

    def settle(self) -> None:
        """Waits until every agent, its worker included, has taken over what was said and its pods are as they are wanted."""
        eventually(self._is_settled, within=PATIENCE_SECONDS, saying="the mesh has settled")

    def _is_settled(self) -> bool:
        if self.annotate():
            return False
        agents = [agent for agent in self.agents if agent.is_running]
        # The last question is answered by the worker, behind all changes that were sent to it before.
        return all(self._has_taken_over(agent) and agent.rows("connections") is not None for agent in agents)

    def _has_taken_over(self, agent: Agent) -> bool:
        pods = {key: document for key, document in self._documents.items() if document["kind"] == "Pod"}
        workloads = {f"Pod-{row['namespace']}-{row['name']}": row for row in agent.rows("workloads")}
        if set(workloads) != set(pods) or any(not _agrees(workloads[key], document) for key, document in pods.items()):
            return False
        for row in agent.rows("status"):
            document = pods.get(f"Pod-{row['namespace']}-{row['name']}")
            if document is None:  # a pod that is gone, and is being let go
                return False
            ambient = _is_ambient(document)
            if row["captured"] is not ambient or row["labelled"] is not ambient:
                return False
        said = {(row["namespace"], row["name"]) for row in agent.rows("policies") if row["kind"] == "AuthorizationPolicy"}
        if said != set(self._named("AuthorizationPolicy")):
            return False
        return {(row["namespace"], row["name"]) for row in agent.rows("services")} == set(self._named("Service"))

    def _named(self, kind: str) -> Iterator[tuple[str, str]]:
        for document in self._documents.values():
            if document["kind"] == kind:
                metadata = document["metadata"]
                assert isinstance(metadata, dict)
                yield metadata["namespace"], metadata["name"]


def _agrees(row: Json, document: Any) -> bool:
    ready = document["status"]["conditions"][0]["status"] == "True"
    return bool(
        (row["protocol"] == "HBONE") is _is_ambient(document) and row["ready"] is ready and row["uid"] == document["metadata"]["uid"]
    )


def _is_ambient(document: Any) -> bool:
    return bool(document["metadata"]["labels"].get(AMBIENT) == "ambient")


def children_of(pid: int) -> list[int]:
    """Process ids of the children that live."""
    return [int(each.name) for each in Path("/proc").iterdir() if each.name.isdigit() and _parent(each) == pid]


def _parent(process: Path) -> int:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0
