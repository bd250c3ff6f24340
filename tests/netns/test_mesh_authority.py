"""A mesh whose agents get their certificates from `ztunnel ca`: a replica beside each agent, one root, keys that stay where they are."""

from __future__ import annotations

import json
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path

import yaml

from tests.kit import apps
from tests.kit.authority import AuthorityProcess, authority
from tests.kit.mesh import Mesh
from tests.kit.polling import eventually

APP = 8080
SYSTEM = "ztunnel-system"


def pods(mesh: Mesh) -> Path:
    """What the authority knows of pods."""
    directory = mesh.root / "pods"
    directory.mkdir(exist_ok=True)
    return directory


def tell(mesh: Mesh) -> None:
    """The authority hears of the mesh's pods."""
    for file in mesh.manifests.glob("Pod-*.json"):
        temporary = pods(mesh) / f".{file.name}"
        temporary.write_bytes(file.read_bytes())
        temporary.replace(pods(mesh) / file.name)


def agents_as_pods(mesh: Mesh) -> None:
    """What the authority knows the agents by: a pod and a token for each."""
    callers = []
    for number, agent in enumerate(mesh.agents):
        name = f"ztunnel-{number}"
        metadata = {"name": name, "namespace": SYSTEM, "uid": f"uid-{name}"}
        spec = {"nodeName": agent.node.name, "serviceAccountName": "ztunnel", "hostNetwork": True}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}
        # Only there: to the agents of this mesh their own pods do not matter.
        (pods(mesh) / f"{name}.json").write_text(json.dumps(pod))
        digest = sha256(name.encode()).hexdigest()
        callers.append({"token_sha256": digest, "namespace": SYSTEM, "serviceAccount": "ztunnel", "pod": name, "uid": f"uid-{name}"})
        (agent.directory / "token").write_text(name)
        agent.overrides.update(
            ZTUNNEL_CA_ADDRESS="127.0.0.1:15012",
            ZTUNNEL_CA_SERVER_NAME="ca.test",
            ZTUNNEL_CA_ROOTS_FILE=str(mesh.root / "roots.pem"),
            ZTUNNEL_CA_TOKEN_FILE=str(agent.directory / "token"),
        )
    (mesh.root / "callers.yaml").write_text(yaml.safe_dump(callers))


def replica(mesh: Mesh, stack: ExitStack, number: int) -> AuthorityProcess:
    """Beside the agent of that number. Replicas share the state, as they share a Secret."""
    files = {
        "callers": str(mesh.root / "callers.yaml"),
        "pods": str(pods(mesh)),
        "state": str(mesh.root / "authority"),
        "bundle": str(mesh.root / "roots.pem"),
    }
    settings = {"files": files, "listen": {"address": "127.0.0.1", "port": 15012, "names": ["ca.test"]}}
    node = mesh.agents[number].node
    directory = mesh.root / f"authority-{number}"
    process = stack.enter_context(authority(directory, settings, prefix=["nsenter", f"--net={node.path}"]))
    assert process.port == 15012
    return process


def test_tunnels_are_made_with_certificates_of_an_authority_and_outlive_it() -> None:
    with ExitStack() as stack:
        mesh = stack.enter_context(Mesh(nodes=2, start=False))
        agents_as_pods(mesh)
        replicas = [replica(mesh, stack, number) for number in range(2)]
        client = mesh.pod("client", node=0, ambient=True)
        server = mesh.pod("server", node=1, ambient=True)
        tell(mesh)
        eventually((mesh.root / "roots.pem").exists, within=60)
        mesh.start()
        mesh.settle()
        with apps.Echo(server, APP):
            assert apps.outcome(client, (server.v4, APP)) == "echoed"
            assert mesh.agents[0].rows("tunnels")
            old = stack.enter_context(client.connect((server.v4, APP)))
            assert apps.ping(old)
            replicas[0].says(f"identity={mesh.identity('client')}")
            assert "ns/default/sa/server" not in replicas[0].log()
            assert not (mesh.root / "ca").exists()
            for each in replicas:
                assert each.end() == 0
            # Nobody to ask: what there is goes on, and who is new waits, with the reason in the agent's problems.
            assert apps.outcome(client, (server.v4, APP)) == "echoed"
            newcomer = mesh.pod("newcomer", node=0, ambient=True)
            tell(mesh)
            identity = str(mesh.identity("newcomer"))
            eventually(lambda: any(identity in each and "cannot connect" in each for each in mesh.agents[0].problems), within=60)
            replica(mesh, stack, 0)
            eventually(lambda: apps.outcome(newcomer, (server.v4, APP)) == "echoed", within=60)
            assert apps.ping(old)
