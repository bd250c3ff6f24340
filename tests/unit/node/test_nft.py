"""Rules to netlink messages and back, without a kernel."""

from __future__ import annotations

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


@pytest.mark.parametrize("ownership", Ownership)
@pytest.mark.parametrize("stage", Stage)
def test_a_transaction_is_framed_and_says_what_each_operation_is(stage: Stage, ownership: Ownership) -> None:
    sent = nft._transaction(ruleset(stage), ownership)
    assert [sent[0].what, sent[-1].what] == ["begin rules", "commit rules"]
    removals = [each.what for each in sent if each.what.startswith("remove table")]
    assert removals == ["remove table ztunnel-nat", "remove table ztunnel-mangle", "remove table ztunnel-raw"]
    assert sum(each.what.startswith("add rule") for each in sent) == len(ruleset(stage).rules)
