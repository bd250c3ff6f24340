"""Our plugin in libcni's own hands (cnitool), and pods that a real API server has."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.kit import kube_crds
from tests.kit.cni import DEBIANS, Sandbox, arguments, plugin
from tests.kit.cni_cluster import Cluster, carries, chain_of, cluster
from tests.kit.kube_api import ApiServer, Json, tools
from tests.kit.kube_mesh import KubeMesh
from tests.kit.polling import eventually
from ztunnel.mesh.ports import INBOUND_HBONE

pytestmark = pytest.mark.netns


class CniTool:
    """cnitool on a node, with a /var/lib of its own: libcni keeps results there."""

    def __init__(self, cluster: Cluster, directory: Path, holder: int) -> None:
        programs, _ = tools()
        assert programs is not None
        self._program = programs / "cnitool"
        self._inside = ["nsenter", "--mount", f"--target={holder}", "nsenter", f"--net={cluster.node.path}"]
        own = directory / "bin"
        own.mkdir()
        (own / "ztunnel-cni").symlink_to(plugin())
        self._paths = {"CNI_PATH": f"{own}:{DEBIANS}", "NETCONFPATH": str(directory), "PATH": os.environ["PATH"]}
        listed = {"cniVersion": "1.0.0", "name": "test", "plugins": cluster.chain.plugins}
        (directory / "10-test.conflist").write_text(json.dumps(listed))

    def __call__(self, verb: str, sandbox: Sandbox, args: str) -> str:
        """What it printed. Raises: AssertionError with what it said."""
        environment = {**self._paths, "CNI_ARGS": args}
        # Its ids of containers follow from the path.
        argv: list[str | Path] = [*self._inside, self._program, verb, "test", sandbox.path]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, env=environment, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return str(done.stdout)


@contextmanager
def own_state() -> Iterator[int]:
    """A process in a mount namespace with an empty /var/lib; its number."""
    script = "mount -t tmpfs tmpfs /var/lib && echo up && exec cat"
    with subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"up\n"
        try:
            yield holder.pid
        finally:
            holder.kill()


def test_a_chain_that_libcni_carries_out(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "net.d").mkdir()
    with cluster(tmp_path / "state") as made, Sandbox.make("tool") as sandbox, own_state() as holder:
        made.start()
        tool = CniTool(made, tmp_path / "net.d", holder)
        args = made.schedule("tool")
        result = json.loads(tool("add", sandbox, args))
        sandbox.place.v4 = result["ips"][0]["address"].partition("/")[0]
        assert carries(sandbox, made.server, made.agent) == {INBOUND_HBONE}
        tool("check", sandbox, args)
        made.agent.stop()
        with pytest.raises(AssertionError, match="the pod is in the mesh"):
            tool("check", sandbox, args)
        tool("del", sandbox, args)


def test_a_pod_of_a_real_api_server_starts_captured_before_its_object_has_an_address(tmp_path: Path) -> None:
    with ApiServer.started() as api:
        kube_crds.define(api)
        with KubeMesh(api, start=False) as mesh:
            agent = mesh.agents[0]
            agent.overrides.update(
                ZTUNNEL_PODS_FIND="node",
                ZTUNNEL_PODS_RUNTIME_DIRECTORY="/run/netns",
                ZTUNNEL_CNI_ENABLED="true",
                ZTUNNEL_CNI_SOCKET=str(tmp_path / "cni.sock"),
                ZTUNNEL_CNI_KNOWN_FILE=str(tmp_path / "known"),
                ZTUNNEL_CNI_ADD_SECONDS="60",
            )
            server = mesh.pod("server", node=1, ambient=True)
            mesh.start()
            mesh.settle()
            chain = chain_of(agent.node, tmp_path)
            made: Any = api.request("POST", "/api/v1/namespaces/default/pods", scheduled("new", agent.node.name))
            args = arguments("new", uid=made["metadata"]["uid"])
            with Sandbox.make("new") as sandbox:
                chain.add(sandbox, args)
                assert carries(sandbox, server, agent) == {INBOUND_HBONE}
                api.status("default", "new", address=sandbox.place.v4)
                eventually(lambda: annotation(api, "new") == "enabled", within=120)
                assert carries(sandbox, server, agent) == {INBOUND_HBONE}
                api.delete("/api/v1/namespaces/default/pods/new")
                chain.delete(sandbox, args)


def scheduled(name: str, node: str) -> Json:
    """A pod as it is when kubelet begins to make it."""
    labels = {"istio.io/dataplane-mode": "ambient"}
    spec = {"nodeName": node, "serviceAccountName": "default", "containers": [{"name": "app", "image": "app"}]}
    return {"metadata": {"name": name, "labels": labels}, "spec": spec}


def annotation(api: ApiServer, name: str) -> str:
    found: Any = api.request("GET", f"/api/v1/namespaces/default/pods/{name}")
    return str(found["metadata"].get("annotations", {}).get("ambient.istio.io/redirection", ""))
