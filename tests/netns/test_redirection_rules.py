"""Our rule set against an independent oracle: nft(8) lists it as the committed text, and compiles that text to the same bytecode."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Protocol

import pytest

from tests.kit.netns import Pod
from ztunnel.mesh.errors import NetlinkError
from ztunnel.node.netlink import NETLINK_NETFILTER, KernelRefused, Netlink
from ztunnel.node.nft import Ownership, PodTables, probe_ownership
from ztunnel.node.redirect import Chain, Hook, Ruleset, Stage, ruleset

EXPECTED = Path(__file__).parent / "rules"
LOADED = [stage for stage in Stage if stage is not Stage.REMOVED]


class Opener(Protocol):
    def __call__(self, pod: Pod, ownership: Ownership = ...) -> PodTables: ...


@pytest.fixture
def tables() -> Iterator[Opener]:
    with ExitStack() as stack:

        def opened(pod: Pod, ownership: Ownership = Ownership.SHARED) -> PodTables:
            return stack.enter_context(closing(pod.run(PodTables, ownership)))

        yield opened


def bytecode(pod: Pod) -> str:
    """What nft prints of each rule's expressions, without counts and without the order in which tables were made."""
    listed = pod.command("nft", "--debug=netlink", "list", "ruleset")
    rules = re.sub(r"counter pkts \d+ bytes \d+", "counter", listed.split("table inet")[0])
    return "\n".join(sorted(re.split(r"\n\s*\n", rules.strip())))


@pytest.mark.parametrize("stage", LOADED, ids=lambda stage: stage.value)
def test_the_kernel_lists_what_was_meant(tables: Opener, client: Pod, stage: Stage) -> None:
    ours = tables(client)
    ours.apply(ruleset(stage))
    assert client.command("nft", "--stateless", "list", "ruleset") == (EXPECTED / f"{stage.value}.nft").read_text()


@pytest.mark.parametrize("stage", LOADED, ids=lambda stage: stage.value)
def test_the_bytecode_is_that_of_an_equivalent_script(tables: Opener, client: Pod, server: Pod, stage: Stage) -> None:
    ours = tables(client)
    ours.apply(ruleset(stage))
    server.command("nft", "-f", str(EXPECTED / f"{stage.value}.nft"))
    assert bytecode(client)
    assert bytecode(client) == bytecode(server)
    theirs = tables(server)
    assert theirs.difference(ruleset(stage)) is None


def test_each_stage_is_told_from_the_others(tables: Opener, client: Pod) -> None:
    ours = tables(client)
    for stage in Stage:
        ours.apply(ruleset(stage))
        assert ours.stage() is stage
    ours.apply(Ruleset(("ztunnel-nat",)))
    assert ours.stage() is None


def test_a_change_that_is_refused_changes_nothing(tables: Opener, client: Pod) -> None:
    ours = tables(client)
    ours.apply(ruleset(Stage.FULL))
    generation = ours.generation()
    wrong = Ruleset(
        ("ztunnel-nat",), (Chain("ztunnel-nat", "output", "nat", Hook.OUTPUT, -100), Chain("absent", "x", "nat", Hook.OUTPUT, 0))
    )
    with pytest.raises(KernelRefused, match="add chain absent/x: No such file"):
        ours.apply(wrong)
    assert ours.stage() is Stage.FULL
    assert ours.generation() == generation


def test_a_check_reads_the_tables_only_after_a_change(tables: Opener, client: Pod) -> None:
    ours = tables(client)
    ours.apply(ruleset(Stage.FULL))
    assert ours.check(ruleset(Stage.FULL)) is None
    client.command("nft", "add", "table", "inet", "foreign")
    assert ours.check(ruleset(Stage.FULL)) is None
    client.command("nft", "delete", "table", "inet", "ztunnel-raw")
    assert ours.check(ruleset(Stage.FULL)) == "table ztunnel-raw is missing"
    assert ours.check(ruleset(Stage.FULL)) == "table ztunnel-raw is missing"


@pytest.fixture
def owned() -> Ownership:
    if probe_ownership() is not Ownership.OWNED:
        pytest.skip("this kernel cannot own tables (Linux 6.9)")
    return Ownership.OWNED


def test_a_live_owner_is_not_robbed_and_a_dead_one_is_succeeded(tables: Opener, client: Pod, owned: Ownership) -> None:
    first, second = tables(client, owned), tables(client, owned)
    first.apply(ruleset(Stage.FULL))
    with pytest.raises(KernelRefused, match="remove table ztunnel-nat: Operation not permitted"):
        second.apply(ruleset(Stage.DRAIN))
    first.close()
    assert second.stage() is Stage.FULL
    assert second.difference(ruleset(Stage.FULL)) == "table ztunnel-nat has another owner"
    second.apply(ruleset(Stage.DRAIN))
    assert second.difference(ruleset(Stage.DRAIN)) is None


def test_tables_of_an_agent_on_an_older_kernel_are_replaced(tables: Opener, client: Pod, owned: Ownership) -> None:
    shared = tables(client)
    shared.apply(ruleset(Stage.GUARDED))
    ours = tables(client, owned)
    ours.apply(ruleset(Stage.FULL))
    assert ours.difference(ruleset(Stage.FULL)) is None
    shared.close()


def test_a_closed_socket_is_an_error_of_ours(tables: Opener, client: Pod) -> None:
    with client.run(Netlink, NETLINK_NETFILTER) as netlink:
        pass
    assert netlink.closed
    ours = tables(client)
    ours.close()
    with pytest.raises(NetlinkError):
        ours.generation()
