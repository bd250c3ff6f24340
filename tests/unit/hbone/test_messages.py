"""Which header lists are messages."""

from __future__ import annotations

import pytest

from ztunnel.hbone.events import Headers
from ztunnel.hbone.messages import MalformedError, check_request, check_response, check_trailers

CONNECT: Headers = ((b":method", b"CONNECT"), (b":authority", b"a:1"))
GET: Headers = ((b":method", b"GET"), (b":scheme", b"http"), (b":path", b"/"))


@pytest.mark.parametrize(
    "headers", [CONNECT, GET, CONNECT[:1], (*CONNECT, (b"te", b"trailers")), (*CONNECT, (b"a", b"")), (*CONNECT, (b"a", b"\xe9 \t b"))]
)
def test_well_formed_requests(headers: Headers) -> None:
    check_request(headers)


@pytest.mark.parametrize(
    "headers",
    [
        (),
        CONNECT[1:],
        GET[:2],
        GET[1:],
        ((b":method", b""), *CONNECT[1:]),
        (*CONNECT, (b":scheme", b"http")),
        (*CONNECT, (b":path", b"/")),
        (*CONNECT, (b":protocol", b"websocket")),
        (*CONNECT, (b":status", b"200")),
        (*CONNECT, CONNECT[1]),
        (CONNECT[0], (b"a", b"b"), CONNECT[1]),
        (*CONNECT, (b"Baggage", b"")),
        (*CONNECT, (b"", b"")),
        (*CONNECT, (b"a b", b"")),
        (*CONNECT, (b"a:b", b"")),
        (*CONNECT, (b"\xe9", b"")),
        (*CONNECT, (b"a", b" b")),
        (*CONNECT, (b"a", b"b\t")),
        (*CONNECT, (b"a", b"b\r\nc: d")),
        (*CONNECT, (b"a", b"\0")),
        ((b":method", b"CONNECT\n"), CONNECT[1]),
        (*CONNECT, (b"connection", b"close")),
        (*CONNECT, (b"proxy-connection", b"close")),
        (*CONNECT, (b"keep-alive", b"1")),
        (*CONNECT, (b"transfer-encoding", b"chunked")),
        (*CONNECT, (b"upgrade", b"h2c")),
        (*CONNECT, (b"te", b"gzip")),
    ],
)
def test_malformed_requests(headers: Headers) -> None:
    with pytest.raises(MalformedError):
        check_request(headers)


def test_responses() -> None:
    assert check_response(((b":status", b"200"), (b"baggage", b""))) == 200
    assert check_response(((b":status", b"103"),)) == 103
    for status in (b"", b"20", b"2000", b"+20", b"099", b"101", b"\xb2\xb2\xb2"):
        with pytest.raises(MalformedError):
            check_response(((b":status", status),))
    with pytest.raises(MalformedError):
        check_response((*CONNECT, (b":status", b"200")))


def test_trailers() -> None:
    check_trailers(((b"grpc-status", b"0"),))
    with pytest.raises(MalformedError):
        check_trailers(((b":status", b"200"),))
