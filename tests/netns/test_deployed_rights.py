"""An agent with exactly the capabilities of the DaemonSet does all that one with every capability does."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

from tests.kit import apps
from tests.kit.cni import Chain, Sandbox, plugin
from tests.kit.cni_cluster import carries, cluster
from tests.kit.deployed import capabilities
from tests.kit.kubelet import process
from tests.kit.mesh import Agent, Mesh
from tests.kit.polling import eventually
from ztunnel.mesh.ports import INBOUND_HBONE

APP = 8080


def bounding_set(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("CapBnd")).split()[1], 16)


def limited() -> list[str]:
    """What starts a program with the capabilities of the DaemonSet and no others."""
    return ["setpriv", f"--bounding-set=-all,{','.join(f'+{name.lower()}' for name in capabilities())}", "--inh-caps=-all"]


def confinement(agent: Agent) -> str:
    """What its worker took from itself, and what it could not."""
    line = next(line for line in agent.log.splitlines() if "worker confined" in line)
    return line.partition("worker confined")[2]


def test_what_the_daemon_set_grants_is_enough() -> None:
    granted = capabilities()
    with Mesh(nodes=2, start=False) as mesh:
        free, bounded = mesh.agents
        bounded.prefix = limited()
        bounded.overrides["ZTUNNEL_WORKERS"] = free.overrides["ZTUNNEL_WORKERS"] = "1"
        mesh.start()
        assert bounding_set(bounded.pid).bit_count() == len(granted)
        there = mesh.pod("there", node=0, ambient=True)
        here = mesh.pod("here", node=1, ambient=True)
        mesh.settle()
        with apps.Echo(here, APP), apps.Echo(there, APP):
            assert apps.call(here, (there.v4, APP)) == b"hello"
            assert apps.call(there, (here.v4, APP)) == b"hello"
            assert bounded.rows("tunnels")
            mesh.enrol("here", ambient=False)
            mesh.settle()
            assert apps.call(here, (there.v4, APP)) == b"hello"
            mesh.enrol("here")
            mesh.settle()
            assert confinement(bounded) == confinement(free)
            assert [bounding_set(worker) for worker in bounded.workers] == [bounding_set(worker) for worker in free.workers]
            # A worker that hangs is somebody else's process; only its supervisor may end it, and does.
            (worker,) = bounded.workers
            os.kill(worker, signal.SIGSTOP)
            try:
                bounded.send(signal.SIGTERM)
                bounded.send(signal.SIGTERM)
                assert bounded.wait() == 0
                eventually(lambda: not Path(f"/proc/{worker}").exists(), within=30)
            finally:
                if Path(f"/proc/{worker}").exists():
                    os.kill(worker, signal.SIGKILL)


def test_new_pods_and_kubelets_probes_take_no_more(tmp_path: Path) -> None:
    for name in ("bin", "net.d", "state"):
        (tmp_path / name).mkdir()
    with cluster(tmp_path / "state") as made:
        bridge = made.chain.plugins[0]
        (tmp_path / "net.d" / "10-test.conf").write_text(json.dumps({"cniVersion": "1.0.0", "name": "test", **bridge}))
        made.agent.prefix = limited()
        made.agent.overrides.update(
            ZTUNNEL_PROBES_ENABLED="true",
            ZTUNNEL_CNI_PLUGIN=str(plugin()),
            ZTUNNEL_CNI_BIN_DIRECTORY=str(tmp_path / "bin"),
            ZTUNNEL_CNI_CONF_DIRECTORY=str(tmp_path / "net.d"),
            ZTUNNEL_CNI_REMOVE_AT_EXIT="true",
        )
        made.mesh.policy("strict", {"mtls": {"mode": "STRICT"}}, kind="PeerAuthentication")
        made.start()
        listed = json.loads((tmp_path / "net.d" / "10-test.conf.conflist").read_text())
        chain = Chain(made.node, tuple(listed["plugins"]), ours=tmp_path / "bin" / "ztunnel-cni")
        args = made.schedule("new")
        with Sandbox.make("new") as sandbox, process(made.node, tmp_path, None) as kubelet:
            chain.add(sandbox, args)
            assert carries(sandbox, made.server, made.agent) == {INBOUND_HBONE}
            with apps.Echo(sandbox.place, APP):
                eventually(lambda: kubelet.probe(sandbox.place.v4) == "healthz", within=60)
            chain.delete(sandbox, args)
        assert made.agent.stop() == 0
        assert [each.name for each in (tmp_path / "net.d").iterdir()] == ["10-test.conf"]
