"""A mesh whose agents read it from a real API server: `tests.kit.mesh.Mesh` with the manifests there instead of in a directory.

Pods are network namespaces as ever; what a kubelet would report of them is written by the test. The API server stays outside of the
nodes' network: each node has a relay to it on its own loopback.
"""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path
from typing import Any

import yaml

from tests.kit.kube_api import ApiServer, User
from tests.kit.mesh import Agent, Json, Mesh
from tests.kit.netns import Node, Place, Pod
from tests.kit.polling import eventually
from ztunnel.node import netns

JOIN_SECONDS = 10.0
SETTLE_SECONDS = 120.0
_RIGHTS = Path(__file__).parents[2] / "deploy" / "kustomize" / "base" / "agent-rights.yaml"
AGENT_RULES: list[Any] = next(each["rules"] for each in yaml.safe_load_all(_RIGHTS.read_text()) if each["kind"] == "ClusterRole")
"""All that a node agent needs, as it is deployed."""
COLLECTIONS = {
    "Pod": "/api/v1/namespaces/{}/pods",
    "Service": "/api/v1/namespaces/{}/services",
    "AuthorizationPolicy": "/apis/security.istio.io/v1/namespaces/{}/authorizationpolicies",
    "PeerAuthentication": "/apis/security.istio.io/v1/namespaces/{}/peerauthentications",
}


class KubeAgent(Agent):
    """One that has an API server to wait for."""

    def await_ready(self) -> None:
        """Returns when it serves."""
        eventually(lambda: self.is_ready, within=SETTLE_SECONDS, saying=f"{self.node.name} is ready")


class KubeMesh(Mesh):
    """The API server must hold no other pods, and have the mesh's kinds (tests/kit/kube_crds.py)."""

    def __init__(self, api: ApiServer, nodes: int = 2, *, start: bool = True) -> None:
        self.api = api
        self._user = api.account("ztunnel-system", "ztunnel")
        api.allow(self._user, AGENT_RULES)
        self._relays: list[Relay] = []
        super().__init__(nodes, start=start)
        # The API server's own.
        self._documents["Service-default-kubernetes"] = {"kind": "Service", "metadata": {"namespace": "default", "name": "kubernetes"}}

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            super().__exit__(kind, *rest)
        finally:
            for relay in self._relays:
                relay.close()

    def __enter__(self) -> KubeMesh:
        return self

    def _agent(self, node: Node, settings: str) -> Agent:
        directory = self.root / node.name
        directory.mkdir()
        self._relays.append(Relay(node, self.api.port, (self.api.address, self.api.port)))
        (directory / "kubeconfig").write_text(self.api.kubeconfig(self._user))
        (directory / "agent.yaml").write_text(
            f"sources: {{kubernetes: true, kubeconfig: {directory / 'kubeconfig'}}}\n"
            f"pods: {{netns_directory: {self.netns}}}\n"
            f"ca: {{directory: {self.root / 'ca'}, leaf_hours: {self._leaf_hours}}}\n"
            f"admin: {{socket: {directory / 'agent.sock'}}}\n" + settings
        )
        agent = KubeAgent(node, directory, self._tree)
        agent.overrides["NODE_NAME"] = node.name
        return agent

    # What there is

    def apply(self, document: Json) -> None:
        """Creates or changes an object; of a pod its labels and its status."""
        own: Any = json.loads(json.dumps(document))
        metadata = own["metadata"]
        name = f"{own['kind']}-{metadata.get('namespace', '')}-{metadata['name']}"
        if own["kind"] == "Namespace":
            self.api.namespace(metadata["name"], metadata.get("labels"))
        elif own["kind"] == "Pod":
            metadata["uid"] = self._apply_pod(own, self._documents.get(name))
        else:
            self.api.apply(own)
        self._documents[name] = own

    def _apply_pod(self, document: Any, former: Any) -> str:
        metadata, path = document["metadata"], COLLECTIONS["Pod"].format(document["metadata"]["namespace"])
        if former is None:
            made: Any = self.api.request("POST", path, {"metadata": {**metadata, "uid": None}, "spec": document["spec"]})
        else:
            labels = {**dict.fromkeys(former["metadata"]["labels"]), **metadata["labels"]}
            made = self.api.request("PATCH", f"{path}/{metadata['name']}", {"metadata": {"labels": labels}})
        self.api.request("PATCH", f"{path}/{metadata['name']}/status", {"status": document["status"]}, patch="strategic-merge")
        return str(made["metadata"]["uid"])

    def pod(self, name: str, **options: Any) -> Pod:
        """See `Mesh.pod`; the UID is the API server's."""
        pod = super().pod(name, **options)
        uid = self._pod_document(name)["metadata"]["uid"]
        (self.netns / pod.uid).rename(self.netns / uid)
        pod.uid = uid
        return pod

    def delete(self, kind: str, name: str, namespace: str = "default") -> None:
        """Removes an object."""
        del self._documents[f"{kind}-{namespace}-{name}"]
        self.api.delete(f"{COLLECTIONS[kind].format(namespace)}/{name}")

    def clear(self, *kinds: str) -> None:
        """Removes all objects of these kinds."""
        for key in list(self._documents):
            kind, namespace, name = key.split("-", 2)
            if kind in kinds:
                self.delete(kind, name, namespace)

    def settle(self) -> None:
        """See `Mesh.settle`: here with waits of half a minute between two tries."""
        eventually(self._is_settled, within=SETTLE_SECONDS, saying="the mesh has settled")

    def annotate(self) -> bool:
        """The agents do it themselves."""
        return False

    def annotation(self, name: str) -> str:
        """What a pod says of its redirection."""
        found: Any = self.api.request("GET", f"{COLLECTIONS['Pod'].format(self._namespaces[name])}/{name}")
        return str(found["metadata"].get("annotations", {}).get("ambient.istio.io/redirection", ""))

    def events(self, name: str) -> list[Any]:
        """The Events about a pod."""
        found: Any = self.api.request("GET", f"/apis/events.k8s.io/v1/namespaces/{self._namespaces[name]}/events")
        return [each for each in found["items"] if each["regarding"]["name"] == name]

    @property
    def user(self) -> User:
        """The agents' service account."""
        return self._user


class Relay:
    """Carries connections from inside a namespace to an address outside of it, until it is closed."""

    def __init__(self, place: Place, port: int, target: tuple[str, int]) -> None:
        with netns.inside(place.fd):
            self._listener = socket.create_server(("127.0.0.1", port))
        self._target = target
        self._open: set[socket.socket] = set()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def close(self) -> None:
        """Ends everything."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join(JOIN_SECONDS)
        self._listener.close()
        for each in list(self._open):
            _shut(each)
        for thread in self._threads[1:]:
            thread.join(JOIN_SECONDS)

    def _accept(self) -> None:
        while True:
            try:
                inside, _ = self._listener.accept()
            except OSError:  # shut down
                return
            self._threads = [each for each in self._threads if each.is_alive()]
            self._threads.append(threading.Thread(target=self._carry, args=(inside,), daemon=True))
            self._threads[-1].start()

    def _carry(self, inside: socket.socket) -> None:
        with inside:
            try:
                outside = socket.create_connection(self._target, timeout=JOIN_SECONDS)
            except OSError:
                return
            with outside:
                outside.settimeout(None)
                both = {inside, outside}
                self._open |= both
                back = threading.Thread(target=_copy, args=(outside, inside), daemon=True)
                back.start()
                _copy(inside, outside)
                back.join()
                self._open -= both


def _copy(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            sink.sendall(data)
    except OSError:
        # One side is gone.
        pass
    # A client that ends its half has ended, and so has a server: both sides go.
    _shut(source)
    _shut(sink)


def _shut(each: socket.socket) -> None:
    try:
        each.shutdown(socket.SHUT_RDWR)
    except OSError:
        # It was already.
        return
