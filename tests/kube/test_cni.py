"""cnitool, which is libcni itself, carries out a chain with our plugin at its end."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.kit.cni import DEBIANS, Sandbox, plugin
from tests.kit.cni_cluster import Cluster, carries, cluster
from tests.kit.kube_api import tools
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
