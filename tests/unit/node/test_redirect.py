"""The rule set as data. What it means to packets is tests/netns/test_redirection.py's affair."""

from __future__ import annotations

import struct

import pytest

from ztunnel.mesh.ports import INBOUND_PLAINTEXT, OUTBOUND
from ztunnel.node.redirect import CHAINS, MANGLE, NAT, RAW, TABLES, Expr, Rule, Ruleset, Stage, ruleset

LOADED = [stage for stage in Stage if stage is not Stage.REMOVED]


def redirects(stage: Stage) -> dict[str, set[int]]:
    """Ports redirected to, by chain."""
    found: dict[str, set[int]] = {}
    for rule in ruleset(stage).rules:
        if rule.exprs[-1].name == "redir":
            port = dict(rule.exprs[-2].fields)["data"]
            assert isinstance(port, bytes)
            found.setdefault(rule.chain, set()).update(struct.unpack(">H", port))
    return found


@pytest.mark.parametrize("stage", [Stage.GUARDED, Stage.FULL])
def test_each_direction_goes_to_its_own_listener(stage: Stage) -> None:
    assert redirects(stage) == {"prerouting": {INBOUND_PLAINTEXT}, "output": {OUTBOUND}}


def test_draining_redirects_nothing_and_keeps_marks_and_zone() -> None:
    full, drain = ruleset(Stage.FULL), ruleset(Stage.DRAIN)
    assert [rule for rule in drain.rules if rule.table == NAT] == []
    assert drain.rules == tuple(rule for rule in full.rules if rule.table in (MANGLE, RAW))
    # Without a NAT chain the kernel would forget how to translate the connections that live on.
    assert drain.chains == full.chains == CHAINS


def test_removal_wants_nothing() -> None:
    assert ruleset(Stage.REMOVED) == Ruleset()


@pytest.mark.parametrize("stage", LOADED)
def test_every_rule_counts_and_stands_in_a_chain_that_exists(stage: Stage) -> None:
    wanted = ruleset(stage)
    places = {(chain.table, chain.name) for chain in wanted.chains}
    assert wanted.tables == TABLES
    for rule in wanted.rules:
        assert Expr("counter") in rule.exprs
        assert (rule.table, rule.chain) in places


def test_both_families_are_treated_alike() -> None:
    def families(rule: Rule) -> set[bytes]:
        pairs = zip(rule.exprs, rule.exprs[1:], strict=False)
        return {bytes(dict(b.fields)["data"]) for a, b in pairs if a == Expr("meta", (("dreg", 1), ("key", 15)))}

    for stage in (Stage.GUARDED, Stage.FULL):
        found = [families(rule) for rule in ruleset(stage).rules]
        assert found.count({b"\x02"}) == found.count({b"\x0a"}) == 5


def test_the_guard_is_the_only_difference_between_the_phases() -> None:
    guarded, full = ruleset(Stage.GUARDED).rules, ruleset(Stage.FULL).rules
    guard = {"base": 2, "offset": 13, "len": 1, "dreg": 1}

    def unguarded(rule: Rule) -> Rule:
        at = next((i for i, each in enumerate(rule.exprs) if each.name == "payload" and dict(each.fields) == guard), None)
        return rule if at is None else Rule(rule.table, rule.chain, rule.exprs[:at] + rule.exprs[at + 3 :])

    assert tuple(map(unguarded, guarded)) == full
    assert sum(a != b for a, b in zip(guarded, full, strict=True)) == 4
