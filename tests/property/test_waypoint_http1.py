"""Requests that we take are read as h11 reads them: whoever stands behind us sees the same ones, or nothing is taken at all."""

from __future__ import annotations

import h11
import hypothesis.strategies as st
from hypothesis import given

from waypoint.data.http1_requests import End, HttpLimits, RequestReader
from waypoint.http.messages import Request

LINES = (
    b"Content-Length: 3",
    b"Content-Length: 0",
    b"Content-Length: 03",
    b"content-length:3 ",
    b"Transfer-Encoding: chunked",
    b"transfer-encoding:\tChunked",
    b"Transfer-Encoding: identity",
    b"Host: b",
    b"X: y",
    b"X:",
    b"X: \xff",
    b" folded",
    b"Bad header: x",
    b": x",
    b"X\x00: y",
    b"Connection: close",
    b"Connection: keep-alive",
)
BODIES = (
    b"",
    b"abc",
    b"3\r\nabc\r\n0\r\n\r\n",
    b"3;x\r\nabc\r\n0\r\nT: v\r\n\r\n",
    b"0\r\n\r\n",
    b"3\nabc\n0\n\n",
    b"03\r\nabc\r\n0\r\n\r\n",
)
ENDS = (b"\r\n", b"\r\n", b"\r\n", b"\n", b"\r")
TARGETS = (b"/", b"/a?b", b"*", b"/\xc3", b"/a b", b"http://h/x")

Read = list[tuple[bytes, bytes, bytes]]
"""Method, target without a host, body."""


def message(method: bytes, target: bytes, end: bytes, lines: list[bytes], body: bytes) -> bytes:
    return method + b" " + target + b" HTTP/1.1" + end + b"Host: a" + end + b"".join(line + end for line in lines) + end + body


MESSAGES = st.builds(
    message,
    st.sampled_from((b"GET", b"POST", b"OPTIONS")),
    st.sampled_from(TARGETS),
    st.sampled_from(ENDS),
    st.lists(st.sampled_from(LINES), max_size=3),
    st.sampled_from(BODIES),
)


def ours(wire: bytes, cut: int) -> Read:
    """The requests that are taken whole, before anything is refused."""
    reader = RequestReader(HttpLimits())
    for piece in (wire[:cut], wire[cut:]):
        if piece:
            reader.read(memoryview(piece))
    done: Read = []
    head: Request | None = None
    body = b""
    for event in reader.events:
        if isinstance(event, Request):
            head, body = event, b""
        elif isinstance(event, bytes):
            body += event
        elif isinstance(event, End) and head is not None:
            done.append((head.method, head.path, body))
            head = None
    return done


def theirs(wire: bytes) -> Read:
    """The same by h11."""
    done: Read = []
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(wire)
    head: h11.Request | None = None
    body = b""
    try:
        while True:
            event = connection.next_event()
            if isinstance(event, h11.Request):
                head, body = event, b""
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage) and head is not None:
                target = bytes(head.target)
                done.append((bytes(head.method), target.removeprefix(b"http://h"), body))
                connection.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
                connection.send(h11.EndOfMessage())
                if connection.our_state is not h11.DONE or connection.their_state is not h11.DONE:
                    return done
                connection.start_next_cycle()
            else:
                return done
    except h11.RemoteProtocolError:
        return done


@given(st.lists(MESSAGES, min_size=1, max_size=3), st.integers(0, 200))
def test_what_is_taken_is_what_h11_reads(messages: list[bytes], cut: int) -> None:
    wire = b"".join(messages)
    taken = ours(wire, min(cut, len(wire)))
    assert taken == theirs(wire)[: len(taken)]


@given(st.binary(max_size=400), st.integers(0, 400))
def test_any_bytes_are_read_or_refused(wire: bytes, cut: int) -> None:
    assert ours(wire, min(cut, len(wire))) == ours(wire, 0)
