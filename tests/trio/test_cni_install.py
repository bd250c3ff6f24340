"""The plugin on a host: into its directories, there again after others wrote, and out again as if it had never been there."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from tests.kit.polling import eventually_async
from ztunnel.cni.conflist import Json
from ztunnel.cni.install import FIGHT_EDITS, FIGHT_SECONDS, POLL_SECONDS, Host, Installer

OURS: Json = {"type": "ztunnel-cni", "socket": "/run/s"}
BRIDGE: Json = {"type": "bridge"}
LIST = b'{"cniVersion":"1.0.0", "name":"k8s",\t"plugins":[{"type":"bridge"}]}'
SINGLE = b'{"cniVersion": "0.3.1", "name": "k8s", "type": "bridge"}\n'
WAIT = 30


@pytest.fixture
def host(tmp_path: Path) -> Host:
    made = Host(tmp_path / "program", tmp_path / "bin", tmp_path / "net.d")
    made.program.write_bytes(b"a program")
    made.bin_directory.mkdir()
    made.conf_directory.mkdir()
    return made


@asynccontextmanager
async def installing(host: Host, entry: Json = OURS) -> AsyncIterator[Installer]:
    async with trio.open_nursery() as nursery:
        installer = Installer(host, entry)
        await nursery.start(installer.run)
        yield installer
        nursery.cancel_scope.cancel()


def content(host: Host) -> dict[str, bytes]:
    """Everything in the directory of configurations."""
    return {each.name: each.read_bytes() for each in host.conf_directory.iterdir()}


def plugins(host: Host, name: str) -> list[str]:
    return [each["type"] for each in json.loads((host.conf_directory / name).read_bytes())["plugins"]]


def is_in(host: Host, name: str) -> bool:
    return "ztunnel-cni" in plugins(host, name)


async def test_the_program_and_its_entry_are_there_before_it_says_so(host: Host) -> None:
    (host.conf_directory / "10-a.conflist").write_bytes(LIST)
    (host.conf_directory / "10-a.conflist").chmod(0o640)
    async with installing(host) as installer:
        assert installer.problem == ""
        program = host.bin_directory / "ztunnel-cni"
        assert program.read_bytes() == b"a program"
        assert program.stat().st_mode & 0o777 == 0o755
        assert plugins(host, "10-a.conflist") == ["bridge", "ztunnel-cni"]
        assert (host.conf_directory / "10-a.conflist").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(("name", "before"), [("10-a.conflist", LIST), ("10-a.conf", SINGLE), ("10-a.json", SINGLE)])
async def test_removal_brings_back_every_byte(host: Host, name: str, before: bytes) -> None:
    (host.conf_directory / name).write_bytes(before)
    async with installing(host):
        (listed,) = (each for each in content(host) if not each.startswith("."))
        assert plugins(host, listed) == ["bridge", "ztunnel-cni"]
    # The agent after the one that installed it removes it.
    async with installing(host, {**OURS, "socket": "/run/other"}) as installer:
        assert json.loads((host.conf_directory / listed).read_bytes())["plugins"][1]["socket"] == "/run/other"
    installer.remove()
    assert content(host) == {name: before}
    assert list(host.bin_directory.iterdir()) == []
    installer.remove()
    assert content(host) == {name: before}, "once more does no harm"


async def test_a_list_that_others_write_again_has_it_again(host: Host) -> None:
    path = host.conf_directory / "10-a.conflist"
    path.write_bytes(LIST)
    async with installing(host) as installer:
        after = LIST.replace(b"k8s", b"renewed")
        path.write_bytes(after)
        await eventually_async(lambda: is_in(host, path.name), within=WAIT)
    installer.remove()
    assert content(host) == {path.name: after}


async def test_a_quarrel_over_a_list_is_said(host: Host, mock_clock: MockClock) -> None:
    path = host.conf_directory / "10-a.conflist"
    path.write_bytes(LIST)
    async with installing(host) as installer:
        for _ in range(FIGHT_EDITS - 1):  # the first edit was our own
            assert installer.problem == ""
            path.write_bytes(LIST)
            await trio.sleep(2 * POLL_SECONDS)
            assert is_in(host, path.name)
        assert "another program keeps taking us out" in installer.problem
        await trio.sleep(FIGHT_SECONDS)
        assert installer.problem == ""


async def test_what_others_write_around_us_outlives_us(host: Host) -> None:
    path = host.conf_directory / "10-a.conflist"
    path.write_bytes(LIST)
    async with installing(host) as installer:
        document = json.loads(path.read_bytes())
        document["plugins"].append({"type": "bandwidth"})
    path.write_text(json.dumps(document))
    installer.remove()
    assert plugins(host, path.name) == ["bridge", "bandwidth"]
    assert list(content(host)) == [path.name]


async def test_a_file_that_comes_before_takes_it(host: Host) -> None:
    (host.conf_directory / "10-a.conflist").write_bytes(LIST)
    async with installing(host) as installer:
        (host.conf_directory / "05-b.conf").write_bytes(SINGLE)
        await eventually_async((host.conf_directory / "05-b.conf.conflist").exists, within=WAIT)
        assert is_in(host, "05-b.conf.conflist")
        assert not is_in(host, "10-a.conflist")
    installer.remove()
    assert content(host) == {"10-a.conflist": LIST, "05-b.conf": SINGLE}


async def test_a_node_without_a_network_yet_is_waited_for(host: Host) -> None:
    host.conf_directory.rmdir()
    async with installing(host) as installer:
        assert "no network configuration" in installer.problem
        host.conf_directory.mkdir()
        (host.conf_directory / "10-a.conflist").write_bytes(LIST[:-9])
        await eventually_async(lambda: "10-a.conflist: is not JSON" in installer.problem, within=WAIT)
        assert content(host) == {"10-a.conflist": LIST[:-9]}
        (host.conf_directory / "10-a.conflist").write_bytes(LIST)
        await eventually_async(lambda: installer.problem == "", within=WAIT)
        assert is_in(host, "10-a.conflist")


async def test_a_program_that_is_lost_or_older_is_replaced(host: Host) -> None:
    program = host.bin_directory / "ztunnel-cni"
    program.write_bytes(b"older")
    async with installing(host) as installer:
        assert program.read_bytes() == b"a program"
        program.unlink()
        await eventually_async(program.exists, within=WAIT)
        host.bin_directory.rename(host.bin_directory.with_name("gone"))
        await eventually_async(lambda: "No such file" in installer.problem, within=WAIT)


async def test_a_file_that_is_no_configuration_is_said(host: Host) -> None:
    (host.conf_directory / "10-a.conflist").write_bytes(b" " * (1 << 20) + LIST)
    (host.conf_directory / "00-directory.conf").mkdir()
    async with installing(host) as installer:
        assert installer.problem == "10-a.conflist: larger than 1 MiB"
