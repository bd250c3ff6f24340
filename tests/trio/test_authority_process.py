"""`ztunnel ca` without a cluster, as a process: readiness, metrics, certificates, a new root, an orderly end."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path
from urllib.request import urlopen

import pytest
from cryptography import x509

from tests.kit.authority import AuthorityProcess, authority
from tests.kit.polling import eventually, eventually_async
from ztunnel.ca.remote import RemoteAuthority
from ztunnel.ca.request import IssueError
from ztunnel.hbone.handshake import Credentials, TlsContexts
from ztunnel.mesh.identity import SpiffeId

CART = SpiffeId("cluster.local", "shop", "cart")
BANK = SpiffeId("cluster.local", "shop", "bank")
POD = "---\napiVersion: v1\nkind: Pod\nmetadata: {name: %s, namespace: %s, uid: %s}\nspec: {nodeName: %s, serviceAccountName: %s}\n"


def free_ports(number: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def files(directory: Path, **more: object) -> dict[str, object]:
    """Settings, callers, and pods on two nodes."""
    directory.mkdir(exist_ok=True)
    pods = directory / "pods"
    pods.mkdir(exist_ok=True)
    (pods / "pods.yaml").write_text(
        POD % ("agent-1", "mesh", "uid-agent-1", "node-1", "agent")
        + POD % ("cart-0", "shop", "uid-cart-0", "node-1", "cart")
        + POD % ("bank-0", "shop", "uid-bank-0", "node-2", "bank")
    )
    digest = sha256(b"secret").hexdigest()
    callers = f"- {{token_sha256: {digest}, namespace: mesh, serviceAccount: agent, pod: agent-1, uid: uid-agent-1}}\n"
    (directory / "callers.yaml").write_text(callers)
    (directory / "token").write_text("secret")
    return {
        "agents": ["mesh/agent"],
        "files": {
            "callers": str(directory / "callers.yaml"),
            "pods": str(pods),
            "state": str(directory / "state"),
            "bundle": str(directory / "roots.pem"),
        },
        **more,
    }


def client(process: AuthorityProcess, directory: Path) -> RemoteAuthority:
    target = process.target
    return RemoteAuthority(target, directory / "roots.pem", directory / "token", "Kubernetes", 3600)


async def obtain(process: AuthorityProcess, directory: Path, identity: SpiffeId = CART) -> Credentials:
    return await client(process, directory).obtain(identity, time.time())


async def test_certificates_from_files_alone(tmp_path: Path) -> None:
    with authority(tmp_path / "run", files(tmp_path)) as process:
        assert process.port
        await eventually_async((tmp_path / "roots.pem").exists, within=60)
        TlsContexts(await obtain(process, tmp_path))
        with pytest.raises(IssueError):
            await obtain(process, tmp_path, BANK)
        process.says("reason=not_on_node")
        first = (tmp_path / "roots.pem").read_bytes()
        assert process.end() == 0
    with authority(tmp_path / "run", files(tmp_path)) as process:
        await obtain(process, tmp_path)
        assert (tmp_path / "roots.pem").read_bytes() == first


async def test_a_wish_in_a_file_brings_a_new_root(tmp_path: Path) -> None:
    with authority(tmp_path / "run", files(tmp_path, root={"spread_hours": 0.0})) as process:
        assert process.port
        await eventually_async((tmp_path / "roots.pem").exists, within=60)
        (old,) = x509.load_pem_x509_certificates((tmp_path / "roots.pem").read_bytes())
        (tmp_path / "state" / "rotate").write_text("please")

        def signs() -> bool:
            bundle = x509.load_pem_x509_certificates((tmp_path / "roots.pem").read_bytes())
            return len(bundle) == 2 and bundle[1] == old

        await eventually_async(signs, within=60)
        credentials = await obtain(process, tmp_path)
        assert len(x509.load_pem_x509_certificates(credentials.roots_pem)) == 2


def test_ports_for_operators(tmp_path: Path) -> None:
    metrics, readiness = free_ports(2)
    admin = {"address": "127.0.0.1", "metrics_port": metrics, "readiness_port": readiness}
    with authority(tmp_path / "run", files(tmp_path, admin=admin)) as process:
        assert process.port

        def ready() -> bool:
            with urlopen(f"http://127.0.0.1:{readiness}/healthz/ready", timeout=30) as answer:
                return bool(answer.status == 200)

        assert eventually(ready, within=60)
        with urlopen(f"http://127.0.0.1:{metrics}/metrics", timeout=30) as answer:
            page = answer.read().decode()
    assert 'istio_build{component="ztunnel-ca",tag=' in page
    assert "ztunnel_ca_pods 3.0" in page
    assert "ztunnel_ca_roots 1.0" in page


def test_settings_are_checked_without_running(tmp_path: Path) -> None:
    (tmp_path / "ca.yaml").write_text("listen: {port: 99999}\nagents: [x]\n")
    command = [sys.executable, "-m", "ztunnel", "ca", "--config", str(tmp_path / "ca.yaml"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "listen.port: between 0 and 65535 is expected, found 99999" in done.stderr
    assert "agents: namespace/service-account is expected" in done.stderr


def test_without_a_cluster_it_says_what_is_missing(tmp_path: Path) -> None:
    with authority(tmp_path / "run", {"kubernetes": {"kubeconfig": str(tmp_path / "missing")}}) as process:
        assert process.process.wait(60) == 1
        process.says("missing")


def test_an_interrupt_ends_it_too(tmp_path: Path) -> None:
    with authority(tmp_path / "run", files(tmp_path)) as process:
        assert process.port
        process.process.send_signal(signal.SIGINT)
        assert process.process.wait(60) == 0
