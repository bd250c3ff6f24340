"""Entering and leaving namespaces, and the topology kit itself."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.netns import Pod, Topology
from tests.kit.traffic import accept, source_of, talk
from ztunnel.node import netns
from ztunnel.node.netns import NetnsError, NetnsId

FATAL = """
import ctypes, time
from ztunnel.node import netns
CLONE_NEWUSER = 0x10000000
with netns.inside(netns.new()):
    # In a new user namespace we have no power over the namespace that we came from. The kernel refuses it to a process with
    # threads, and a thread that was joined may take a moment longer to be gone.
    deadline = time.monotonic() + 5
    while (refused := ctypes.CDLL(None).unshare(CLONE_NEWUSER)) and time.monotonic() < deadline:
        pass
    assert not refused
print("still here")
"""


@pytest.fixture
def other() -> Iterator[int]:
    fd = netns.new()
    yield fd
    os.close(fd)


def here() -> NetnsId:
    fd = netns.open_current()
    found = netns.identity(fd)
    os.close(fd)
    return found


def test_inside_is_inside_and_leaves_again(other: int) -> None:
    home = here()
    with netns.inside(other):
        assert here() == netns.identity(other) != home
    assert here() == home


def test_inside_leaves_also_after_an_error(other: int) -> None:
    home = here()
    with pytest.raises(ZeroDivisionError), netns.inside(other):
        raise ZeroDivisionError
    assert here() == home


def test_what_is_no_namespace_is_not_entered(tmp_path: Path) -> None:
    home = here()
    fd = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(NetnsError, match="enter the network namespace"), netns.inside(fd):
        pytest.fail("entered")
    with pytest.raises(NetnsError, match="enter the network namespace"):
        netns.run_inside(fd, here)
    os.close(fd)
    assert here() == home


def test_run_inside_leaves_no_thread_and_no_namespace_behind(other: int) -> None:
    home, threads = here(), threading.active_count()
    assert netns.run_inside(other, here) == netns.identity(other)
    with pytest.raises(ZeroDivisionError):
        netns.run_inside(other, divmod, 1, 0)
    assert (here(), threading.active_count()) == (home, threads)


def test_not_getting_back_ends_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", FATAL], check=False, capture_output=True, text=True)
    if "AssertionError" in done.stderr:
        pytest.skip("no user namespaces here")
    assert done.returncode == 70
    assert done.stdout == ""
    assert done.stderr == (
        "fatal: cannot return from a network namespace: Operation not permitted; the process ends rather than act in a pod's namespace\n"
    )


def test_a_pinned_namespace_has_a_name_until_it_is_unpinned(other: int, tmp_path: Path) -> None:
    path = str(tmp_path / "pinned")
    netns.pin(other, path)
    assert netns.identity_at(path) == netns.identity(other)
    again = netns.open_path(path)
    assert netns.identity(again) == netns.identity(other)
    os.close(again)
    with pytest.raises(NetnsError, match="File exists"):
        netns.pin(other, path)
    netns.unpin(path)
    netns.unpin(path)
    assert netns.identity_at(path) is None


def test_what_is_no_namespace_is_not_pinned(tmp_path: Path) -> None:
    fd = os.open("/proc/self/status", os.O_RDONLY)
    os.close(fd)
    path = tmp_path / "pinned"
    with pytest.raises(NetnsError, match="mount a namespace"):
        netns.pin(fd, str(path))
    assert not path.exists()


def test_pods_reach_each_other_across_nodes_with_their_own_addresses(client: Pod, server: Pod) -> None:
    for address, source in ((server.v4, client.v4), (server.v6, client.v6)):
        with server.listener(8080) as app, client.connect((address, 8080)) as connection, accept(app) as served:
            assert source_of(served) == source
            talk(connection, served)


def test_pods_on_one_node_reach_each_other(net: Topology) -> None:
    node = net.node()
    one, other = node.pod("one"), node.pod("other")
    with other.listener(8080) as app, one.connect((other.v6, 8080)) as connection, accept(app) as served:
        assert source_of(served) == one.v6
        talk(connection, served)


def test_a_topology_lets_everything_go() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with Topology() as net:
        net.node().pod("one")
        net.node().pod("two")
    assert len(os.listdir("/proc/self/fd")) == before
