"""Every state and every input: both tables are complete, end where they should, and agree on what is closed."""

from __future__ import annotations

from itertools import product

import pytest

from ztunnel.hbone.streams import RECEIVED, SENT, Input, State, StreamTable, Verdict

DEAD = {State.RESET, State.CLOSED}
PAIRS = list(product(State, Input))


@pytest.mark.parametrize(("state", "received"), PAIRS)
def test_whatever_is_received_ends_in_a_state(state: State, received: Input) -> None:
    after, verdict = RECEIVED[state, received]
    assert after is not State.IDLE
    if state in DEAD:
        assert after is state
        assert verdict is not Verdict.TAKE
    if verdict is Verdict.STREAM_CLOSED:
        assert after is State.RESET


@pytest.mark.parametrize(("state", "sent"), PAIRS)
def test_whatever_is_sent_ends_in_a_state(state: State, sent: Input) -> None:
    after, allowed = SENT[state, sent]
    if not allowed:
        assert after is state
    assert not (allowed and state in DEAD)
    assert allowed is False or sent is not Input.RST or after is State.RESET


def test_a_stream_that_the_peer_has_not_ended_takes_every_frame() -> None:
    """`Exchange.judge` does not ask the table then."""
    for state in (State.OPEN, State.LOCAL_ENDED):
        assert {RECEIVED[state, received][1] for received in Input} == {Verdict.TAKE}


def test_both_ends_in_either_order_close() -> None:
    for first, second in ((RECEIVED, SENT), (SENT, RECEIVED)):
        half = first[State.OPEN, Input.END][0]
        assert second[half, Input.END][0] is State.CLOSED


def test_numbers_tell_idle_from_closed() -> None:
    server = StreamTable(client=False, remembered=2)
    server.last = 7
    assert [server.state_of(number) for number in (1, 7, 9, 2, 8)] == [State.CLOSED, State.CLOSED, State.IDLE, State.IDLE, State.IDLE]
    client = StreamTable(client=True, remembered=2)
    client.next = 7
    assert [client.state_of(number) for number in (1, 5, 7, 2)] == [State.CLOSED, State.CLOSED, State.IDLE, State.IDLE]


def test_memory_of_resets_is_bounded() -> None:
    table = StreamTable(client=False, remembered=2)
    table.last = 9
    for number in (1, 3, 5):
        table.remember(number)
    assert [table.state_of(number) for number in (1, 3, 5)] == [State.CLOSED, State.RESET, State.RESET]
    assert table.export().resets == (3, 5)


@pytest.mark.parametrize("client", [True, False])
@pytest.mark.parametrize("answered", [True, False])
@pytest.mark.parametrize("state", State)
def test_reading_and_writing_follow_the_state(client: bool, answered: bool, state: State) -> None:
    stream = StreamTable(client, 1).add(1, 10, 20)
    stream.answered = answered
    stream.enter(state, client)
    assert stream.reading is (SENT[state, Input.WINDOW_UPDATE][1] and (answered or not client))
    assert stream.writing is (SENT[state, Input.DATA][1] and (answered or client))


def test_export_and_restore() -> None:
    table = StreamTable(client=False, remembered=3)
    table.last = 5
    stream = table.add(5, 10, 20)
    stream.answered, stream.credit, stream.starved = True, 3, True
    table.move(stream, State.REMOTE_ENDED)
    table.remember(3)
    again = StreamTable.restore(False, 3, table.export())
    assert again.export() == table.export()
    assert (again.live[5].reading, again.live[5].writing) == (False, True)
