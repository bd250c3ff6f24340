"""The waiting of the tests: bounded, and honest about what did not happen."""

from __future__ import annotations

import pytest
import trio.testing

from tests.kit.polling import NeverHappened, eventually, eventually_async


def test_the_first_true_answer_is_returned() -> None:
    answers = iter([None, 0, "", 7, 8])
    assert eventually(lambda: next(answers)) == 7


def test_an_assertion_means_not_yet() -> None:
    answers = iter([1, 2, 3])

    def is_three() -> bool:
        assert next(answers) == 3
        return True

    assert eventually(is_three)


def test_never_says_what_and_why() -> None:
    def refuses() -> bool:
        raise AssertionError("because")

    with pytest.raises(NeverHappened, match="the moon to rise") as caught:
        eventually(refuses, within=0.0, saying="the moon to rise")
    assert str(caught.value.__cause__) == "because"


async def test_other_tasks_go_on_meanwhile(mock_clock: trio.testing.MockClock) -> None:
    done: list[int] = []

    async def later() -> None:
        await trio.sleep(3)
        done.append(1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(later)
        assert await eventually_async(lambda: done) == [1]
    assert 3 <= mock_clock.current_time() < 4


async def test_never_comes_on_the_mock_clock(mock_clock: trio.testing.MockClock) -> None:
    began = mock_clock.current_time()
    with pytest.raises(NeverHappened):
        await eventually_async(lambda: False, within=2)
    assert mock_clock.current_time() - began >= 2
