"""External authorization: what is asked, and what each answer means, over HTTP and gRPC."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from waypoint.http.ext_authz import Allowed, Authorizer
from waypoint.http.messages import Client, Headers, LocalReply, Request
from ztunnel.mesh.identity import SpiffeId
from ztunnel.mesh.l7.routes import TextKind, TextMatch
from ztunnel.mesh.l7.security import AuthorizerKind, ExtensionProvider
from ztunnel.rpc.protobuf import bytes_field, int_field, read_bytes, read_fields

CLIENT = Client(SpiffeId("td", "shop", "cart"), "10.0.0.1", 4711, "shop", 80, "10.96.0.1")
PROVIDER = ExtensionProvider("opa", AuthorizerKind.HTTP, "cluster", "authz.shop", path_prefix="/check", timeout=0.5)
GRPC = replace(PROVIDER, kind=AuthorizerKind.GRPC)


def exact(*names: str) -> tuple[TextMatch, ...]:
    return tuple(TextMatch(TextKind.EXACT, name, ignore_case=True) for name in names)


def request() -> Request:
    headers = [(b"authorization", b"Bearer x"), (b"cookie", b"a=b"), (b"x-ext-a", b"1"), (b"x-other", b"2"), (b"content-length", b"3")]
    return Request(b"PUT", b"/a?b=c", b"shop.example", headers)


def test_the_question_over_http() -> None:
    provider = replace(PROVIDER, include_headers=(TextMatch(TextKind.PREFIX, "x-ext-"),), add_headers=(("x-added", "y"),))
    asked, body = Authorizer(provider).question(request(), CLIENT, b"")
    assert (asked.method, asked.path, asked.authority, body) == (b"PUT", b"/check/a?b=c", b"shop.example", b"")
    assert asked.headers == [(b"authorization", b"Bearer x"), (b"x-ext-a", b"1"), (b"x-added", b"y"), (b"content-length", b"0")]


@pytest.mark.parametrize("partial", [False, True])
def test_the_question_with_a_body(partial: bool) -> None:
    asked, body = Authorizer(replace(PROVIDER, body_bytes=10)).question(request(), CLIENT, b"abc", partial=partial)
    said = (b"x-envoy-auth-partial-body", b"true" if partial else b"false")
    assert (body, asked.headers) == (b"abc", [(b"authorization", b"Bearer x"), said, (b"content-length", b"3")])


def test_http_200_allows_and_edits_what_it_may() -> None:
    provider = replace(PROVIDER, headers_upstream=exact("x-user", "content-length"), headers_downstream_allow=exact("x-down"))
    answer: Headers = [(b"x-user", b"alice"), (b"x-down", b"1"), (b"x-secret", b"s"), (b"content-length", b"0")]
    verdict = Authorizer(provider).verdict(200, answer, b"", [])
    assert isinstance(verdict, Allowed)
    asked = Request(b"GET", b"/", b"a", [(b"x-user", b"forged"), (b"y", b"z")])
    verdict.apply(asked)
    assert asked.headers == [(b"y", b"z"), (b"x-user", b"alice")]
    headers: Headers = [(b"x-down", b"0"), (b"server", b"s")]
    verdict.decorate(headers)
    assert headers == [(b"server", b"s"), (b"x-down", b"1")]


@pytest.mark.parametrize(
    ("provider", "kept"),
    [
        (PROVIDER, [(b"x-a", b"1"), (b"location", b"/login"), (b"content-type", b"text/html")]),
        (replace(PROVIDER, headers_downstream_deny=exact("x-a")), [(b"x-a", b"1"), (b"location", b"/login")]),
    ],
)
@pytest.mark.parametrize("status", [204, 302, 401, 403, 404])
def test_another_status_is_the_clients_answer(provider: ExtensionProvider, kept: Headers, status: int) -> None:
    headers: Headers = [(b"x-a", b"1"), (b"location", b"/login"), (b"content-type", b"text/html"), (b"content-length", b"2")]
    verdict = Authorizer(provider).verdict(status, headers, b"no", [])
    assert isinstance(verdict, LocalReply)
    assert (verdict.status, verdict.body, verdict.flag, verdict.details) == (status, b"no", "UAEX", "ext_authz_denied")
    assert verdict.headers == kept


def test_an_authorizer_that_fails() -> None:
    refused = Authorizer(PROVIDER).verdict(503, [], b"", [])
    assert isinstance(refused, LocalReply)
    assert (refused.status, refused.flag, refused.details) == (403, "UAEX", "ext_authz_error")
    other = Authorizer(replace(PROVIDER, status_on_error=500)).failed()
    assert isinstance(other, LocalReply)
    assert other.status == 500
    assert isinstance(Authorizer(replace(PROVIDER, fail_open=True)).verdict(500, [], b"", []), Allowed)


# gRPC


def fields(message: bytes) -> dict[int, list[int | bytes]]:
    found: dict[int, list[int | bytes]] = {}
    for number, value in read_fields(message):
        found.setdefault(number, []).append(value)
    return found


def inner(message: bytes, *path: int) -> bytes:
    for number in path:
        message = read_bytes(number, fields(message)[number][0])
    return message


def test_the_question_over_grpc() -> None:
    asked, body = Authorizer(replace(GRPC, body_bytes=10)).question(request(), CLIENT, b"abc")
    assert (asked.method, asked.path, asked.authority) == (b"POST", b"/envoy.service.auth.v3.Authorization/Check", b"authz.shop")
    assert asked.headers == [(b"content-type", b"application/grpc"), (b"te", b"trailers"), (b"grpc-timeout", b"500m")]
    assert body[:5] == b"\0" + len(body[5:]).to_bytes(4, "big")
    attributes = inner(body[5:], 1)
    assert fields(inner(attributes, 1, 1, 1)) == {2: [b"10.0.0.1"], 3: [4711]}
    assert fields(inner(attributes, 1))[4] == [b"spiffe://td/ns/shop/sa/cart"]
    assert fields(inner(attributes, 2, 1, 1)) == {2: [b"10.96.0.1"], 3: [80]}
    http = fields(inner(attributes, 4, 2))
    assert (http[2], http[4], http[5], http[9], http[11]) == ([b"PUT"], [b"/a?b=c"], [b"shop.example"], [3], [b"abc"])
    headers = [fields(read_bytes(3, each)) for each in http[3]]
    assert {1: [b"cookie"], 2: [b"a=b"]} in headers
    assert {1: [b":authority"], 2: [b"shop.example"]} in headers
    assert {1: [b"x-envoy-auth-partial-body"], 2: [b"false"]} in headers


def option(name: bytes, value: bytes, append: bool | None = None) -> bytes:
    said = b"" if append is None else bytes_field(2, int_field(1, int(append)))
    return bytes_field(1, bytes_field(1, name) + bytes_field(2, value)) + said


def framed(message: bytes) -> bytes:
    return b"\0" + len(message).to_bytes(4, "big") + message


OK: Headers = [(b"grpc-status", b"0")]


def test_grpc_allows_and_edits() -> None:
    edits = b"".join(
        [
            bytes_field(2, option(b"X-User", b"alice")),
            bytes_field(2, option(b"x-role", b"b", append=True)),
            bytes_field(2, option(b":path", b"/x")),
            bytes_field(2, option(b"content-length", b"9")),
            bytes_field(5, b"X-Gone"),
            bytes_field(5, b"host"),
            bytes_field(6, option(b"x-down", b"1")),
        ]
    )
    verdict = Authorizer(GRPC).verdict(200, [], framed(bytes_field(1, b"") + bytes_field(3, edits)), OK)
    assert isinstance(verdict, Allowed)
    asked = Request(b"GET", b"/", b"a", [(b"x-user", b"forged"), (b"x-role", b"a"), (b"x-gone", b"1")])
    verdict.apply(asked)
    assert asked.headers == [(b"x-role", b"a"), (b"x-user", b"alice"), (b"x-role", b"b")]
    assert verdict.respond == [(b"x-down", b"1")]


def test_grpc_denies() -> None:
    denied = bytes_field(1, int_field(1, 401)) + bytes_field(2, option(b"www-authenticate", b"x")) + bytes_field(3, b"no")
    message = bytes_field(1, int_field(1, 16)) + bytes_field(2, denied)
    verdict = Authorizer(GRPC).verdict(200, [], framed(message), OK)
    assert isinstance(verdict, LocalReply)
    assert (verdict.status, verdict.body, verdict.headers) == (401, b"no", [(b"www-authenticate", b"x")])
    bare = Authorizer(GRPC).verdict(200, [], framed(bytes_field(1, int_field(1, 7))), OK)
    assert isinstance(bare, LocalReply)
    assert (bare.status, bare.details) == (403, "ext_authz_denied")


@pytest.mark.parametrize(
    ("status", "body", "trailers"),
    [
        (200, b"", OK),
        (200, framed(b"") + b"x", OK),
        (200, framed(b"\xff"), OK),
        (200, b"\1" + framed(b"")[1:], OK),
        (200, framed(b""), [(b"grpc-status", b"14")]),
        (200, framed(b""), []),
        (503, framed(b""), OK),
        (200, framed(bytes_field(3, bytes_field(2, option(b"a b", b"x")))), OK),
        (200, framed(bytes_field(3, bytes_field(2, option(b"a", b"x\r\ny: z")))), OK),
    ],
)
def test_a_grpc_answer_that_is_none_is_an_error(status: int, body: bytes, trailers: Headers) -> None:
    verdict = Authorizer(GRPC).verdict(status, [], body, trailers)
    assert isinstance(verdict, LocalReply)
    assert verdict.details == "ext_authz_error"


@given(st.binary(max_size=60))
def test_any_answer_is_a_verdict(body: bytes) -> None:
    assert isinstance(Authorizer(GRPC).verdict(200, [], framed(body), OK), Allowed | LocalReply)
