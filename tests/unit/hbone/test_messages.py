"""Which header lists are messages."""

from __future__ import annotations

import pytest

from ztunnel.hbone.events import Headers
from ztunnel.hbone.messages import MalformedError, MessageCheck, check_request, check_response, check_trailers

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


LABELLED: Headers = (*CONNECT, (b"forwarded", b"for=a"), (b"te", b"trailers"))


@pytest.mark.parametrize("value", [b"for=b", b"", b"a \t b", b"\xe9"])
def test_a_request_like_the_last(value: bytes) -> None:
    check = MessageCheck(messages=False)
    check.request(LABELLED)
    check.request((*CONNECT, (b"forwarded", value), LABELLED[3]))
    check.request(LABELLED)


@pytest.mark.parametrize("value", [b"a\n", b"a\rb", b"\0", b" a", b"a ", b"\ta", b"a\t"])
@pytest.mark.parametrize("place", [1, 2])
def test_a_value_that_breaks_a_rule_behind_one_that_does_not(value: bytes, place: int) -> None:
    check = MessageCheck(messages=False)
    for _ in range(2):
        check.request(LABELLED)
        with pytest.raises(MalformedError):
            check.request((*LABELLED[:place], (LABELLED[place][0], value), *LABELLED[place + 1 :]))


@pytest.mark.parametrize(
    "headers",
    [
        (),
        CONNECT[1:],
        (CONNECT[0], LABELLED[2], CONNECT[1], LABELLED[3]),
        (*LABELLED[:3], (b"te", b"gzip")),
        (*CONNECT, (b"connection", b"for=a"), LABELLED[3]),
        (*CONNECT, CONNECT[1], LABELLED[3]),
        ((b":method", b""), *LABELLED[1:]),
        ((b":method", b"GET"), *LABELLED[1:]),
    ],
)
def test_a_malformed_request_first_and_behind_others(headers: Headers) -> None:
    check = MessageCheck(messages=False)
    for _ in range(2):
        with pytest.raises(MalformedError):
            check.request(headers)
        check.request(LABELLED)


@pytest.mark.parametrize("headers", [(), ((b":status", b"2x0"),), ((b":status", b"200"), (b":status", b"200"))])
def test_a_malformed_response_first_and_behind_others(headers: Headers) -> None:
    check, good = MessageCheck(messages=False), ((b":status", b"200"),)
    for _ in range(2):
        with pytest.raises(MalformedError):
            check.response(headers)
        assert [check.response(each) for each in (good, good, ((b":status", b"503"),), good)] == [200, 200, 503, 200]


def test_messages_of_others_than_tunnels_are_not_kept() -> None:
    check = MessageCheck(messages=True)
    check.request(LABELLED)
    assert check._last == ()
    check.response(((b":status", b"200"),))
    assert check._last == ()


@pytest.mark.parametrize("long", [(*CONNECT, (b"baggage", bytes(4000))), (*CONNECT, *[(b"baggage", b"")] * 120)])
def test_long_lists_are_not_kept(long: Headers) -> None:
    check = MessageCheck(messages=False)
    check.request(LABELLED)
    with pytest.raises(MalformedError):
        check.request((*long, (b"connection", b"")))
    check.request((*long[:-1], (b"baggage", b"x" * len(long[-1][1]))))
    assert check._last is LABELLED
    check.request(LABELLED)


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
