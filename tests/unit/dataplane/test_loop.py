"""The loop's rounds: who is called when, and that a bug costs one connection."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import pytest

from ztunnel.dataplane.loop import HANGUP, READABLE, WRITABLE, Loop


class Recorder:
    """Writes down what it is told."""

    def __init__(self, diary: list[str], name: str, act: Callable[[], None] = lambda: None) -> None:
        self.diary = diary
        self.name = name
        self.act = act

    def on_event(self, events: int) -> None:
        self.diary.append(f"{self.name}:{'r' if events & READABLE else ''}{'w' if events & WRITABLE else ''}")
        self.act()

    def flush(self) -> None:
        self.diary.append(f"{self.name}:flush")
        self.act()

    def on_bug(self) -> None:
        self.diary.append(f"{self.name}:bug")


def fail() -> None:
    raise RuntimeError("this is a bug")


def test_a_round_has_an_order() -> None:
    loop, diary = Loop(), list[str]()
    loop.flush_later(Recorder(diary, "late"))
    loop.call_later(0, lambda: diary.append("timer"))
    loop.again(Recorder(diary, "again"), READABLE)
    loop.run_once(0)
    assert diary == ["again:r", "timer", "late:flush"]
    loop.close()


def test_who_asks_twice_has_one_turn_for_both() -> None:
    loop, diary = Loop(), list[str]()
    eager = Recorder(diary, "eager")
    for events in (READABLE, WRITABLE, READABLE):
        loop.again(eager, events)
    loop.again(Recorder(diary, "other"), READABLE)
    loop.run_once(0)
    assert diary == ["eager:rw", "other:r"]
    loop.close()


def test_news_and_silence() -> None:
    loop, diary = Loop(), list[str]()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        loop.watch(ours.fileno(), Recorder(diary, "a"))
        theirs.send(b"x")
        loop.run_once(1)
        loop.take(ours.fileno(), Recorder(diary, "b"))
        loop.run_once(1)
        loop.forget(ours.fileno())
        theirs.send(b"y")
        loop.run_once(0.01)
    assert diary == ["a:rw", "b:rw"]
    loop.close()


def test_who_takes_a_socket_over_hears_what_its_former_handler_was_told() -> None:
    loop = Loop()
    told: list[int] = []

    class Heir(Recorder):
        def on_event(self, events: int) -> None:
            told.append(events)

    ours, theirs = socket.socketpair()
    with ours:
        loop.watch(ours.fileno(), Recorder([], "former"))
        theirs.send(b"last words")
        theirs.close()
        loop.run_once(1)
        loop.take(ours.fileno(), Heir([], "heir"))
        loop.run_once(1)
    assert [bool(events & HANGUP) for events in told] == [True]
    loop.close()


def test_news_of_a_socket_that_is_gone_is_not_told_to_the_next_one_with_its_number() -> None:
    loop, diary = Loop(), list[str]()
    pairs = [socket.socketpair() for _ in range(2)]
    numbers = [ours.fileno() for ours, _ in pairs]
    fresh: list[tuple[socket.socket, socket.socket]] = []

    def replace_the_other() -> None:
        if fresh:
            return
        other = 1 if diary[-1].startswith("0") else 0
        loop.forget(numbers[other])
        pairs[other][0].close()
        made, far = socket.socketpair()
        if made.fileno() != numbers[other]:
            os.dup2(made.fileno(), numbers[other])
            made.close()
            made = socket.socket(fileno=numbers[other])
        fresh.append((made, far))
        loop.watch(made.fileno(), Recorder(diary, "fresh"))

    for number, (ours, theirs) in enumerate(pairs):
        loop.watch(ours.fileno(), Recorder(diary, str(number), replace_the_other))
        theirs.send(b"x")
    loop.run_once(1)
    assert len(diary) == 1
    loop.run_once(1)
    assert diary[1:] == ["fresh:w"], "its own news come in the next round"
    for sock in (*fresh[0], *(sock for pair in pairs for sock in pair)):
        sock.close()
    loop.close()


def test_a_bug_ends_its_own_connection_only(caplog: pytest.LogCaptureFixture) -> None:
    loop, diary = Loop(), list[str]()
    loop.again(Recorder(diary, "bad", fail), READABLE)
    loop.again(Recorder(diary, "good"), READABLE)
    loop.flush_later(Recorder(diary, "worse", fail))
    loop.call_later(0, fail)
    loop.run_once(0)
    assert diary == ["bad:r", "bad:bug", "good:r", "worse:flush", "worse:bug"]
    assert loop.bugs == 3
    assert "this is a bug" in caplog.text
    loop.close()


def test_a_cancelled_timer_is_not_waited_for() -> None:
    loop = Loop()
    loop.call_later(0.001, lambda: pytest.fail("cancelled")).cancel()
    fired: list[int] = []
    loop.call_later(0.02, lambda: fired.append(1))
    while not fired:
        loop.run_once(None)
    loop.close()


def test_deadlines_that_are_met_do_not_pile_up() -> None:
    loop = Loop()
    fired: list[int] = []
    loop.call_later(0.001, lambda: fired.append(1))
    for _ in range(100_000):
        loop.call_later(300, lambda: pytest.fail("cancelled")).cancel()
    assert len(loop._timers) < 5_000
    while not fired:
        loop.run_once(None)
    loop.close()


def test_stop_ends_run() -> None:
    loop = Loop()
    loop.call_later(0, loop.stop)
    loop.run()
