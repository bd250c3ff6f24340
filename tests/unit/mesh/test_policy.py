"""The verdict: order of actions, each field of the match algebra and its edge cases, reasons, dry run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.kit.builders import ANYBODY, allow, deny, exactly, identity, policy, principals, when
from ztunnel.mesh.addresses import parse_block
from ztunnel.mesh.policy import NAMED_POLICIES, Connection, DryRun, Verdict, VerdictReason, decide
from ztunnel.mesh.rules import Action, Cidr, Clause, Match, Rule, ServiceAccountMatch, StringKind, StringMatch

ALICE = identity("shop", "alice")
BOB = identity("lab", "bob")
CALL = Connection("10.0.0.1", ALICE, "10.0.0.2", 8080)
PLAIN = replace(CALL, identity=None)


def block(text: str) -> tuple[Cidr, ...]:
    found = parse_block(text)
    assert found is not None
    return (found,)


def test_without_policies_everything_is_allowed() -> None:
    assert decide((), CALL) == Verdict(True, None, VerdictReason.NO_ALLOW_POLICY, "no policy denies it and no ALLOW policy applies")


def test_deny_wins_over_allow_and_is_named() -> None:
    verdict = decide((allow("yes", principals(ALICE)), deny("no", principals(BOB), principals(ALICE))), CALL)
    assert verdict == Verdict(
        False, "AuthorizationPolicy default/no", VerdictReason.DENIED, "denied by AuthorizationPolicy default/no, rules[1]", 1
    )


def test_a_deny_that_does_not_match_leaves_it_open() -> None:
    assert decide((deny("no", principals(BOB)),), CALL).reason is VerdictReason.NO_ALLOW_POLICY


def test_an_allow_is_named_with_its_rule() -> None:
    verdict = decide((allow("other", principals(BOB)), allow("yes", principals(BOB), principals(ALICE))), CALL)
    assert (verdict.allowed, verdict.policy, verdict.rule) == (True, "AuthorizationPolicy default/yes", 1)
    assert verdict.text == "allowed by AuthorizationPolicy default/yes, rules[1]"


def test_a_miss_lists_all_that_was_tried_with_their_notes() -> None:
    noted = replace(allow("b", principals(BOB)), reason="spec.rules[0] never matches without a waypoint")
    verdict = decide((allow("a", principals(BOB)), noted), CALL)
    assert not verdict.allowed
    assert verdict.reason is VerdictReason.NOT_ALLOWED
    assert verdict.policy == "AuthorizationPolicy default/a"
    assert verdict.tried == ("AuthorizationPolicy default/a", "AuthorizationPolicy default/b")
    assert verdict.text == (
        "ALLOW policies apply and none matches; tried AuthorizationPolicy default/a, "
        "AuthorizationPolicy default/b (spec.rules[0] never matches without a waypoint)"
    )


def test_a_miss_names_only_the_first_of_many() -> None:
    verdict = decide([allow(f"p{each}", principals(BOB)) for each in range(NAMED_POLICIES + 992)], CALL)
    assert len(verdict.tried) == NAMED_POLICIES + 992
    assert verdict.text.endswith(f"default/p{NAMED_POLICIES - 1} and 992 more")
    assert verdict.text.count("AuthorizationPolicy") == NAMED_POLICIES


NAMED = principals(ALICE)
FOR_ALL = Match(principals=ANYBODY)


@pytest.mark.parametrize(
    "match",
    [
        NAMED,
        FOR_ALL,
        Match(service_accounts=(ServiceAccountMatch("shop", "alice"),)),
        Match(namespaces=exactly("other", "shop")),
        Match(namespaces=exactly("shop"), destination_ports=(80, 8080)),
        Match(destination_ports=(8080,)),
    ],
)
@pytest.mark.parametrize("other", [NAMED, FOR_ALL, Match(destination_ports=(8080,))])
def test_the_first_that_matches_is_named_however_it_is_found(match: Match, other: Match) -> None:
    verdict = decide([deny("no", principals(BOB)), deny("first", principals(BOB), match), deny("second", other)], CALL)
    assert (verdict.policy, verdict.rule) == ("AuthorizationPolicy default/first", 1)


def test_a_rule_is_found_by_its_narrowest_clause_and_tested_whole() -> None:
    port, anywhere = Clause((Match(destination_ports=(8080,)),)), Clause((Match(not_source_ips=block("10.9.0.0/16")),))
    by_name = Clause((principals(ALICE), Match(namespaces=exactly("lab"))))
    rule = policy("it", Action.ALLOW, Rule((port, anywhere, by_name)))
    assert decide([rule], CALL).allowed
    assert decide([rule], replace(CALL, identity=BOB)).allowed
    assert not decide([rule], replace(CALL, destination_port=80)).allowed
    assert not decide([rule], replace(CALL, source_ip="10.9.1.1")).allowed
    assert not decide([rule], PLAIN).allowed


def test_a_text_that_is_two_kinds_of_key_is_each_in_its_own_field_only() -> None:
    here = identity("a", "a")
    assert not decide([allow("it", Match(namespaces=exactly(here.principal)))], replace(CALL, identity=here)).allowed
    assert not decide([allow("it", Match(principals=exactly("a")))], replace(CALL, identity=here)).allowed


def test_a_denial_says_the_policys_own_reason() -> None:
    refused = policy("no", Action.DENY, Rule(), reason="refused: broken")
    assert decide((refused,), PLAIN).text == "denied by AuthorizationPolicy default/no, rules[0]: refused: broken"


def test_edge_cases_of_the_algebra() -> None:
    assert not decide((policy("empty", Action.ALLOW),), CALL).allowed, "ALLOW without rules denies all"
    assert decide((policy("empty", Action.DENY),), CALL).allowed, "DENY without rules is inert"
    assert decide((policy("any", Action.ALLOW, Rule()),), PLAIN).allowed, "a rule without clauses matches everything"
    assert decide((policy("any", Action.ALLOW, Rule((Clause(),))),), PLAIN).allowed, "a clause without matches is true"
    assert not decide((allow("none", Match()),), CALL).allowed, "a match without fields never matches"
    assert decide((deny("none", Match()),), CALL).allowed


def test_clauses_are_anded_and_matches_ored() -> None:
    either = Clause((principals(BOB), principals(ALICE)))
    port = Clause((Match(destination_ports=(8080,)),))
    both = policy("both", Action.ALLOW, Rule((either, port)))
    assert decide((both,), CALL).allowed
    assert not decide((both,), replace(CALL, destination_port=80)).allowed
    assert not decide((both,), replace(CALL, identity=identity("else", "where"))).allowed


def test_fields_of_one_match_are_anded() -> None:
    both = allow("both", Match(principals=exactly(ALICE.principal), not_namespaces=exactly("shop")))
    assert not decide((both,), CALL).allowed


FIELDS = [
    (Match(principals=exactly(ALICE.principal)), CALL, PLAIN),
    (Match(principals=(StringMatch(StringKind.PREFIX, "cluster.local/ns/shop/"),)), CALL, replace(CALL, identity=BOB)),
    (Match(principals=(StringMatch(StringKind.SUFFIX, "/sa/alice"),)), CALL, replace(CALL, identity=BOB)),
    (Match(principals=ANYBODY), CALL, PLAIN),
    (Match(not_principals=exactly(ALICE.principal)), PLAIN, CALL),
    (Match(not_principals=ANYBODY), PLAIN, CALL),
    (Match(namespaces=exactly("shop", "other")), CALL, replace(CALL, identity=BOB)),
    (Match(namespaces=(StringMatch(StringKind.PREFIX, "sh"),)), CALL, PLAIN),
    (Match(not_namespaces=exactly("shop")), PLAIN, CALL),
    (Match(service_accounts=(ServiceAccountMatch("shop", "alice"),)), CALL, PLAIN),
    (Match(service_accounts=(ServiceAccountMatch("shop", "bob"), ServiceAccountMatch("lab", "bob"))), replace(CALL, identity=BOB), CALL),
    (Match(not_service_accounts=(ServiceAccountMatch("shop", "alice"),)), PLAIN, CALL),
    (Match(source_ips=block("10.0.0.0/31")), CALL, replace(CALL, source_ip="10.0.0.2")),
    (Match(source_ips=block("::/0")), replace(CALL, source_ip="fd00::1"), CALL),
    (Match(not_source_ips=block("10.0.0.1")), replace(CALL, source_ip="10.0.0.2"), CALL),
    (Match(destination_ips=block("10.0.0.2")), CALL, replace(CALL, destination_ip="10.0.0.3")),
    (Match(not_destination_ips=block("10.0.0.2")), replace(CALL, destination_ip="fd00::2"), CALL),
    (Match(destination_ports=(80, 8080)), CALL, replace(CALL, destination_port=81)),
    (Match(not_destination_ports=(8080,)), replace(CALL, destination_port=80), CALL),
]


@pytest.mark.parametrize(("match", "matching", "other"), FIELDS)
def test_each_field(match: Match, matching: Connection, other: Connection) -> None:
    assert decide((allow("it", match),), matching).allowed
    assert not decide((allow("it", match),), other).allowed


def test_dry_run_is_reported_and_not_enforced() -> None:
    policies = (
        allow("real", principals(ALICE)),
        deny("would", principals(ALICE), dry_run=True),
        deny("would-not", principals(BOB), dry_run=True),
        allow("miss", principals(BOB), dry_run=True),
        policy("hit", Action.ALLOW, when(principals(ALICE)), dry_run=True),
    )
    verdict = decide(policies, CALL)
    assert verdict.allowed
    assert verdict.dry_run == (
        DryRun("AuthorizationPolicy default/would", True, 0),
        DryRun("AuthorizationPolicy default/would-not", False, None),
        DryRun("AuthorizationPolicy default/miss", False, None),
        DryRun("AuthorizationPolicy default/hit", False, 0),
    )


def test_a_dry_run_allow_that_would_be_the_first_would_deny() -> None:
    verdict = decide((allow("first", principals(BOB), dry_run=True),), CALL)
    assert verdict.allowed
    assert verdict.dry_run == (DryRun("AuthorizationPolicy default/first", True, None),)
