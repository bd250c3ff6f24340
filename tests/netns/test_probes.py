"""Kubelet's probes of pods that take no plaintext: its own get through; whoever else is on the node, or looks like it, does not."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.kit import apps
from tests.kit.cgroups import control_group, join
from tests.kit.kubelet import Prober, process
from tests.kit.mesh import Mesh
from tests.kit.netns import Node, Pod
from tests.kit.polling import eventually
from ztunnel.node.probe_rules import TABLE
from ztunnel.node.redirect import PROBE_ADDRESSES

APP = 8080
WAIT = 60
FAMILIES = pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["ipv4", "ipv6"])


@contextmanager
def probed_mesh(**overrides: str) -> Iterator[Mesh]:
    with Mesh(nodes=1, start=False) as made:
        made.agents[0].overrides.update(ZTUNNEL_PROBES_ENABLED="true", **overrides)
        made.pod("strict", node=0, ambient=True)
        made.pod("plain", node=0)
        made.policy("strict", {"mtls": {"mode": "STRICT"}}, kind="PeerAuthentication")
        made.start()
        made.settle()
        yield made


@pytest.fixture(scope="module")
def shared() -> Iterator[Mesh]:
    with probed_mesh() as made:
        yield made


@pytest.fixture
def mesh(shared: Mesh) -> Mesh:
    return shared


@pytest.fixture
def node(mesh: Mesh) -> Node:
    return mesh.agents[0].node


@pytest.fixture
def strict(mesh: Mesh) -> Pod:
    return mesh.pods["strict"]


def is_probed(prober: Prober, pod: Pod, family: int = socket.AF_INET) -> bool:
    return prober.probe(pod.address(family)) == "healthz"


def counted(node: Node, chain: str) -> int:
    """Packets that the chain's rules have counted."""
    words = node.command("nft", "list", "chain", "inet", TABLE, chain).split()
    return sum(int(words[number + 1]) for number, word in enumerate(words) if word == "packets")


@FAMILIES
def test_kubelet_gets_through_and_its_neighbours_do_not(mesh: Mesh, node: Node, strict: Pod, tmp_path: Path, family: int) -> None:
    plain = mesh.pods["plain"]
    with (
        control_group() as group,
        apps.Echo(strict, APP) as app,
        apps.Echo(plain, APP) as outside,
        process(node, tmp_path, group) as kubelet,
        process(node, tmp_path, None, "neighbour") as neighbour,
    ):
        eventually(lambda: is_probed(kubelet, strict, family), within=WAIT)
        assert app.peers[-1] == PROBE_ADDRESSES[family != socket.AF_INET]
        assert not is_probed(neighbour, strict, family), "of the same user, in another control group"
        assert is_probed(kubelet, plain, family)
        assert outside.peers[-1] not in PROBE_ADDRESSES
        assert is_probed(neighbour, plain, family)


def test_a_kubelet_without_a_control_group_is_known_by_its_user(tmp_path: Path) -> None:
    with probed_mesh(ZTUNNEL_PROBES_CGROUP_DIRECTORY=str(tmp_path)) as mesh:
        node, strict = mesh.agents[0].node, mesh.pods["strict"]
        with process(node, tmp_path, None) as kubelet, apps.Echo(strict, APP):
            eventually(lambda: is_probed(kubelet, strict), within=WAIT)
            eventually(lambda: mesh.agents[0].said("counts as kubelet"), within=WAIT)


def test_a_kubelet_that_is_started_again_is_found_again(mesh: Mesh, node: Node, strict: Pod, tmp_path: Path) -> None:
    # Whatever the tests before left running has ended by now; the agent may have to notice.
    eventually(lambda: any("no process on this node is kubelet" in each for each in mesh.agents[0].problems), within=WAIT)
    with control_group() as first, control_group() as second, apps.Echo(strict, APP):
        for group in (first, second):
            with process(node, tmp_path, group) as kubelet:
                eventually(lambda: is_probed(kubelet, strict), within=WAIT)
                eventually(lambda: not mesh.agents[0].problems, within=WAIT)


def test_a_kubelet_that_is_moved_is_followed(mesh: Mesh, node: Node, strict: Pod, tmp_path: Path) -> None:
    with control_group() as first, control_group() as second, process(node, tmp_path, first) as kubelet, apps.Echo(strict, APP):
        eventually(lambda: is_probed(kubelet, strict), within=WAIT)
        join(second, kubelet.process.pid)
        eventually(lambda: is_probed(kubelet, strict), within=WAIT)


def test_rules_that_are_flushed_come_back(mesh: Mesh, node: Node, strict: Pod, tmp_path: Path) -> None:
    with control_group() as group, process(node, tmp_path, group) as kubelet, apps.Echo(strict, APP):
        eventually(lambda: is_probed(kubelet, strict), within=WAIT)
        node.command("nft", "flush", "ruleset")
        eventually(lambda: is_probed(kubelet, strict), within=WAIT)


@FAMILIES
def test_nobody_sends_as_kubelet(mesh: Mesh, node: Node, strict: Pod, tmp_path: Path, family: int) -> None:
    plain, address = mesh.pods["plain"], PROBE_ADDRESSES[family != socket.AF_INET]
    own = f"{address}/{32 if family == socket.AF_INET else 128}"
    with control_group() as group, process(node, tmp_path, group) as kubelet, apps.Echo(strict, APP):
        eventually(lambda: is_probed(kubelet, strict, family), within=WAIT)
        seen, before = probes_counted(strict), counted(node, "prerouting")
        plain.command("ip", "address", "add", own, "dev", "lo", *(["nodad"] if family == socket.AF_INET6 else []))
        with plain.tcp_socket(family, (address, 0)) as spoofing:
            spoofing.setblocking(False)
            spoofing.connect_ex((strict.address(family), APP))
            eventually(lambda: counted(node, "prerouting") > before, within=WAIT)
        plain.command("ip", "address", "del", own, "dev", "lo")
        before = counted(node, "forward")
        node.command("ip", "route", "add", own, "dev", "eth0")  # as a node has that routes everything to somewhere
        with plain.tcp_socket(family) as sending:
            sending.setblocking(False)
            sending.connect_ex((address, APP))
            eventually(lambda: counted(node, "forward") > before, within=WAIT)
        node.command("ip", "route", "del", own, "dev", "eth0")
        assert probes_counted(strict) == seen


def probes_counted(pod: Pod) -> int:
    """Packets of the probe addresses that have come into the pod."""
    lines = pod.command("nft", "list", "chain", "inet", "ztunnel-nat", "prerouting").splitlines()
    rules = [line.split() for line in lines if any(f"saddr {address}" in line for address in PROBE_ADDRESSES)]
    assert len(rules) == 2
    return sum(int(words[words.index("packets") + 1]) for words in rules)


def test_what_the_kernel_has_is_what_was_meant(mesh: Mesh, node: Node, strict: Pod, tmp_path: Path) -> None:
    """nft as the oracle of our own encoding."""
    with control_group() as group, process(node, tmp_path, group) as kubelet, apps.Echo(strict, APP):
        eventually(lambda: is_probed(kubelet, strict), within=WAIT)
        listed = node.command("nft", "--stateless", "list", "table", "inet", TABLE)
        for wanted in (
            "type filter hook prerouting priority raw; policy accept;",
            "type filter hook forward priority filter; policy accept;",
            "type filter hook output priority mangle; policy accept;",
            "type nat hook postrouting priority srcnat - 1; policy accept;",
            'iifname != "lo" ip saddr 169.254.7.127 counter drop',
            "ip6 daddr fd16:9254:7127:1337:ffff:ffff:ffff:ffff counter drop",
            "meta skuid 0 socket cgroupv2 level",
            "ip daddr @pods4 counter ct mark set ct mark & 0xff539fff | 0x00539000",
            "ct mark & 0x00fff000 == 0x00539000 ip6 daddr @pods6 counter snat ip6 to fd16:9254:7127:1337:ffff:ffff:ffff:ffff",
            f"elements = {{ {strict.v4} }}",
            f"elements = {{ {strict.v6} }}",
        ):
            assert wanted in listed, listed
