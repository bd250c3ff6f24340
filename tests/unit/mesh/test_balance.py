"""Power of two choices."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from tests.kit.builders import workload
from ztunnel.mesh.balance import Candidate, pick

A, B, C = (Candidate(workload(name, f"10.0.0.{number}"), 80) for number, name in enumerate("abc", 1))


def draws(*numbers: int) -> Callable[[int], int]:
    left: Iterable[int] = iter(numbers)

    def random(below: int) -> int:
        drawn = next(iter(left))
        assert 0 <= drawn < below
        return drawn

    return random


def loads(**active: int) -> Callable[[str], int]:
    return lambda uid: active.get(uid.removeprefix("uid-"), 0)


def test_one_candidate_needs_no_dice() -> None:
    assert pick([A], loads(a=9), draws()) is A


def test_the_less_loaded_of_two_wins() -> None:
    assert pick([A, B, C], loads(a=1, b=0), draws(0, 0)) is B
    assert pick([A, B, C], loads(a=0, b=1), draws(0, 0)) is A
    assert pick([A, B, C], loads(b=5), draws(2, 1)) is C


def test_a_tie_goes_to_the_first_draw() -> None:
    assert pick([A, B, C], loads(), draws(1, 0)) is B


def test_the_two_are_never_the_same() -> None:
    assert pick([A, B], loads(b=1), draws(1, 0)) is A
    assert pick([A, B], loads(a=1), draws(0, 0)) is B


def test_load_evens_out() -> None:
    active = {"uid-a": 0, "uid-b": 0, "uid-c": 0}
    state = 1

    def random(below: int) -> int:
        nonlocal state
        state = (state * 1103515245 + 12345) % 2**31
        return (state >> 8) % below

    for _ in range(300):
        active[pick([A, B, C], active.__getitem__, random).workload.uid] += 1
    assert max(active.values()) - min(active.values()) <= 3
