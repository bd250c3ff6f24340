"""The loop's rounds: who is called when, and that a bug costs one connection."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import pytest

from ztunnel.dataplane.loop import HANGUP, READABLE, READS, WRITABLE, Loop


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

    def settle(self) -> None:
        self.diary.append(f"{self.name}:settled")
        self.act()

    def on_bug(self) -> None:
        self.diary.append(f"{self.name}:bug")


class Watch:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time

    def take_long(self) -> None:
        self.time += 0.01


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


def test_what_is_over_is_settled_behind_the_output() -> None:
    loop, diary = Loop(), list[str]()
    loop.settle_later(Recorder(diary, "over"))
    loop.flush_later(Recorder(diary, "late"))
    loop.again(Recorder(diary, "again"), READABLE)
    loop.run_once(0)
    assert diary == ["again:r", "late:flush", "over:settled"]
    loop.close()


def test_what_is_over_does_not_wait_for_news_of_others() -> None:
    loop, diary = Loop(), list[str]()

    def settle_another() -> None:
        loop.hold()
        loop.settle_later(Recorder(diary, "over"))

    loop.again(Recorder(diary, "busy", settle_another), READABLE)
    loop.run_once(None)
    loop.run_once(None)
    assert diary == ["busy:r", "over:settled"]
    loop.close()


def test_who_asks_twice_has_one_turn_for_both() -> None:
    loop, diary = Loop(Watch()), list[str]()
    eager = Recorder(diary, "eager")
    for events in (READABLE, WRITABLE, READABLE):
        loop.again(eager, events)
    loop.again(Recorder(diary, "other"), READABLE)
    loop.run_once(0)
    assert diary == ["eager:rw", "other:r"]
    loop.close()


def test_turns_end_when_they_take_long_and_go_on_in_order() -> None:
    watch, diary = Watch(), list[str]()
    loop = Loop(watch)
    bulk = Recorder(diary, "bulk", watch.take_long)
    loop.again(bulk, READABLE)
    for name in ("small", "smaller"):
        loop.again(Recorder(diary, name), READABLE)
    loop.run_once(0)
    assert diary == ["bulk:r"]
    loop.again(bulk, READABLE)
    loop.run_once(0)
    assert diary == ["bulk:r", "small:r", "smaller:r", "bulk:r"]
    loop.close()


def test_many_small_events_leave_transfers_more_than_one_turn() -> None:
    watch, diary = Watch(), list[str]()
    loop = Loop(watch)
    pairs = [socket.socketpair() for _ in range(8)]
    for ours, theirs in pairs:
        loop.watch(ours.fileno(), Recorder([], "small", watch.take_long))
        theirs.send(b"x")
    for number in range(4):
        loop.again(Recorder(diary, str(number), watch.take_long), READABLE)
    loop.run_once(0)
    assert diary == ["0:r", "1:r"]
    for sock in (sock for pair in pairs for sock in pair):
        sock.close()
    loop.close()


def test_news_of_one_who_waits_for_its_turn_are_told_in_its_turn() -> None:
    watch, diary = Watch(), list[str]()
    loop = Loop(watch)
    pairs = [socket.socketpair() for _ in range(2)]
    (bulk, far_bulk), (other, far_other) = pairs
    transfer = Recorder(diary, "bulk")
    loop.watch(bulk.fileno(), transfer)
    loop.watch(other.fileno(), Recorder(diary, "other"))
    loop.run_once(0)
    diary.clear()
    loop.again(Recorder(diary, "first", watch.take_long), READABLE)
    loop.again(transfer, READABLE)
    far_bulk.send(b"x")
    far_other.send(b"x")
    loop.run_once(0)
    assert diary == ["other:rw", "first:r"]
    loop.run_once(0)
    assert diary[2:] == ["bulk:rw"]
    for sock in (*pairs[0], *pairs[1]):
        sock.close()
    loop.close()


def test_who_asks_to_go_on_does_so_in_the_next_round() -> None:
    loop, diary = Loop(Watch()), list[str]()
    restless = Recorder(diary, "restless", lambda: loop.again(restless, READABLE))
    loop.again(restless, READABLE)
    loop.run_once(0)
    assert diary == ["restless:r"]
    loop.close()


def test_output_is_held_for_one_more_look_and_no_longer() -> None:
    loop, diary = Loop(Watch()), list[str]()

    def hold() -> None:
        loop.hold()
        loop.again(busy, READABLE)

    busy = Recorder(diary, "busy", hold)
    loop.flush_later(Recorder(diary, "out"))
    loop.again(busy, READABLE)
    loop.run_once(0)
    assert diary == ["busy:r"]
    loop.run_once(0)
    assert diary == ["busy:r", "busy:r", "out:flush"], "whoever holds again and again does not keep others waiting"
    loop.close()


def test_in_a_long_round_output_leaves_in_between() -> None:
    watch, diary = Watch(), list[str]()
    loop = Loop(watch)
    pairs = [socket.socketpair() for _ in range(3)]

    def work() -> None:
        loop.flush_later(Recorder(diary, "out"))
        watch.time += 0.00006

    for ours, theirs in pairs:
        loop.watch(ours.fileno(), Recorder(diary, "in", work))
        theirs.send(b"x")
    loop.run_once(0)
    assert diary == ["in:rw", "in:rw", "out:flush", "out:flush", "in:rw", "out:flush"]
    for sock in (sock for pair in pairs for sock in pair):
        sock.close()
    loop.close()


def test_whoever_does_much_within_one_event_lets_output_leave() -> None:
    watch, diary = Watch(), list[str]()
    loop = Loop(watch)

    def work() -> None:
        for _ in range(3):
            loop.flush_later(Recorder(diary, "out"))
            watch.time += 0.00006
            loop.flush_if_late()
            diary.append("worked")

    loop.again(Recorder(diary, "in", work), READABLE)
    loop.run_once(0)
    assert diary == ["in:r", "worked", "out:flush", "out:flush", "worked", "worked", "out:flush"]
    loop.close()


def test_who_has_nothing_to_write_is_not_told_that_there_is_room() -> None:
    loop, diary = Loop(Watch()), list[str]()
    ours, theirs = socket.socketpair()
    recorder = Recorder(diary, "sock")
    loop.take(ours.fileno(), recorder, READS)
    loop.run_once(0)
    theirs.send(b"x")
    loop.run_once(0)
    loop.take(ours.fileno(), recorder)
    loop.run_once(0)
    assert diary == ["sock:r", "sock:rw"]
    ours.close()
    theirs.close()
    loop.close()


def test_a_small_message_makes_a_worker_a_shared_one_for_a_while() -> None:
    watch = Watch()
    loop = Loop(watch)
    shared = [loop.is_shared]
    loop.small()
    shared.append(loop.is_shared)
    watch.time += 0.05
    loop.run_once(0)
    shared.append(loop.is_shared)
    assert shared == [False, True, False]
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


def test_a_socket_that_is_dropped_and_closed_has_no_more_news() -> None:
    loop, diary = Loop(), list[str]()
    ours, theirs = socket.socketpair()
    number = ours.fileno()
    loop.watch(number, Recorder(diary, "a"))
    loop.drop(number)
    loop.drop(number)
    ours.close()
    loop.run_once(0)
    with os.fdopen(os.dup2(theirs.fileno(), number), "rb", buffering=0):
        loop.watch(number, Recorder(diary, "b"))
        loop.run_once(1)
        loop.forget(number)
    theirs.close()
    assert [each[0] for each in diary] == ["b"]
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


@pytest.mark.parametrize("leave", [Loop.forget, Loop.drop])
def test_news_of_a_socket_that_is_gone_is_not_told_to_the_next_one_with_its_number(leave: Callable[[Loop, int], None]) -> None:
    loop, diary = Loop(), list[str]()
    pairs = [socket.socketpair() for _ in range(2)]
    numbers = [ours.fileno() for ours, _ in pairs]
    fresh: list[tuple[socket.socket, socket.socket]] = []

    def replace_the_other() -> None:
        if fresh:
            return
        other = 1 if diary[-1].startswith("0") else 0
        leave(loop, numbers[other])
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
    loop, diary = Loop(Watch()), list[str]()
    loop.again(Recorder(diary, "bad", fail), READABLE)
    loop.again(Recorder(diary, "good"), READABLE)
    loop.flush_later(Recorder(diary, "worse", fail))
    loop.settle_later(Recorder(diary, "worst", fail))
    loop.settle_later(Recorder(diary, "best"))
    loop.call_later(0, fail)
    loop.run_once(0)
    assert diary == ["bad:r", "bad:bug", "good:r", "worse:flush", "worse:bug", "worst:settled", "worst:bug", "best:settled"]
    assert loop.bugs == 4
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
