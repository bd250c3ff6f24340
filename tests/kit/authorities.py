"""Authorities beside the agents of a `Mesh`, which get their certificates there instead of from a directory.

agents_as_pods(mesh)                         # before the agents start
process = replica(mesh, stack, 0)            # beside the agent of node 0, on its loopback
tell(mesh)                                   # and again for each new pod
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path

import yaml

from tests.kit.authority import AuthorityProcess, authority
from tests.kit.mesh import Mesh

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


def replica(mesh: Mesh, stack: ExitStack, number: int, **more: object) -> AuthorityProcess:
    """Beside the agent of that number. Replicas share the state, as they share a Secret. `more`: further settings."""
    files = {
        "callers": str(mesh.root / "callers.yaml"),
        "pods": str(pods(mesh)),
        "state": str(mesh.root / "authority"),
        "bundle": str(mesh.root / "roots.pem"),
    }
    settings = {"files": files, "listen": {"address": "127.0.0.1", "port": 15012, "names": ["ca.test"]}, **more}
    node = mesh.agents[number].node
    directory = mesh.root / f"authority-{number}"
    process = stack.enter_context(authority(directory, settings, prefix=["nsenter", f"--net={node.path}"]))
    assert process.port == 15012
    return process
