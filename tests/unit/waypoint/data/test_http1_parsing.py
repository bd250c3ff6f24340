"""What is read of HTTP/1.1 does not depend on where it is read: a connection may be lost while another's bytes are dealt with."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import httptools
import pytest

from waypoint.data.heads import BadMessage
from waypoint.data.http1_client import Http1Client
from waypoint.data.http1_requests import HttpLimits, RequestReader
from ztunnel.dataplane.loop import Loop

T = TypeVar("T")


def while_another_error_is_handled(act: Callable[[], T]) -> T:
    try:
        raise ConnectionResetError("somebody else's")
    except ConnectionResetError:
        return act()


def read(data: bytes) -> BadMessage:
    reader = RequestReader(HttpLimits())
    reader.read(memoryview(data))
    (told,) = reader.events
    assert isinstance(told, BadMessage)
    return told


@pytest.mark.parametrize(
    ("data", "status", "details"),
    [
        (b"\0x\r\n\r\n", 400, "http1.codec_error"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400, "http1.multiple_hosts"),
        (b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 102, 431, "http1.too_many_headers"),
    ],
)
def test_a_bad_request_is_refused_for_its_own_reason(data: bytes, status: int, details: str) -> None:
    told = while_another_error_is_handled(lambda: read(data))
    assert (told.status, told.details) == (status, details)


def test_a_bug_in_what_llhttp_calls_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_self: RequestReader, _url: bytes) -> None:
        raise KeyError("bug")

    monkeypatch.setattr(RequestReader, "on_url", fail)
    with pytest.raises(httptools.HttpParserCallbackError):
        read(b"GET / HTTP/1.1\r\n\r\n")


class Nobody:
    """Keeps no connection."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


@pytest.mark.parametrize(
    ("head", "bad"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", ""),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n", "unknown transfer coding"),
    ],
)
def test_the_answer_to_head_ends_with_its_head(head: bytes, bad: str) -> None:
    loop = Loop()
    client = Http1Client(loop, Nobody())
    client._is_head = True
    assert while_another_error_is_handled(lambda: client._parse_one_head(head, b""))
    last = client._events[-1]
    assert (last.details if isinstance(last, BadMessage) else "") == bad
    assert len(client._events) == (1 if bad else 2)
    loop.close()
