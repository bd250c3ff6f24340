"""gRPC's frames, statuses and headers as values."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ztunnel.rpc.messages import (
    Messages,
    RpcError,
    Status,
    check_answer,
    check_status,
    framed,
    request_headers,
    status_headers,
    timeout_of,
)


@given(st.lists(st.binary(max_size=50), max_size=5), st.integers(1, 20))
def test_messages_come_out_as_they_went_in_however_they_are_cut(messages: list[bytes], size: int) -> None:
    stream = b"".join(framed(message) for message in messages)
    reader = Messages(50)
    found = [message for start in range(0, len(stream), size) for message in reader.feed(stream[start : start + size])]
    assert found == messages
    assert reader.is_empty


def test_a_message_that_is_cut_off_is_seen() -> None:
    reader = Messages(50)
    assert reader.feed(framed(b"abc")[:-1]) == []
    assert not reader.is_empty


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\0\0\0\0\x33", Status.RESOURCE_EXHAUSTED),
        (b"\0\xff\xff\xff\xff", Status.RESOURCE_EXHAUSTED),
        (b"\1\0\0\0\1a", Status.UNIMPLEMENTED),
    ],
)
def test_messages_too_large_or_compressed_are_refused_by_their_prefix(data: bytes, status: Status) -> None:
    with pytest.raises(RpcError) as caught:
        Messages(50).feed(data)
    assert caught.value.status is status


@given(st.text(max_size=200), st.sampled_from([status for status in Status if status]))
def test_a_status_arrives_as_it_was_sent(text: str, status: Status) -> None:
    with pytest.raises(RpcError) as caught:
        check_status(status_headers(status, text))
    assert (caught.value.status, caught.value.text) == (status, text)


def test_ok_is_no_error() -> None:
    check_status(status_headers(Status.OK, ""))


@pytest.mark.parametrize("value", [b"17", b"-1", b"abc", b"", b"99999999999999999999"])
def test_a_status_that_nobody_knows_is_unknown(value: bytes) -> None:
    with pytest.raises(RpcError) as caught:
        check_status([(b"grpc-status", value)])
    assert caught.value.status is Status.UNKNOWN


def test_an_answer_without_status_is_an_error() -> None:
    with pytest.raises(RpcError, match="no status"):
        check_status([(b"x", b"y")])


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([(b":status", b"503")], Status.UNAVAILABLE),
        ([(b":status", b"404")], Status.UNIMPLEMENTED),
        ([(b":status", b"302")], Status.UNKNOWN),
        ([(b"content-type", b"application/grpc")], Status.UNKNOWN),
        ([(b":status", b"200"), (b"content-type", b"text/html")], Status.UNKNOWN),
    ],
)
def test_other_servers_are_seen(headers: list[tuple[bytes, bytes]], status: Status) -> None:
    with pytest.raises(RpcError) as caught:
        check_answer(headers)
    assert caught.value.status is status


@pytest.mark.parametrize(("raw", "seconds"), [(b"5S", 5.0), (b"1500m", 1.5), (b"2M", 120.0), (b"1H", 3600.0), (b"7u", 7e-6), (b"8n", 8e-9)])
def test_deadlines(raw: bytes, seconds: float) -> None:
    assert timeout_of({b"grpc-timeout": raw}) == pytest.approx(seconds)


def test_deadlines_that_are_absent_or_nonsense() -> None:
    assert timeout_of({}) is None
    with pytest.raises(RpcError):
        timeout_of({b"grpc-timeout": b"123456789S"})


@pytest.mark.parametrize(("seconds", "raw"), [(2.5, b"2500m"), (0.0, b"1m"), (1e9, b"99999999m")])
def test_a_call_says_its_deadline(seconds: float, raw: bytes) -> None:
    headers = dict(request_headers("ca:15012", "/a/B", seconds, {"authorization": "Bearer x"}))
    assert headers[b"grpc-timeout"] == raw
    assert headers[b"authorization"] == b"Bearer x"
