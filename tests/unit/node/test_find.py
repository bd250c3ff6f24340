"""Whose namespace is it: what can be refused without entering one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ztunnel.node import netns
from ztunnel.node.find import DirectoryFinder, NetnsRefused, refuse_foreign
from ztunnel.node.netns import NetnsError


@pytest.mark.parametrize("uid", ["", ".", "..", ".hidden", "a/b", "../host", "a\0b"])
def test_a_uid_that_is_no_file_name_is_refused(tmp_path: Path, uid: str) -> None:
    finder = DirectoryFinder(str(tmp_path))
    with pytest.raises(NetnsError, match="is no pod uid"):
        finder.open(uid, ["10.0.0.1"])
    with pytest.raises(NetnsError, match="is no pod uid"):
        finder.identity(uid)


def test_nothing_there(tmp_path: Path) -> None:
    finder = DirectoryFinder(str(tmp_path))
    assert finder.identity("pod") is None
    with pytest.raises(NetnsError, match=r"cannot open namespace .*: No such file"):
        finder.open("pod", ["10.0.0.1"])


def test_something_else_there(tmp_path: Path) -> None:
    (tmp_path / "pod").touch()
    with pytest.raises(NetnsError, match="is not a network namespace"):
        DirectoryFinder(str(tmp_path)).open("pod", ["10.0.0.1"])


def test_another_kind_of_namespace_there(tmp_path: Path) -> None:
    (tmp_path / "pod").symlink_to("/proc/self/ns/mnt")
    with pytest.raises(NetnsError, match="is not a network namespace"):
        DirectoryFinder(str(tmp_path)).open("pod", ["10.0.0.1"])


def test_our_own_namespace_there(tmp_path: Path) -> None:
    (tmp_path / "pod").symlink_to(netns.CURRENT)
    finder = DirectoryFinder(str(tmp_path))
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(NetnsRefused, match="is the host's own"):
        finder.open("pod", ["127.0.0.1"])
    assert len(os.listdir("/proc/self/fd")) == before
    assert finder.identity("pod") is not None


def test_a_pod_without_addresses_cannot_be_known() -> None:
    fd = netns.open_current()
    with pytest.raises(NetnsRefused, match="has no address yet"):
        refuse_foreign(fd, "pod", [], frozenset())
    os.close(fd)
