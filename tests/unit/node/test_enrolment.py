"""The enrolment table: every state and every view of the world leads somewhere, and nothing is let go of in a hurry."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ztunnel.node.enrolment import HELD, TABLE, Action, Event, Namespace, Sight, State, next_event, retry_seconds, transition

BOOLS = (False, True)
SIGHTS = [
    Sight(wanted, deleted, strict, held, namespace, waiting, over, active)
    for wanted, deleted, strict, held, namespace, waiting, over, active in product(
        BOOLS, BOOLS, BOOLS, BOOLS, Namespace, BOOLS, BOOLS, (0, 3)
    )
    if not (wanted and deleted)
]
CALM = Sight(wanted=True, deleted=False, strict=False, held=True, namespace=Namespace.SAME, waiting=False, over=False, active=0)


seen = partial(replace, CALM)


@pytest.mark.parametrize("state", State, ids=lambda state: state.value)
def test_whatever_is_seen_the_table_knows_what_to_do(state: State) -> None:
    for sight in SIGHTS:
        event = next_event(state, sight)
        assert event is None or (state, event) in TABLE


@pytest.mark.parametrize(("state", "event"), list(product(State, Event)), ids=str)
def test_every_pair_ends_in_a_known_state(state: State, event: Event) -> None:
    after, action = transition(state, event)
    assert isinstance(after, State)
    if (state, event) not in TABLE:
        assert (after, action) == (State.FAILED, Action.DROP)


@pytest.mark.parametrize("state", State, ids=lambda state: state.value)
def test_while_waiting_nothing_is_repeated_for_ever(state: State) -> None:
    """From any state the events settle within a few steps, also when every action that can fail does."""
    for sight in SIGHTS:
        assert settles(state, sight), f"{state} never settles under {sight}"


def settles(state: State, sight: Sight) -> bool:
    held = sight.held
    for _ in range(8):
        namespace = sight.namespace if held else Namespace.NONE
        event = next_event(state, replace(sight, held=held, namespace=namespace, waiting=True))
        if event is None:
            return True
        state, action = transition(state, event)
        if can_fail(action, held):
            held = held and action in KEEPING
            state, after = transition(state, Event.PROBLEM)
            held = held and after is not Action.DROP
    return False


KEEPING = (Action.RECAPTURE, Action.COMPLETE, Action.DRAIN, Action.REMOVE)


def can_fail(action: Action, held: bool) -> bool:
    """Letting go of nothing, and looking for leftovers, always succeed."""
    return action not in (Action.NOTHING, Action.SWEEP) and (action is not Action.DROP or held)


@pytest.mark.parametrize(
    ("state", "sight", "event"),
    [
        (State.WANTED, seen(held=False, namespace=Namespace.NONE), Event.BEGIN),
        (State.FAILED, seen(held=False, namespace=Namespace.NONE, waiting=True), None),
        (State.FAILED, seen(held=False, namespace=Namespace.NONE), Event.BEGIN),
        (State.FAILED, seen(held=False, namespace=Namespace.NONE, wanted=False), Event.UNWANTED),
        (State.GUARDED, seen(), None),
        (State.GUARDED, seen(over=True), Event.GRACE_OVER),
        (State.GUARDED, seen(strict=True), Event.GRACE_OVER),
        (State.GUARDED, seen(wanted=False), Event.UNWANTED),
        (State.ENROLLED, seen(over=True, strict=True), None),
        (State.ENROLLED, seen(wanted=False), Event.UNWANTED),
        (State.ENROLLED, seen(wanted=False, deleted=True), Event.GONE),
        (State.ENROLLED, seen(namespace=Namespace.OTHER), Event.REPLACED),
        (State.ENROLLED, seen(namespace=Namespace.NONE), Event.REPLACED),
        (State.ENROLLED, seen(namespace=Namespace.NONE, wanted=False), Event.GONE),
        (State.DRAINING, seen(wanted=False, active=1), None),
        (State.DRAINING, seen(wanted=False, active=1, over=True), Event.IDLE),
        (State.DRAINING, seen(wanted=False), Event.IDLE),
        (State.DRAINING, seen(wanted=False, waiting=True), None),
        (State.DRAINING, seen(active=1), Event.WANTED_AGAIN),
        (State.REMOVED, seen(held=False, namespace=Namespace.NONE), Event.BEGIN),
        (State.REMOVED, seen(held=False, namespace=Namespace.NONE, wanted=False), None),
    ],
)
def test_what_happens_next(state: State, sight: Sight, event: Event | None) -> None:
    assert next_event(state, sight) is event


@pytest.mark.parametrize("state", [State.OPENING, State.REMOVED], ids=lambda state: state.value)
def test_a_step_that_was_cancelled_half_way_is_taken_up(state: State) -> None:
    assert next_event(state, CALM) is Event.PROBLEM


def test_live_connections_are_only_cut_when_their_pod_is_gone_or_out_of_time() -> None:
    for state in HELD:
        for sight in SIGHTS:
            if sight.active and sight.namespace is Namespace.SAME and not sight.deleted and not sight.over:
                event = next_event(state, sight)
                action = Action.NOTHING if event is None else transition(state, event)[1]
                assert action not in (Action.DROP, Action.REMOVE, Action.REOPEN)


@given(failures=st.integers(1, 10_000), fraction=st.floats(0, 1, exclude_max=True))
def test_waits_grow_up_to_a_limit(failures: int, fraction: float) -> None:
    wait = retry_seconds(failures, 0.5, 15.0, lambda: fraction)
    assert 0.4 <= wait <= 18.0
    assert wait <= retry_seconds(failures + 1, 0.5, 15.0, lambda: fraction)
