"""A mesh in which the pods of one node come by CNI: Debian's bridge plugin, then ours, then a real agent; and what shows how they fare."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.kit import apps
from tests.kit.cni import Chain, Sandbox, arguments
from tests.kit.mesh import Agent, Json, Mesh
from tests.kit.netns import Node, Pod
from ztunnel.mesh.ports import INBOUND_HBONE

APP = 8080
MARKER = b"plaintext-marker-" * 4
WAIT = 60
AMBIENT = {"istio.io/dataplane-mode": "ambient"}


def chain_of(node: Node, directory: Path) -> Chain:
    """A bridge on the node, then our plugin, whose agent has its socket and its list in the directory."""
    addresses: Json = {
        "type": "host-local",
        "dataDir": str(directory / "ipam"),
        "ranges": [[{"subnet": f"10.{100 + node.number}.0.128/25"}]],
    }
    addresses["routes"] = [{"dst": "0.0.0.0/0"}]
    bridge: Json = {"type": "bridge", "bridge": "cni0", "isGateway": True, "ipam": addresses}
    ours: Json = {"type": "ztunnel-cni", "socket": str(directory / "cni.sock"), "known": str(directory / "known"), "waitSeconds": 90}
    return Chain(node, (bridge, ours))


class Cluster:
    """Two nodes; pods on the first come by CNI. The server is a pod of the mesh on the second."""

    def __init__(self, mesh: Mesh, directory: Path) -> None:
        self.mesh = mesh
        self.agent = mesh.agents[0]
        self.node = self.agent.node
        self.known = directory / "known"
        self.socket = directory / "cni.sock"
        self.agent.overrides.update(
            ZTUNNEL_PODS_FIND="node",
            ZTUNNEL_PODS_RUNTIME_DIRECTORY="/run/netns",
            ZTUNNEL_CNI_ENABLED="true",
            ZTUNNEL_CNI_SOCKET=str(self.socket),
            ZTUNNEL_CNI_KNOWN_FILE=str(self.known),
            ZTUNNEL_CNI_ADD_SECONDS="60",
        )
        self.chain = chain_of(self.node, directory)
        self.server = mesh.pod("server", node=1, ambient=True)
        mesh.namespace("plain")

    def start(self) -> None:
        self.mesh.start()
        self.mesh.settle()

    def schedule(self, name: str, *, namespace: str = "default", labels: dict[str, str] = AMBIENT, addresses: tuple[str, ...] = ()) -> str:
        """A pod as the API server has it before its sandbox is made, and later. Its CNI_ARGS."""
        uid = f"uid-{name}"
        self.mesh.apply(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": name, "namespace": namespace, "uid": uid, "labels": {"app": name, **labels}, "annotations": {}},
                "spec": {"nodeName": self.node.name, "serviceAccountName": name, "containers": [{"name": "app", "image": "app"}]},
                "status": {"phase": "Pending", "podIPs": [{"ip": each} for each in addresses]},
            }
        )
        return arguments(name, namespace, uid)

    def row(self, name: str) -> Json:
        return next((row for row in self.agent.rows("status") if row["name"] == name), {})


@contextmanager
def cluster(directory: Path) -> Iterator[Cluster]:
    with Mesh(nodes=2, start=False) as mesh:
        yield Cluster(mesh, directory)


def carries(sandbox: Sandbox, server: Pod, agent: Agent) -> set[int]:
    """The ports that a call from the sandbox to the server shows on the wire between the nodes."""
    with apps.tapped(agent.node) as tap, apps.Echo(server, APP, name="server"):
        assert apps.call(sandbox.place, (server.v4, APP), MARKER).endswith(MARKER)
        # Other pods' tunnels live on, and speak now and then.
        own = [each for each in tap.look() if sandbox.place.v4 in (each.source, each.destination)]
        ports = {min(each.source_port, each.destination_port) for each in own} & {APP, INBOUND_HBONE}
        assert any(MARKER in each.payload for each in own) is (APP in ports)
        return ports
