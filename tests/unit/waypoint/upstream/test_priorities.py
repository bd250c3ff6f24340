"""Envoy's numbers: loads of priorities by health, overprovisioning, panic, with the examples of its documentation."""

from __future__ import annotations

import pytest

from waypoint.upstream.priorities import loads


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([(100, 100)], [100]),
        ([(72, 100), (100, 100)], [100, 0]),
        ([(71, 100), (71, 100)], [99, 1]),
        ([(50, 100), (100, 100)], [70, 30]),
        ([(25, 100), (100, 100)], [35, 65]),
        ([(25, 100), (25, 100)], [50, 50]),
        ([(0, 100), (100, 100)], [0, 100]),
        ([(0, 0), (1, 1)], [0, 100]),
        ([(100, 100), (100, 100), (100, 100)], [100, 0, 0]),
        ([(25, 100), (25, 100), (25, 100)], [35, 35, 30]),
        ([(25, 100), (0, 100), (20, 100)], [56, 0, 44]),  # 35 and 28 of 63; what rounding loses goes to the first
        ([(0, 100), (0, 100)], [100, 0]),
    ],
)
def test_loads(sizes: list[tuple[int, int]], expected: list[int]) -> None:
    made, panic = loads(sizes, 0)
    assert made == expected
    assert sum(made) == 100
    assert not any(panic)


@pytest.mark.parametrize(
    ("sizes", "threshold", "expected", "panic"),
    [
        # a whole that is enough knows no panic, however ill its first priority is
        ([(10, 100), (100, 100)], 50, [14, 86], [False, False]),
        ([(49, 100)], 50, [100], [True]),
        ([(50, 100)], 50, [100], [False]),
        ([(50, 100)], 51, [100], [True]),
        ([(0, 100)], 50, [100], [True]),
        ([(0, 100)], 0, [100], [False]),
        ([(0, 0)], 50, [100], [True]),
        ([(60, 100), (5, 100)], 50, [93, 7], [False, True]),
        # all in panic: by number of endpoints
        ([(10, 100), (10, 300)], 50, [25, 75], [True, True]),
        ([(0, 0), (1, 10)], 50, [0, 100], [True, True]),
        ([(1, 3), (0, 3), (0, 3)], 50, [34, 33, 33], [True, True, True]),
    ],
)
def test_panic(sizes: list[tuple[int, int]], threshold: int, expected: list[int], panic: list[bool]) -> None:
    assert loads(sizes, threshold) == (expected, panic)
