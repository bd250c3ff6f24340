"""Roots follow each other so that no peer ever meets a certificate whose root it cannot know."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from cryptography import x509

from ztunnel.ca.authority import Authority
from ztunnel.ca.files import RootError
from ztunnel.ca.request import check_chain, new_request
from ztunnel.ca.succession import MAX_FORMER, RETIRE_MARGIN_SECONDS, Periods, Succession, advance, begin
from ztunnel.mesh.identity import SpiffeId

NOW = 1_800_000_000.0
DAY = 86400.0
PERIODS = Periods(spread=DAY, leaf=DAY)
ALICE = SpiffeId("cluster.local", "shop", "alice")


def roots(state: Succession) -> int:
    return len(x509.load_pem_x509_certificates(state.bundle_pem))


def test_nothing_happens_without_a_wish() -> None:
    state = begin("cluster.local", NOW, "")
    assert advance(state, "", NOW + 1000 * DAY, PERIODS) is state


def test_a_wish_announces_then_signs_then_retires() -> None:
    first = begin("cluster.local", NOW, "")
    announced = advance(first, "please", NOW, PERIODS)
    assert announced.signing.pem == first.signing.pem
    assert roots(announced) == 2
    assert advance(announced, "please", NOW + DAY - 1, PERIODS) is announced
    signing = advance(announced, "please", NOW + DAY, PERIODS)
    assert announced.following is not None
    assert signing.signing.pem == announced.following.root.pem
    assert roots(signing) == 2
    assert advance(signing, "please", NOW + DAY + 1, PERIODS) is signing
    gone = advance(signing, "please", NOW + 2 * DAY + RETIRE_MARGIN_SECONDS, PERIODS)
    assert roots(gone) == 1
    assert advance(gone, "please", NOW + 9 * DAY, PERIODS) is gone


def test_at_every_step_old_and_new_peers_trust_each_other() -> None:
    """Whoever renewed last just before a step has the bundle of then; leaves live as long as the spread."""
    states = [begin("cluster.local", NOW, "")]
    for _ in range(3):
        states.append(advance(states[-1], "please", NOW + DAY * len(states), PERIODS))
    for earlier, later in pairwise(states):
        for one, other in ((earlier, later), (later, earlier)):
            signed = Authority(one.authority).sign(new_request(ALICE).csr_pem, ALICE, NOW)
            trusts = Authority(other.authority).sign(new_request(ALICE).csr_pem, ALICE, NOW).roots_pem
            check_chain(type(signed)(signed.chain_pem, trusts), NOW)


def test_the_same_wish_twice_is_one_and_another_waits_for_its_turn() -> None:
    state = advance(begin("cluster.local", NOW, "first"), "first", NOW, PERIODS)
    assert roots(state) == 1
    announced = advance(state, "second", NOW, PERIODS)
    assert advance(announced, "third", NOW + 1, PERIODS) is announced
    signing = advance(announced, "third", NOW + DAY, PERIODS)
    again = advance(signing, "third", NOW + DAY, PERIODS)
    assert again.following is not None
    assert again.obeyed == "third"
    assert advance(signing, "", NOW + DAY, PERIODS) is signing


def test_an_old_root_is_followed_unasked() -> None:
    state = begin("cluster.local", NOW, "")
    assert advance(state, "", NOW + 2900 * DAY, PERIODS) is state
    announced = advance(state, "", NOW + 2925 * DAY, PERIODS)
    assert announced.following is not None
    assert advance(announced, "", NOW + 2926 * DAY, PERIODS).signing.pem == announced.following.root.pem


def test_former_roots_are_bounded() -> None:
    state, hasty = begin("cluster.local", NOW, ""), Periods(spread=0, leaf=DAY)
    for number in range(MAX_FORMER + 3):
        state = advance(advance(state, f"wish {number}", NOW, hasty), f"wish {number}", NOW, hasty)
    assert len(state.former) == MAX_FORMER


def test_a_state_is_what_was_written() -> None:
    state = advance(advance(begin("cluster.local", NOW, ""), "a", NOW, PERIODS), "a", NOW + DAY, PERIODS)
    state = advance(state, "b", NOW + DAY, PERIODS)
    again = Succession.parse(state.dump(), "cluster.local")
    assert again.bundle_pem == state.bundle_pem
    assert (again.obeyed, again.former) == (state.obeyed, state.former)
    assert again.dump() == state.dump()
    assert advance(again, "b", NOW + DAY, PERIODS) is again


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"version": 2}, "the state's version is 2"),
        ({"trustDomain": "other"}, "trust_domain is cluster.local"),
        ({"signing": {"certificate": "x", "key": "y"}}, "cannot be read"),
        ({"signing": None}, "cannot be read"),
        ({"former": [{"certificate": "x", "until": 1}]}, "cannot be read"),
        ({"former": 5}, "cannot be read"),
        ({"following": [1]}, "cannot be read"),
    ],
)
def test_a_state_that_cannot_be_trusted_is_refused(change: dict[str, object], reason: str) -> None:
    document = json.loads(begin("cluster.local", NOW, "").dump())
    with pytest.raises(RootError, match=reason):
        Succession.parse(json.dumps({**document, **change}).encode(), "cluster.local")


def test_a_key_of_another_root_is_refused() -> None:
    one, other = (json.loads(begin("cluster.local", NOW, "").dump()) for _ in range(2))
    one["signing"]["key"] = other["signing"]["key"]
    with pytest.raises(RootError, match="does not belong to its key"):
        Succession.parse(json.dumps(one).encode(), "cluster.local")
    for document in (b"", b"[]", b"\xff", b"null"):
        with pytest.raises(RootError):
            Succession.parse(document, "cluster.local")
