"""Cross-origin requests: who is answered, with what, and what is left to the application."""

from __future__ import annotations

import pytest

from tests.kit.l7 import exact, regex, request
from waypoint.http.cors import CompiledCors, CorsAllowed
from waypoint.http.messages import Headers, LocalReply, Request
from ztunnel.mesh.l7.routes import Cors, TextKind, TextMatch

SHOP = Cors(
    origins=(exact("https://shop.example"), regex("https://[a-z]+\\.test"), TextMatch(TextKind.PREFIX, "http://local")),
    methods=("GET", "PUT"),
    headers=("x-a", "x-b"),
    expose=("x-c",),
    max_age=86400.0,
    credentials=True,
)


def preflight(origin: str = "https://shop.example", method: str = "PUT", asked: str = "x-z") -> Request:
    made = request(method="OPTIONS", origin=origin, access_control_request_method=method)
    if asked:
        made.headers.append((b"access-control-request-headers", asked.encode()))
    return made


def answered(cors: Cors, asked: Request) -> dict[str, str] | None:
    reply = CompiledCors(cors).check(asked)
    if not isinstance(reply, LocalReply):
        return None
    assert (reply.status, reply.body, reply.flag) == (200, b"", "")
    return {name.decode().removeprefix("access-control-"): value.decode() for name, value in reply.headers}


def test_a_preflight_is_answered() -> None:
    assert answered(SHOP, preflight()) == {
        "allow-origin": "https://shop.example",
        "allow-credentials": "true",
        "allow-methods": "GET,PUT",
        "allow-headers": "x-a,x-b",
        "max-age": "86400",
    }


@pytest.mark.parametrize("asked", ["x-z", ""])
def test_stars_echo(asked: str) -> None:
    echo = Cors(origins=(exact("*"),), methods=("*",), headers=("*",))
    expected = {"allow-origin": "https://any", "allow-methods": "DELETE"}
    if asked:
        expected["allow-headers"] = asked
    assert answered(echo, preflight("https://any", "DELETE", asked)) == expected


def test_a_policy_of_origins_alone() -> None:
    assert answered(Cors(origins=(exact("*"),)), preflight("https://any")) == {"allow-origin": "https://any"}


def test_preflights_of_others() -> None:
    assert answered(SHOP, preflight("https://evil.example")) is None
    assert CompiledCors(SHOP).check(preflight("https://evil.example")) is None  # goes on to the application
    ignoring = Cors(origins=SHOP.origins, forward_unmatched_preflights=False)
    assert answered(ignoring, preflight("https://evil.example")) == {}


@pytest.mark.parametrize(
    ("asked", "allowed"),
    [
        (request(origin="https://shop.example"), True),
        (request(origin="https://abc.test"), True),
        (request(origin="https://abc.test.evil"), False),
        (request(origin="http://localhost:8080"), True),
        (request(origin="https://evil.example"), False),
        (request(), False),
        # OPTIONS without the question is no preflight
        (request(method="OPTIONS", origin="https://shop.example"), True),
        (request(method="OPTIONS", origin="https://shop.example", access_control_request_method=""), True),
        (request(method="GET", origin="https://shop.example", access_control_request_method="PUT"), True),
    ],
)
def test_simple_requests(asked: Request, allowed: bool) -> None:
    assert isinstance(CompiledCors(SHOP).check(asked), CorsAllowed) is allowed


def test_responses_are_decorated() -> None:
    allowed = CorsAllowed(b"https://shop.example")
    headers: Headers = [
        (b"x", b"1"),
        (b"access-control-allow-origin", b"*"),
        (b"access-control-allow-credentials", b"no"),
        (b"access-control-expose-headers", b"y"),
    ]
    bare = list(headers)
    CompiledCors(SHOP).decorate(headers, allowed)
    assert headers == [
        (b"x", b"1"),
        (b"access-control-allow-origin", b"https://shop.example"),
        (b"access-control-allow-credentials", b"true"),
        (b"access-control-expose-headers", b"x-c"),
    ]
    CompiledCors(Cors()).decorate(bare, allowed)
    assert bare == [headers[0], (b"access-control-allow-credentials", b"no"), (b"access-control-expose-headers", b"y"), headers[1]]
