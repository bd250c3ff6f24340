"""A mesh for end-to-end tests: real agents in the nodes of a `Topology`, fed with manifests, and words to say what should be there.

    with Mesh(nodes=2) as mesh:
        client = mesh.pod("client", node=0, ambient=True)
        server = mesh.pod("server", node=1, ambient=True)
        mesh.settle()
        with server.listener(8080) as listening, client.connect((server.v4, 8080)) as connection: ...

Each agent is `ztunnel run` in its own process, killed when the test ends. Pods are namespaces that belong to the test process, so
applications are plain sockets here.
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
from dataclasses import dataclass, field
from pathlib import Path

from tests.kit.netns import Node, Pod, Topology
from tests.kit.polling import eventually

REPOSITORY = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "ztunnel"]
Json = dict[str, object]


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("agent", timeout=5)
        self._path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(5)
        self.sock.connect(self._path)


@dataclass
class Agent:
    """One node's agent."""

    node: Node
    directory: Path
    process: subprocess.Popen[bytes] | None = None
    overrides: dict[str, str] = field(default_factory=dict)

    @property
    def socket(self) -> Path:
        return self.directory / "agent.sock"

    @property
    def log(self) -> str:
        """Everything it has logged."""
        return (self.directory / "agent.log").read_text(errors="replace")

    def start(self) -> None:
        """Starts it; `ready` says when it is."""
        with (self.directory / "agent.log").open("ab") as log:
            self.process = subprocess.Popen(
                ["nsenter", f"--net={self.node.path}", *COMMAND, "run", "--config", self.directory / "agent.yaml"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=REPOSITORY,
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

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Ends it; returns its exit status."""
        assert self.process is not None
        self.process.send_signal(how)
        return self.process.wait(20)

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

    def __init__(self, nodes: int = 2, *, settings: str = "", start: bool = True) -> None:
        """`settings`: lines of YAML that each agent's configuration gets in addition."""
        self.net = Topology()
        self._root = tempfile.TemporaryDirectory(prefix="mesh-")
        self.root = Path(self._root.name)
        self.manifests = self.root / "manifests"
        self.netns = self.root / "netns"
        for directory in (self.manifests, self.netns):
            directory.mkdir()
        self.pods: dict[str, Pod] = {}
        self._documents: dict[str, Json] = {}
        self.namespace("default")
        self.agents = [self._agent(self.net.node(), settings) for _ in range(nodes)]
        if start:
            self.start()

    def __enter__(self) -> Mesh:
        return self

    def __exit__(self, *_: object) -> None:
        for agent in self.agents:
            if agent.process is not None and agent.process.poll() is None:
                agent.process.kill()
                agent.process.wait()
        self.net.close()
        self._root.cleanup()

    def start(self) -> None:
        """Starts all agents and waits until they are ready."""
        for agent in self.agents:
            agent.start()
        for agent in self.agents:
            eventually(lambda agent=agent: agent.is_ready, within=20, saying=f"{agent.node.name} is ready")

    def _agent(self, node: Node, settings: str) -> Agent:
        directory = self.root / node.name
        directory.mkdir()
        (directory / "agent.yaml").write_text(
            f"node: {node.name}\n"
            f"sources: {{files: {self.manifests}, poll_seconds: 0.05, redirection_status: annotation}}\n"
            f"pods: {{netns_directory: {self.netns}, status_directory: {directory / 'status'}}}\n"
            f"ca: {{directory: {self.root / 'ca'}}}\n"
            f"admin: {{socket: {directory / 'agent.sock'}}}\n" + (settings or "enrolment: {grace_seconds: 0.3, drift_seconds: 1}\n")
        )
        return Agent(node, directory)

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
        self.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})

    def pod(
        self,
        name: str,
        *,
        node: int,
        ambient: bool = False,
        account: str = "",
        labels: dict[str, str] | None = None,
        ports: dict[str, int] | None = None,
        ipv6: bool = True,
    ) -> Pod:
        """A running pod in `default`; its service account is its own name unless told."""
        pod = self.net.nodes[node].pod(name, ipv6=ipv6)
        self.pods[name] = pod
        (self.netns / pod.uid).symlink_to(pod.path)
        self._write_pod(pod, account or name, {"app": name, **(labels or {})}, ports or {}, ambient=ambient)
        return pod

    def _write_pod(self, pod: Pod, account: str, labels: dict[str, str], ports: dict[str, int], *, ambient: bool) -> None:
        if ambient:
            labels = {**labels, "istio.io/dataplane-mode": "ambient"}
        container = {"name": "app", "image": "app", "ports": [{"name": name, "containerPort": port} for name, port in ports.items()]}
        self.apply(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": pod.name, "namespace": "default", "uid": pod.uid, "labels": labels, "annotations": {}},
                "spec": {"nodeName": pod.node, "serviceAccountName": account, "containers": [container]},
                "status": {
                    "phase": "Running",
                    "podIP": pod.v4,
                    "podIPs": [{"ip": address} for address in pod.addresses],
                    "conditions": [{"type": "Ready", "status": "True"}],
                },
            }
        )

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
        self.apply({"apiVersion": "security.istio.io/v1", "kind": kind, "metadata": {"name": name, "namespace": namespace}, "spec": spec})

    def relabel(self, name: str, **labels: str | None) -> None:
        """Changes a pod's labels; None removes one. Underscores stand for nothing: use `ambient=` words through `enrol`."""
        document = json.loads(json.dumps(self._documents[f"Pod-default-{name}"]))
        for key, value in labels.items():
            if value is None:
                document["metadata"]["labels"].pop(key, None)
            else:
                document["metadata"]["labels"][key] = value
        self.apply(document)

    def enrol(self, name: str, ambient: bool = True) -> None:
        """Puts a pod into the mesh or takes it out, at run time."""
        self.relabel(name, **{"istio.io/dataplane-mode": "ambient" if ambient else None})

    def annotate(self) -> None:
        """What an API server's client does: the agents' word about their pods becomes an annotation."""
        for name, pod in self.pods.items():
            document = self._documents.get(f"Pod-default-{name}")
            if document is None:
                continue
            agent = next(agent for agent in self.agents if agent.node.name == pod.node)
            path = agent.directory / "status" / pod.uid
            word = path.read_text().strip() if path.exists() else ""
            changed = json.loads(json.dumps(document))
            if word:
                changed["metadata"]["annotations"]["ambient.istio.io/redirection"] = word
            else:
                changed["metadata"]["annotations"].pop("ambient.istio.io/redirection", None)
            if changed != document:
                self.apply(changed)

    def settle(self) -> None:
        """Waits until every agent has taken over what was said and its pods are as they are wanted."""
        eventually(self._is_settled, within=20, saying="the mesh has settled")

    def _is_settled(self) -> bool:
        self.annotate()
        ambient = {name for name, document in self._documents.items() if document["kind"] == "Pod" and _is_ambient(document)}
        for agent in self.agents:
            if agent.process is None or agent.process.poll() is not None:
                continue
            rows = {f"Pod-{row['namespace']}-{row['name']}": row for row in agent.rows("status")}
            workloads = {f"Pod-{row['namespace']}-{row['name']}": row for row in agent.rows("workloads")}
            services = len(agent.rows("services"))
            for name, row in rows.items():
                if row["captured"] is not (name in ambient) or row["labelled"] is not (name in ambient):
                    return False
            for name in self._documents:
                if name.startswith("Pod-"):
                    row_ = workloads.get(name)
                    if row_ is None or (row_["protocol"] == "HBONE") is not (name in ambient):
                        return False
            if services != sum(document["kind"] == "Service" for document in self._documents.values()):
                return False
            if set(workloads) != {name for name in self._documents if name.startswith("Pod-")}:
                return False
        return True


def _is_ambient(document: Json) -> bool:
    metadata = document["metadata"]
    assert isinstance(metadata, dict)
    return bool(metadata["labels"].get("istio.io/dataplane-mode") == "ambient")
