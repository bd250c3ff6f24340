"""Waiting for real processes and kernels: ask again until the answer is yes, never longer than a bound.

The only places in the tests that sleep. For trio code without real processes use the `mock_clock` fixture instead.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import trio

T = TypeVar("T")

PAUSE_SECONDS = 0.01


class NeverHappened(AssertionError):
    """The bound passed without a yes; the text has the last answer."""


def eventually(question: Callable[[], T | None], *, within: float = 10.0, saying: str = "") -> T:
    """The first true answer.

    Args:
        question: asked at once and then every few milliseconds; a false value or an AssertionError means not yet.
        within: seconds.
        saying: what was waited for, for the failure's text.

    Raises:
        NeverHappened: chained to the question's last AssertionError, if it raised one.
    """
    deadline = time.monotonic() + within
    while True:
        answer, refusal = _ask(question)
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise _never(question, within, saying, answer) from refusal
        time.sleep(PAUSE_SECONDS)


async def eventually_async(question: Callable[[], T | None], *, within: float = 10.0, saying: str = "") -> T:
    """`eventually` for trio tests, whose other tasks go on meanwhile."""
    deadline = trio.current_time() + within
    while True:
        answer, refusal = _ask(question)
        if answer:
            return answer
        if trio.current_time() > deadline:
            raise _never(question, within, saying, answer) from refusal
        await trio.sleep(PAUSE_SECONDS)


def _ask(question: Callable[[], T | None]) -> tuple[T | None, AssertionError | None]:
    try:
        return question(), None
    except AssertionError as error:
        return None, error


def _never(question: Callable[[], T | None], within: float, saying: str, answer: T | None) -> NeverHappened:
    return NeverHappened(f"not within {within:g} s: {saying or getattr(question, '__name__', question)} (last answer: {answer!r})")
