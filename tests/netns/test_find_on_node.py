"""Pods' namespaces on a node, by each of the three ways, with real namespaces; and every doubt that must be a refusal."""

from __future__ import annotations

import os
import signal
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.kit.cgroups import control_group, join
from tests.kit.netns import Place, Pod, Topology
from tests.kit.polling import eventually
from ztunnel.node import netns
from ztunnel.node.find import NetnsRefused
from ztunnel.node.find_on_node import NodeFinder
from ztunnel.node.netns import NetnsError, NetnsId

UID = str(uuid.UUID(int=0xA1))
OTHER = str(uuid.UUID(int=0xB2))


@dataclass
class Host:
    """A node's directories: a runtime's pinned namespaces, and a /proc."""

    pinned: Path
    proc: Path

    def pin(self, name: str, place: Place) -> None:
        (self.pinned / name).symlink_to(place.path)

    def unpin(self, name: str) -> None:
        (self.pinned / name).unlink()

    def process(self, pid: int, place: Place, uid: str, started: int) -> None:
        directory = self.proc / str(pid)
        (directory / "ns").mkdir(parents=True)
        (directory / "ns" / "net").symlink_to(place.path)
        snake = uid.replace("-", "_")
        (directory / "cgroup").write_text(f"0::/kubepods.slice/kubepods-burstable-pod{snake}.slice/cri-containerd-{pid}.scope\n")
        (directory / "stat").write_text(f"{pid} (a ) (b) S 1 {pid} {pid} 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 {started} 9 9\n")

    def end(self, pid: int) -> None:
        directory = self.proc / str(pid)
        for each in ("ns/net", "cgroup", "stat"):
            (directory / each).unlink()
        (directory / "ns").rmdir()
        directory.rmdir()

    def finder(self) -> NodeFinder:
        return NodeFinder(str(self.pinned), str(self.proc))


@pytest.fixture
def host(tmp_path: Path) -> Host:
    made = Host(tmp_path / "pinned", tmp_path / "proc")
    made.pinned.mkdir()
    made.proc.mkdir()
    return made


@contextmanager
def found(finder: NodeFinder, uid: str, *addresses: str) -> Iterator[NetnsId]:
    fd = finder.open(uid, addresses)
    try:
        yield netns.identity(fd)
    finally:
        os.close(fd)


def identity(place: Place) -> NetnsId:
    return netns.identity(place.fd)


def impostor(net: Topology, pod: Pod) -> Pod:
    """Another namespace that holds the pod's address."""
    made = net.nodes[0].pod("impostor")
    made.command("ip", "address", "add", f"{pod.v4}/32", "dev", "eth0")
    return made


# By the directory of the container runtime


def test_a_pinned_namespace_is_known_by_the_pods_address(host: Host, client: Pod, server: Pod) -> None:
    host.pin("cni-1", client)
    host.pin("cni-2", server)
    (host.pinned / "leftover").touch()
    finder = host.finder()
    assert finder.identity(UID) is None
    for address in client.addresses:
        with found(finder, UID, address) as namespace:
            assert namespace == identity(client) == finder.identity(UID)
    with found(finder, OTHER, server.v4) as namespace:
        assert namespace == identity(server)
    host.unpin("cni-1")
    assert finder.identity(UID) is None


def test_an_address_that_comes_late_is_seen(host: Host, client: Pod) -> None:
    host.pin("cni-1", client)
    finder = host.finder()
    with pytest.raises(NetnsError, match="no namespace of pod"):
        finder.open(UID, ["10.9.9.9"])
    client.command("ip", "address", "add", "10.9.9.9/32", "dev", "eth0")

    def opened() -> bool:
        try:
            os.close(finder.open(UID, ["10.9.9.9"]))
        except NetnsError:
            return False
        return True

    eventually(opened, within=30)


def test_an_address_that_moved_is_not_where_it_was(host: Host, client: Pod, server: Pod) -> None:
    host.pin("cni-1", client)
    finder = host.finder()
    with found(finder, UID, client.v4):
        pass
    client.command("ip", "address", "del", f"{client.v4}/32", "dev", "eth0")
    server.command("ip", "address", "add", f"{client.v4}/32", "dev", "eth0")
    host.pin("cni-2", server)
    with found(finder, OTHER, client.v4) as namespace:
        assert namespace == identity(server)


def test_two_namespaces_with_the_address_are_none(host: Host, net: Topology, client: Pod) -> None:
    host.pin("cni-1", client)
    host.pin("cni-2", impostor(net, client))
    with pytest.raises(NetnsRefused, match=r"more than one namespace holds an address of pod .*cni-1, .*cni-2"):
        host.finder().open(UID, [client.v4])


def test_a_pod_that_took_the_address_of_one_that_is_gone_is_not_that_one(host: Host, net: Topology, client: Pod) -> None:
    thief = impostor(net, client)
    host.pin("cni-2", thief)
    host.process(200, thief, OTHER, started=1)
    with pytest.raises(NetnsRefused, match=r"cni-2 holds an address of pod .*, but processes of other pods only"):
        host.finder().open(UID, [client.v4])


def test_a_pod_whose_processes_others_have_joined_is_itself(host: Host, client: Pod) -> None:
    host.pin("cni-1", client)
    host.process(100, client, UID, started=1)
    host.process(200, client, OTHER, started=2)
    with found(host.finder(), UID, client.v4) as namespace:
        assert namespace == identity(client)


def test_one_namespace_that_is_pinned_twice_is_one(host: Host, client: Pod) -> None:
    host.pin("cni-1", client)
    host.pin("cni-2", client)
    with found(host.finder(), UID, client.v4) as namespace:
        assert namespace == identity(client)


def test_processes_decide_between_two_namespaces(host: Host, net: Topology, client: Pod) -> None:
    host.pin("cni-1", client)
    host.pin("cni-2", impostor(net, client))
    host.process(100, client, UID, started=5)
    with found(host.finder(), UID, client.v4) as namespace:
        assert namespace == identity(client)


def test_a_namespace_belongs_to_one_pod(host: Host, client: Pod) -> None:
    host.pin("cni-1", client)
    finder = host.finder()
    with found(finder, UID, client.v4):
        pass
    with pytest.raises(NetnsRefused, match=f"is that of pod {UID}"):
        finder.open(OTHER, [client.v4])
    host.unpin("cni-1")
    host.pin("cni-2", client)
    with found(finder, OTHER, client.v4) as namespace:
        assert namespace == identity(client)


# By processes


def test_the_oldest_process_decides(host: Host, net: Topology, client: Pod) -> None:
    nested = impostor(net, client)
    host.process(100, nested, UID, started=700)
    host.process(200, client, UID, started=90)
    host.process(300, client, OTHER, started=1)
    with found(host.finder(), UID, client.v4) as namespace:
        assert namespace == identity(client)


def test_a_process_without_the_pods_address_is_passed_over(host: Host, client: Pod, server: Pod) -> None:
    host.process(100, server, UID, started=1)
    host.process(200, client, UID, started=2)
    with found(host.finder(), UID, client.v4) as namespace:
        assert namespace == identity(client)


def test_a_pod_none_of_whose_processes_has_its_address_is_refused(host: Host, server: Pod) -> None:
    host.process(100, server, UID, started=1)
    with pytest.raises(NetnsRefused, match=r"holds none of its addresses \(10\.9\.9\.9\)"):
        host.finder().open(UID, ["10.9.9.9"])


def test_processes_of_one_age_in_two_namespaces_are_refused(host: Host, net: Topology, client: Pod) -> None:
    host.process(100, client, UID, started=7)
    host.process(200, impostor(net, client), UID, started=7)
    with pytest.raises(NetnsRefused, match="started together are in different namespaces"):
        host.finder().open(UID, [client.v4])


def test_a_pod_lives_as_long_as_one_of_its_processes(host: Host, client: Pod) -> None:
    host.process(100, client, UID, started=1)
    host.process(200, client, UID, started=2)
    finder = host.finder()
    with found(finder, UID, client.v4):
        assert finder.identity(UID) == identity(client)
        host.end(100)
        assert finder.identity(UID) == identity(client)
        host.end(200)
        host.process(200, client, UID, started=50)  # the number is another's now
        assert finder.identity(UID) is None


def test_the_hosts_namespace_is_never_taken(tmp_path: Path, net: Topology) -> None:
    node = net.node()
    host = Host(tmp_path / "pinned", tmp_path / "proc")
    host.pinned.mkdir()
    host.proc.mkdir()
    host.process(1, node, "0" * 8, started=0)
    host.process(100, node, UID, started=1)
    host.pin("default", node)
    finder = host.finder()
    with pytest.raises(NetnsRefused, match="is the host's own"):
        finder.open(UID, [node.v4])
    finder.announce(UID, f"{host.proc}/1/ns/net")
    with pytest.raises(NetnsRefused, match="is the host's own"):
        finder.open(UID, [node.v4])


def test_a_real_process_in_a_real_control_group(tmp_path: Path, client: Pod) -> None:
    with control_group() as group:
        pod = group / f"kubepods-pod{UID.replace('-', '_')}.slice"
        container = pod / "cri-containerd-0123456789.scope"
        container.mkdir(parents=True)
        process = subprocess.Popen(["nsenter", f"--net={client.path}", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(b"x")  # what comes back says that it is inside
            process.stdin.flush()
            assert process.stdout.read(1) == b"x"
            join(container, process.pid)
            finder = NodeFinder(str(tmp_path), "/proc")
            with found(finder, UID, client.v4) as namespace:
                assert namespace == identity(client) == finder.identity(UID)
        finally:
            process.send_signal(signal.SIGKILL)
            process.communicate()
        assert finder.identity(UID) is None


# By CNI


def test_what_cni_announces_comes_first(host: Host, net: Topology, client: Pod) -> None:
    host.pin("cni-1", client)
    host.pin("cni-2", impostor(net, client))
    finder = host.finder()
    finder.announce(UID, "/var/run/netns/cni-1")
    with found(finder, UID, client.v4) as namespace:
        assert namespace == identity(client) == finder.identity(UID)
    host.unpin("cni-1")
    assert finder.identity(UID) is None


def test_an_announced_process_is_looked_up_in_the_hosts_proc(host: Host, client: Pod) -> None:
    host.process(100, client, OTHER, started=1)
    finder = host.finder()
    finder.announce(UID, "/proc/100/ns/net")
    with found(finder, UID, client.v4) as namespace:
        assert namespace == identity(client)


def test_an_announced_namespace_that_is_gone_is_searched_for(host: Host, client: Pod, server: Pod) -> None:
    host.pin("cni-1", server)
    finder = host.finder()
    finder.announce(UID, "/run/netns/cni-1")
    host.unpin("cni-1")
    host.pin("cni-2", client)
    with found(finder, UID, client.v4) as namespace:
        assert namespace == identity(client)


def test_an_announcement_is_not_believed_blindly(host: Host, client: Pod, server: Pod) -> None:
    host.pin("cni-1", server)
    finder = host.finder()
    finder.announce(UID, "/run/netns/cni-1")
    with pytest.raises(NetnsRefused, match="holds none of its addresses"):
        finder.open(UID, [client.v4])


@pytest.mark.parametrize("path", ["/run/netns/none", "/run/netns/plain", "relative", "", "/etc", "/proc/0/ns/net"])
def test_announcing_what_is_no_namespace(host: Host, client: Pod, path: str) -> None:
    (host.pinned / "plain").touch()
    with pytest.raises(NetnsError):
        host.finder().announce(UID, path)


def test_a_second_sandbox_takes_the_place_of_the_first(host: Host, client: Pod, server: Pod) -> None:
    host.pin("cni-1", client)
    host.pin("cni-2", server)
    finder = host.finder()
    finder.announce(UID, "/run/netns/cni-1")
    with found(finder, UID, client.v4):
        assert finder.announce(UID, "/run/netns/cni-1") == finder.identity(UID) == identity(client)
        assert finder.announce(UID, "/run/netns/cni-2") == identity(server)
        assert finder.identity(UID) is None
    with found(finder, UID, server.v4):
        assert finder.identity(UID) == identity(server)


def test_what_is_known_of_pods_that_are_gone_does_not_add_up(host: Host, client: Pod) -> None:
    finder = host.finder()
    for number in range(300):
        name = f"cni-{number}"
        host.pin(name, client)
        finder.announce(str(number), f"/run/netns/{name}")
        with found(finder, str(number), client.v4):
            pass
        host.unpin(name)
    assert len(finder._places) + len(finder._announced) + len(finder._owners) < 300
