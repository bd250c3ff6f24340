"""Which process is kubelet, among all that have its name. In namespaces for the sake of files that belong to somebody else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ztunnel.mesh.errors import LocalError
from ztunnel.node import netns
from ztunnel.node.find import host_namespaces
from ztunnel.node.kubelet import Kubelet, KubeletFinder
from ztunnel.node.probe_rules import Owner

POD = "0::/kubepods.slice/kubepods-pod2c48913c_b29f_11e7_9350_020968147796.slice/cri-containerd-1.scope\n"
SERVICE = "0::/system.slice/kubelet.service\n"


class Host:
    """A /proc and a tree of control groups, both made of plain files."""

    def __init__(self, directory: Path) -> None:
        self.proc, self.cgroups = directory / "proc", directory / "cgroup"
        self.group = self.cgroups / "system.slice" / "kubelet.service"
        self.proc.mkdir()
        self.group.mkdir(parents=True)

    def process(self, pid: int, started: int, *, name: str = "kubelet", groups: str = SERVICE, namespace: str = netns.CURRENT) -> Path:
        directory = self.proc / str(pid)
        (directory / "ns").mkdir(parents=True)
        (directory / "ns" / "net").symlink_to(namespace)
        (directory / "comm").write_text(f"{name}\n")
        (directory / "cgroup").write_text(groups)
        (directory / "stat").write_text(f"{pid} ({name}) S 1 {pid} {pid} 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 {started} 9 9\n")
        return directory

    def finder(self) -> KubeletFinder:
        return KubeletFinder(str(self.proc), str(self.cgroups), host_namespaces())


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_there_is_none(host: Host) -> None:
    assert host.finder().find() is None
    host.process(10, 5, name="kubelets")
    host.process(11, 5, groups=POD)
    host.process(12, 5, namespace="/nowhere")
    fd = netns.new()
    host.process(13, 5, namespace=f"/proc/self/fd/{fd}")
    assert host.finder().find() is None
    os.close(fd)


def test_the_oldest_that_may_be_it(host: Host) -> None:
    host.process(10, 70)
    host.process(11, 60)
    host.process(12, 5, groups=POD)
    finder = host.finder()
    assert finder.find() == Kubelet(False, 60, 11)
    assert finder.is_there(Kubelet(False, 60, 11))
    assert not finder.is_there(Kubelet(False, 61, 11))


def test_an_older_one_of_another_user_is_not_it(host: Host) -> None:
    if os.stat("/proc/1").st_uid == 65534:
        pytest.skip("there is no second user in this user namespace")
    os.chown(host.process(10, 5), 65534, 65534)
    assert host.finder().find() == Kubelet(True, 5, 10), "better than none"
    host.process(11, 70, name="k3s-server")
    assert host.finder().find() == Kubelet(False, 70, 11)


@pytest.mark.parametrize("version_2", ["", "unified"])
def test_its_sockets_are_known_by_user_and_group(tmp_path: Path, version_2: str) -> None:
    host = Host(tmp_path)
    group = host.cgroups / version_2 / "system.slice" / "kubelet.service"
    group.mkdir(parents=True, exist_ok=True)
    if version_2:
        host.group.rmdir()
    host.process(10, 5, groups=f"4:memory:/other\n{SERVICE}")
    assert host.finder().owner(Kubelet(False, 5, 10)) == Owner(0, group.stat().st_ino, 2)


@pytest.mark.parametrize("groups", ["", "0::/\n", "4:memory:/system.slice/kubelet.service\n", "0::/../x\n", "0::/elsewhere\n"])
def test_without_a_group_that_can_be_looked_up_the_user_must_do(host: Host, groups: str) -> None:
    host.process(10, 5, groups=groups)
    assert host.finder().owner(Kubelet(False, 5, 10)) == Owner(0, None)


def test_one_that_has_ended(host: Host) -> None:
    with pytest.raises(LocalError, match="process 10, has ended"):
        host.finder().owner(Kubelet(False, 5, 10))
    host.proc.rmdir()
    with pytest.raises(LocalError, match="cannot list processes"):
        host.finder().find()
