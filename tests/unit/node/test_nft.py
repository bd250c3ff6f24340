"""Rules to netlink messages and back, without a kernel."""

from __future__ import annotations

import struct

import pytest
from pyroute2.netlink.nfnetlink.nftsocket import nft_rule_msg

from ztunnel.node import nft
from ztunnel.node.netlink import Request
from ztunnel.node.nft import Ownership
from ztunnel.node.redirect import Rule, Stage, ruleset

RULES = list(dict.fromkeys(rule for stage in Stage for rule in ruleset(stage).rules))


def decoded(request: Request) -> Rule:
    message = nft_rule_msg(request.data)
    message.decode()
    return nft.listed_rule(message)


@pytest.mark.parametrize("rule", RULES, ids=range(len(RULES)))
def test_a_rule_comes_back_as_it_was_sent(rule: Rule) -> None:
    assert decoded(nft._rule(rule)) == rule


def attribute(kind: int, body: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(body), kind) + body + bytes(-len(body) % 4)


@pytest.mark.parametrize("name", [b"inner", b"last", b"fwd", b"synproxy", b"dynset", b"\xff", b"decode"])
@pytest.mark.parametrize("data", [b"", attribute(1, bytes(4)) + attribute(2, bytes(4)), bytes(4)], ids=["empty", "some", "broken"])
def test_a_rule_that_nobody_can_read_is_somebody_elses(name: bytes, data: bytes) -> None:
    expression = attribute(1, attribute(1, name + b"\0") + attribute(2, data))
    body = bytes(4) + attribute(1, b"ztunnel-nat\0") + attribute(2, b"output\0") + attribute(4, expression)
    found = decoded(Request(struct.pack("=IHHII", 16 + len(body), 0xA06, 0, 1, 0) + body, False, ""))
    assert (found.table, found.chain) == ("ztunnel-nat", "output")
    assert found not in RULES


@pytest.mark.parametrize("ownership", Ownership)
@pytest.mark.parametrize("stage", Stage)
def test_a_transaction_is_framed_and_says_what_each_operation_is(stage: Stage, ownership: Ownership) -> None:
    sent = nft._transaction(ruleset(stage), ownership)
    assert [sent[0].what, sent[-1].what] == ["begin rules", "commit rules"]
    removals = [each.what for each in sent if each.what.startswith("remove table")]
    assert removals == ["remove table ztunnel-nat", "remove table ztunnel-mangle", "remove table ztunnel-raw"]
    assert sum(each.what.startswith("add rule") for each in sent) == len(ruleset(stage).rules)
