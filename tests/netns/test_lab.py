"""The lab without a mesh: topology, names, service addresses, commands in pods, objects, and its end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from dnslib import QTYPE, DNSRecord

from tests.kit import labs
from tests.kit.labs import Lab
from tests.kit.polling import eventually
from ztunnel.lab import lifecycle
from ztunnel.lab.client import NoLab
from ztunnel.lab.objects import LabError
from ztunnel.mesh.manifests.tree import Tree, at, branches, integer, text

pytestmark = pytest.mark.slow

MANIFESTS = """
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: shop}
spec: {nodeName: node-1, containers: [{name: c, image: curlimages/curl}]}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: orders, namespace: shop}
spec:
  replicas: 3
  selector: {matchLabels: {app: orders}}
  template:
    metadata: {labels: {app: orders}}
    spec:
      containers:
      - {name: echo, image: echo, ports: [{containerPort: 8080, name: http}, {containerPort: 9000, name: tcp-raw}]}
---
apiVersion: v1
kind: Service
metadata: {name: orders, namespace: shop}
spec: {selector: {app: orders}, ports: [{port: 80, targetPort: http, name: http}, {port: 9000, name: tcp-raw}]}
---
apiVersion: v1
kind: Service
metadata: {name: headless, namespace: shop}
spec: {clusterIP: None, selector: {app: orders}, ports: [{port: 8080, targetPort: http, name: http}]}
---
apiVersion: v1
kind: Service
metadata: {name: nobody, namespace: shop}
spec: {selector: {app: nobody}, ports: [{port: 80}]}
"""


NEVER_READY = """
apiVersion: v1
kind: Pod
metadata: {name: waiting}
spec:
  containers:
  - {name: c, command: [sleep, "60"], readinessProbe: {tcpSocket: {port: 1}}}
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """One lab for the tests that leave it as they found it."""
    with labs.up(MANIFESTS, mesh=False, ip_family="dual") as found:
        yield found


def _resolve(lab: Lab, kind: str, name: str) -> list[str]:
    """`getent` in the client: what the C library makes of a name. Kind is ahostsv4 or ahostsv6."""
    answer = lab.exec("client", "getent", kind, name, namespace="shop")
    return sorted({line.split()[0] for line in answer.stdout.splitlines()})


def test_pods_reach_each_other_with_their_own_address(lab: Lab) -> None:
    for pod in lab.list("pods", "shop", "app=orders"):
        name = text(pod, "metadata", "name")
        for version, form in ((4, "http://{}:8080/"), (6, "http://[{}]:8080/")):
            told = lab.curl("client", form.format(lab.address(name, "shop", version)), namespace="shop").json()
            assert (told["pod"], told["node"]) == (name, text(pod, "spec", "nodeName"))
            assert told["remote_address"] == lab.address("client", "shop", version)


def test_pods_are_spread_over_nodes(lab: Lab) -> None:
    nodes = [text(pod, "spec", "nodeName") for pod in lab.list("pods", "shop", "app=orders")]
    assert set(nodes) == {"node-1", "node-2"}


def test_a_service_address_reaches_every_ready_pod(lab: Lab) -> None:
    addresses = at(lab.get("service", "orders", "shop"), "spec", "clusterIPs")
    assert isinstance(addresses, list)
    assert len(addresses) == 2
    for address in addresses:
        host = f"[{address}]" if ":" in address else address
        script = f"for i in $(seq 60); do curl -s --max-time 3 http://{host}/; done"
        told = lab.exec("client", "sh", "-c", script, namespace="shop").stdout
        assert {name for pod in lab.list("pods", "shop", "app=orders") if (name := text(pod, "metadata", "name")) in told} == {
            text(pod, "metadata", "name") for pod in lab.list("pods", "shop", "app=orders")
        }
        assert told.count("\n") == 60


def test_a_node_reaches_services_and_pods_with_its_own_address(lab: Lab) -> None:
    address = text(lab.get("service", "orders", "shop"), "spec", "clusterIP")
    assert lab.curl("node/node-1", f"http://{address}/").json()["remote_address"] == "10.99.0.1"
    assert lab.curl("node/node-2", f"http://{lab.address('client', 'shop')}:1/").code == 7


def test_a_pod_that_is_sent_back_to_itself_gets_an_answer(lab: Lab) -> None:
    pod = text(lab.list("pods", "shop", "app=orders")[0], "metadata", "name")
    script = "for i in $(seq 20); do curl -sf --max-time 3 http://orders/ || exit 1; done"
    assert lab.exec(pod, "sh", "-c", script, namespace="shop").code == 0


@pytest.mark.parametrize("index", [0, 1])
def test_a_service_without_endpoints_refuses_at_once(lab: Lab, index: int) -> None:
    addresses = at(lab.get("service", "nobody", "shop"), "spec", "clusterIPs")
    assert isinstance(addresses, list)
    script = "import socket, sys; socket.create_connection((sys.argv[1], 80), 5)"
    for pod, namespace in (("client", "shop"), ("node/node-1", "")):
        answer = lab.exec(pod, "python3", "-c", script, addresses[index], namespace=namespace)
        assert "ConnectionRefusedError" in answer.stderr, answer


def test_udp_and_tcp_queries_to_the_dns_address_are_answered(lab: Lab) -> None:
    assert _resolve(lab, "ahostsv4", "orders") == [text(lab.get("service", "orders", "shop"), "spec", "clusterIP")]
    query = bytes(DNSRecord.question("cluster.local", "SOA").pack())
    script = (
        "import socket, sys; s = socket.create_connection(('10.96.0.10', 53), 3); s.sendall(bytes.fromhex(sys.argv[1]));"
        "n = int.from_bytes(s.recv(2, socket.MSG_WAITALL), 'big'); print(s.recv(n, socket.MSG_WAITALL).hex())"
    )
    told = lab.exec("client", "python3", "-c", script, (len(query).to_bytes(2, "big") + query).hex(), namespace="shop").stdout
    assert DNSRecord.parse(bytes.fromhex(told)).a.rtype == QTYPE.SOA


def test_names_of_services_headless_services_and_pods_resolve(lab: Lab) -> None:
    pods = [text(pod, "metadata", "name") for pod in lab.list("pods", "shop", "app=orders")]
    for version, kind in ((4, "ahostsv4"), (6, "ahostsv6")):
        all_of_them = sorted(lab.address(pod, "shop", version) for pod in pods)
        assert _resolve(lab, kind, "headless") == all_of_them
        assert _resolve(lab, kind, "headless.shop.svc.cluster.local") == all_of_them
        assert _resolve(lab, kind, f"{pods[0]}.headless.shop.svc.cluster.local") == [lab.address(pods[0], "shop", version)]
    assert _resolve(lab, "ahostsv4", "nothing.of.that.name") == []


def test_exec_returns_the_exit_code_and_keeps_streams_apart(lab: Lab) -> None:
    answer = lab.run("exec", "client", "-n", "shop", "--", "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (answer.code, answer.stdout) == (7, "out\n")
    assert answer.stderr == "err\ncommand terminated with exit code 7\n"
    missing = lab.run("exec", "client", "-n", "shop", "--", "no-such-program")
    assert missing.code == 127
    assert "executable file not found" in missing.stderr
    nobody = lab.run("exec", "nobody", "-n", "shop", "--", "true")
    assert (nobody.code, nobody.stderr) == (1, 'Error from server (NotFound): pods "nobody" not found\n')


def test_exec_works_in_pipes(lab: Lab) -> None:
    text_in = "line\n" * 50_000
    answer = lab.run("exec", "-i", "client", "-n", "shop", "--", "wc", "-l", stdin=text_in)
    assert answer.stdout.strip() == "50000"
    assert lab.run("exec", "client", "-n", "shop", "--", "cat", stdin="unread").stdout == ""


def test_exec_forwards_signals_and_ends_the_command_when_it_is_killed(lab: Lab) -> None:
    trapped = lab.start("client", "sh", "-c", "trap 'echo caught; exit 3' INT; echo ready; while :; do sleep 0.05; done", namespace="shop")
    assert trapped.stdout is not None
    assert trapped.stdout.readline() == b"ready\n"
    trapped.send_signal(signal.SIGINT)
    assert trapped.stdout.readline() == b"caught\n"
    assert trapped.wait(10) == 3
    killed = lab.start("client", "sh", "-c", "echo ready; exec sleep 987654", namespace="shop")
    assert killed.stdout is not None
    assert killed.stdout.readline() == b"ready\n"
    killed.kill()
    eventually(lambda: not _runs(lab, b"sleep\x00987654"))


def _runs(lab: Lab, command: bytes) -> bool:
    for process in labs.processes_of(lab):
        try:
            with open(f"/proc/{process.pid}/cmdline", "rb") as source:
                if source.read().startswith(command):
                    return True
        except OSError:
            continue
    return False


def test_a_pod_has_its_own_host_name_and_resolver(lab: Lab) -> None:
    answer = lab.exec("client", "sh", "-c", "hostname; cat /etc/resolv.conf; echo $POD_NAME", namespace="shop")
    assert answer.stdout.splitlines() == [
        "client",
        "nameserver 10.96.0.10",
        "search shop.svc.cluster.local svc.cluster.local cluster.local",
        "options ndots:5 timeout:2 attempts:2",
        "client",
    ]


def test_raw_tcp_comes_back_after_half_close(lab: Lab) -> None:
    script = (
        "import socket; s=socket.create_connection(('orders',9000),5); s.sendall(b'GET / not http'); s.shutdown(socket.SHUT_WR);"
        "print(b''.join(iter(lambda: s.recv(99), b'')).decode())"
    )
    assert lab.exec("client", "python3", "-c", script, namespace="shop").stdout == "GET / not http\n"


def test_the_command_line_speaks_like_kubectl(lab: Lab) -> None:
    lines = lab.run("get", "pods", "-n", "shop", "-o", "wide").stdout.splitlines()
    assert lines[0].split() == ["NAME", "READY", "STATUS", "RESTARTS", "AGE", "IP", "NODE", "MESH"]
    assert len(lines) == 5
    assert lab.run("get", "pods", "nope").stderr == 'Error from server (NotFound): pods "nope" not found\n'
    assert lab.run("get", "pods").stderr == "No resources found in default namespace.\n"
    assert lab.run("get", "po", "-n", "shop", "-l", "app!=orders", "-o", "name").stdout == "pod/client\n"
    assert "kind: Pod" in lab.run("get", "pod/client", "-n", "shop", "-o", "yaml").stdout
    assert lab.run("get", "sofas").code == 1
    assert "Started" in lab.run("describe", "pod", "client", "-n", "shop").stdout


def test_nonsense_is_refused_whole(lab: Lab) -> None:
    good: Tree = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "half"}}
    cases: list[tuple[Tree, str]] = [
        ({"apiVersion": "v1", "kind": "Lease", "metadata": {"name": "x"}}, "kind: the lab has no kind 'Lease'"),
        (
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": {"containers": [{"name": "db", "image": "mysql:8"}]}},
            "Pod default/p: spec.containers[0].image: no command, and nothing is known about image 'mysql:8'",
        ),
        (
            {"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": {"name": "p"}, "spec": {"action": "MAYBE"}},
            "AuthorizationPolicy default/p: spec.action",
        ),
    ]
    for bad, where in cases:
        with pytest.raises(LabError) as refused:
            lab.apply([good, bad])
        assert where in str(refused.value)
        assert not [body for body in lab.list("namespaces") if text(body, "metadata", "name") == "half"]


@pytest.fixture
def small() -> Iterator[Lab]:
    """A lab of its own, for a test that changes it."""
    with labs.up(MANIFESTS, mesh=False) as found:
        yield found


def test_objects_are_created_changed_labelled_scaled_and_deleted(small: Lab) -> None:
    lab = small
    assert set(lab.apply(MANIFESTS)) == {line for line in lab.apply(MANIFESTS) if line.endswith(" unchanged")}
    assert lab.apply(MANIFESTS.replace("replicas: 3", "replicas: 1"))[2] == "deployment.apps/orders configured"
    lab.settle()
    assert len(lab.list("pods", "shop", "app=orders")) == 1
    labelled = lab.run("label", "ns", "shop", "team=blue")
    assert labelled.stdout == "namespace/shop labeled\n"
    assert lab.run("label", "ns", "shop", "team=red").code == 1
    assert lab.run("label", "ns", "shop", "team-").stdout == "namespace/shop unlabeled\n"
    before = text(lab.list("pods", "shop", "app=orders")[0], "metadata", "name")
    lab.run("rollout", "restart", "deploy/orders", "-n", "shop")
    assert lab.run("rollout", "status", "deploy/orders", "-n", "shop").code == 0
    lab.settle()
    assert [text(pod, "metadata", "name") for pod in lab.list("pods", "shop", "app=orders")] != [before]
    assert lab.run("delete", "ns", "shop").stdout == 'namespace "shop" deleted\n'
    assert lab.list("pods", "shop") == []


def test_an_address_is_used_again_after_its_pod_is_gone(small: Lab) -> None:
    lab = small
    old = lab.address("client", "shop")
    lab.delete("pod", "client", "shop")
    assert len(list((lab.state / "netns").iterdir())) == len(lab.list("pods", ""))
    lab.apply(MANIFESTS)
    lab.settle()
    assert lab.address("client", "shop") == old
    assert lab.curl("client", "http://orders/", namespace="shop").code == 0


def test_restart_policies_and_logs(small: Lab) -> None:
    lab = small
    pod = """
apiVersion: v1
kind: Pod
metadata: {{name: {name}}}
spec: {{restartPolicy: {policy}, containers: [{{name: c, command: [sh, -c, "echo line $POD_IP; exit {code}"], env: [
  {{name: POD_IP, valueFrom: {{fieldRef: {{fieldPath: status.podIP}}}}}}]}}]}}
"""
    lab.apply([pod.format(name="good", policy="Never", code=0), pod.format(name="bad", policy="OnFailure", code=0)])
    lab.apply([pod.format(name="failed", policy="Never", code=4), pod.format(name="again", policy="Always", code=1)])
    for name, phase in (("good", "Succeeded"), ("bad", "Succeeded"), ("failed", "Failed")):
        eventually(lambda name=name, phase=phase: text(lab.get("pod", name), "status", "phase") == phase)  # type: ignore[misc]
    eventually(lambda: integer(branches(lab.get("pod", "again"), "status", "containerStatuses")[0], "restartCount") >= 2)
    assert lab.run("logs", "good").stdout == f"line {lab.address('good')}\n"
    assert lab.run("logs", "again", "--tail", "1").stdout == f"line {lab.address('again')}\n"
    eventually(lambda: "CrashLoopBackOff" in lab.run("get", "pod", "again").stdout)


def test_two_labs_stand_side_by_side(lab: Lab, small: Lab) -> None:
    assert lab.state.parent == small.state.parent
    assert {name for name, is_up in lifecycle.names() if is_up} >= {lab.name, small.name}
    for each in (lab, small):
        assert each.curl("client", "http://orders/", namespace="shop").code == 0


def test_a_killed_lab_leaves_nothing_but_a_directory_which_down_removes() -> None:
    links, rules = sorted(os.listdir("/sys/class/net")), lifecycle.names()
    with labs.up(MANIFESTS, mesh=False) as lab:
        processes = labs.processes_of(lab)
        assert len(processes) > 5
        os.kill(integer(lab.status(), "pid"), signal.SIGKILL)
        eventually(lambda: not [process for process in processes if process.is_alive()], saying="everything died with the controller")
        assert lab.state.exists()
        with pytest.raises(NoLab, match=f"`ztunnel lab down --name {lab.name}` cleans up"):
            lab.status()
        # The labs of other tests may be listed as well.
        assert [lab.name, "dead"] in [line.split()[:2] for line in labs.run(lab.state, "list").stdout.splitlines()]
        assert labs.run(lab.state, "down", "--name", lab.name).stdout == f"lab {lab.name!r} is down\n"
        assert not lab.state.exists()
    assert sorted(os.listdir("/sys/class/net")) == links
    assert lifecycle.names() == rules


def test_an_interrupted_up_says_that_the_lab_stays(tmp_path: Path) -> None:
    (tmp_path / "never.yaml").write_text(NEVER_READY)
    environment = {**os.environ, "ZTUNNEL_LAB_DIR": str(tmp_path / "labs"), "ZTUNNEL_LAB": "slow"}
    command = [sys.executable, "-m", "ztunnel", "lab"]
    up = subprocess.Popen(
        [*command, "up", "--no-mesh", "-f", str(tmp_path / "never.yaml")], env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        eventually(
            lambda: b"Running" in subprocess.run([*command, "get", "pods"], env=environment, capture_output=True, check=False).stdout
        )
        up.send_signal(signal.SIGINT)
        said = up.communicate(timeout=60)[1]
        assert (up.returncode, "`ztunnel lab down --name slow`" in said) == (130, True), said
    finally:
        up.kill()
        assert subprocess.run([*command, "down"], env=environment, check=False).returncode == 0


def test_down_ends_everything() -> None:
    with labs.up(MANIFESTS, mesh=False) as lab:
        processes = labs.processes_of(lab)
        assert lab.run("down").code == 0
        assert not [process for process in processes if process.is_alive()]
        assert not lab.state.exists()
        assert lab.run("get", "pods").code == 3


def test_a_lab_of_ipv6_alone() -> None:
    with labs.up(MANIFESTS, mesh=False, ip_family="ipv6") as lab:
        told = lab.curl("client", "http://orders/", namespace="shop").json()
        assert told["remote_address"] == lab.address("client", "shop", 6)
        assert lab.curl("client", "http://headless:8080/", namespace="shop").code == 0
