"""The lab's controllers at work: watching, terminals, pods on the node's network, init containers, endpoints that come and go, nginx."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tests.kit import labs
from tests.kit.labs import REPOSITORY, Lab
from tests.kit.polling import eventually
from ztunnel.lab.objects import LabError
from ztunnel.lab.paths import LAB_DIR_VARIABLE
from ztunnel.mesh.manifests.tree import at, branches, text

pytestmark = pytest.mark.slow

MANIFESTS = """
apiVersion: v1
kind: Pod
metadata: {name: client}
spec: {nodeName: node-1, containers: [{name: c, image: curlimages/curl}]}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec: {containers: [{name: echo, image: echo, ports: [{containerPort: 8080, name: http}, {containerPort: 5353, protocol: UDP}]}]}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {selector: {app: web}, ports: [{port: 80, targetPort: http, name: http}, {port: 5353, protocol: UDP, name: udp}]}
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """A lab that these tests change."""
    with labs.up(MANIFESTS, mesh=False) as found:
        yield found


def _pod(name: str, **spec: object) -> dict[str, object]:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}


def test_scaling_changes_who_answers_without_a_failed_request(lab: Lab) -> None:
    lab.scale("web", 3)
    script = "for i in $(seq 150); do curl -sf --max-time 2 http://web/ || echo FAILED; done"
    lab.settle()
    told = lab.start("client", "sh", "-c", script)
    lab.scale("web", 5)
    lab.settle()
    output, _ = told.communicate(timeout=30)
    assert b"FAILED" not in output
    names = {text(pod, "metadata", "name") for pod in lab.list("pods", selector="app=web")}
    again = lab.exec("client", "sh", "-c", script).stdout
    assert {name for name in names if name in again} == names
    lab.scale("web", 0)
    lab.settle()
    assert lab.curl("client", "http://web/").code == 7
    lab.scale("web", 1)
    lab.settle()
    assert lab.curl("client", "http://web/").code == 0


def test_udp_goes_through_service_addresses(lab: Lab) -> None:
    listen = (
        "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('0.0.0.0', 5353)); print('up', flush=True);"
        "data, peer = s.recvfrom(99); s.sendto(data + b' from ' + peer[0].encode(), peer)"
    )
    server = lab.start("deploy/web", "python3", "-c", listen)
    assert server.stdout is not None
    assert server.stdout.readline() == b"up\n"
    ask = (
        "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.connect(('web', 5353)); s.settimeout(5); s.send(b'hi');"
        "print(s.recv(99).decode())"
    )
    assert lab.exec("client", "python3", "-c", ask).stdout == f"hi from {lab.address('client')}\n"


def _watched(name: str) -> dict[str, object]:
    return {**_pod(name, containers=[{"name": "c", "command": ["sleep", "100"]}]), "metadata": {"name": name, "labels": {"watched": ""}}}


def test_changes_can_be_watched(lab: Lab) -> None:
    words = [sys.executable, "-m", "ztunnel", "lab", "get", "pods", "-w", "-l", "watched", "--name", lab.name, "--no-headers", "-o", "wide"]
    environment = os.environ | {LAB_DIR_VARIABLE: str(lab.state.parent), "PYTHONPATH": str(REPOSITORY)}
    lab.apply([_watched("anchor")])
    lab.settle()
    with subprocess.Popen(words, stdout=subprocess.PIPE, env=environment) as watching:
        assert watching.stdout is not None
        assert watching.stdout.readline().split()[0] == b"anchor"
        lab.apply([_watched("seen")])
        states: list[str] = []
        while "Running" not in states:
            states.append(watching.stdout.readline().split()[2].decode())
        assert states[0] == "Pending"
        lab.delete("pod", "seen", wait=False)
        while states[-1] != "Terminating":
            states.append(watching.stdout.readline().split()[2].decode())
        watching.terminate()


def test_a_terminal_is_a_terminal(lab: Lab) -> None:
    """The command line itself runs in a terminal here, as a person's would."""
    words = [
        sys.executable,
        "-m",
        "ztunnel",
        "lab",
        "exec",
        "-it",
        "--name",
        lab.name,
        "client",
        "--",
        "sh",
        "-c",
        "tty; stty size; read x; echo got $x; exit 9",
    ]
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ |= {LAB_DIR_VARIABLE: str(lab.state.parent), "PYTHONPATH": str(REPOSITORY)}
        os.execv(words[0], words)  # never returns
    seen = b""
    deadline = time.monotonic() + 20
    sent = False
    while time.monotonic() < deadline:
        if not select.select([terminal], [], [], 0.5)[0]:
            continue
        try:
            data = os.read(terminal, 4096)
        except OSError:
            break
        seen += data
        if not sent and seen.count(b"\n") >= 2:
            os.write(terminal, b"hello\r")
            sent = True
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 9, seen
    assert b"/dev/pts/" in seen
    assert b"got hello" in seen


def test_a_pod_on_its_nodes_network_has_the_nodes_address(lab: Lab) -> None:
    lab.apply(
        [_pod("host", nodeName="node-2", hostNetwork=True, containers=[{"name": "c", "image": "echo", "ports": [{"containerPort": 7777}]}])]
    )
    lab.settle()
    assert lab.address("host") == "10.99.0.2"
    assert lab.curl("client", "http://10.99.0.2:7777/").json()["pod"] == "host"
    assert not (lab.state / "netns" / text(lab.get("pod", "host"), "metadata", "uid")).is_symlink()
    lab.delete("pod", "host")
    assert lab.curl("node/node-2", f"http://{lab.address('client')}:1/").code == 7


def test_init_containers_run_first_one_after_the_other(lab: Lab) -> None:
    lab.apply(
        [
            _pod(
                "initialized",
                initContainers=[{"name": "a", "command": ["echo", "first"]}, {"name": "b", "command": ["echo", "second"]}],
                containers=[{"name": "c", "command": ["sh", "-c", "echo third; exec sleep 100"]}],
            )
        ]
    )
    lab.settle()
    eventually(lambda: lab.logs("initialized") == "first\nsecond\nthird\n")


def test_readiness_probes_decide(lab: Lab) -> None:
    probe = {"httpGet": {"path": "/?status=500", "port": "http"}, "periodSeconds": 1}
    container = {"name": "c", "image": "echo", "ports": [{"containerPort": 8080, "name": "http"}], "readinessProbe": probe}
    lab.apply([_pod("unready", containers=[container])])
    eventually(lambda: text(lab.get("pod", "unready"), "status", "phase") == "Running")
    with pytest.raises(AssertionError, match="pod default/unready is not ready"):
        lab.settle(0.5)
    lab.delete("pod", "unready")


@pytest.mark.skipif(shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin") is None, reason="nginx is not installed")
def test_nginx(lab: Lab) -> None:
    lab.apply([_pod("nginx", containers=[{"name": "c", "image": "nginx:1.27", "ports": [{"containerPort": 80}]}])])
    lab.settle()
    assert lab.curl("client", f"http://{lab.address('nginx')}/").stdout == "nginx on nginx\n"


def test_stragglers_of_a_pod_end_with_it(lab: Lab) -> None:
    lab.apply([_pod("daemon", containers=[{"name": "c", "command": ["sh", "-c", "setsid sleep 424242 & exec sleep 100"]}])])
    lab.settle()
    eventually(lambda: _count(lab, b"sleep\x00424242") == 1)
    lab.delete("pod", "daemon")
    assert _count(lab, b"sleep\x00424242") == 0


def _count(lab: Lab, command: bytes) -> int:
    count = 0
    for process in labs.processes_of(lab):
        try:
            with open(f"/proc/{process.pid}/cmdline", "rb") as source:
                count += source.read().startswith(command)
        except OSError:
            continue
    return count


def test_the_controller_holds_nothing_of_pods_that_are_gone(lab: Lab) -> None:
    descriptors = f"/proc/{lab.status()['pid']}/fd"
    before = len(os.listdir(descriptors))
    for _ in range(3):
        lab.apply([_pod(f"short-{number}", containers=[{"name": "c", "command": ["sleep", "100"]}]) for number in range(4)])
        lab.settle()
        for number in range(4):
            assert lab.exec(f"short-{number}", "true").code == 0
            lab.delete("pod", f"short-{number}", wait=False)
        lab.settle()
    eventually(lambda: len(os.listdir(descriptors)) <= before, saying="descriptors are closed")
    assert len(list((lab.state / "netns").iterdir())) == len([pod for pod in lab.list("pods", "") if not at(pod, "spec", "hostNetwork")])


def test_a_full_report_of_what_is_wrong(lab: Lab) -> None:
    with pytest.raises(LabError, match="no such verb"):
        lab.client.call("no such verb")
    with pytest.raises(LabError, match="container x is not valid for pod client out of: c"):
        lab.exec("client", "true", container="x")
    with pytest.raises(LabError, match=r'deployments\.apps "nope" not found'):
        lab.exec("deploy/nope", "true")
    with pytest.raises(LabError, match='nodes "node-9" not found'):
        lab.exec("node/node-9", "true")
    assert branches(lab.status(), "agents") == []
    with pytest.raises(LabError, match="--no-mesh"):
        lab.agent("stop", "node-1")
