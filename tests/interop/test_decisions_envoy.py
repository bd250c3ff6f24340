"""Envoy as the oracle of decisions: how a path is normalised, and what is said of a token."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from tests.kit import envoy
from tests.kit.tokens import b64, jwks, sign
from waypoint.http.jwt import JwtGate, KeySets
from waypoint.http.messages import LocalReply, Request
from waypoint.http.paths import normalize
from ztunnel.mesh.l7.config import PathNormalization
from ztunnel.mesh.l7.security import JwtAuthentication, JwtRule

_MANAGER = "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
_ROUTER = "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"
_JWT = "type.googleapis.com/envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication"
KEYS = jwks("ES256", "RS256")
OPTIONS: dict[PathNormalization, dict[str, object]] = {
    PathNormalization.BASE: {"normalize_path": True},
    PathNormalization.MERGE_SLASHES: {"normalize_path": True, "merge_slashes": True},
    PathNormalization.DECODE_AND_MERGE_SLASHES: {
        "normalize_path": True,
        "merge_slashes": True,
        "path_with_escaped_slashes_action": "UNESCAPE_AND_FORWARD",
    },
}
"""As Istio's control plane writes them."""


def listener(name: str, filters: list[object] | None = None, **options: object) -> envoy.Json:
    """Answers 200 and says in a header which path it saw."""
    said = {"append_action": "OVERWRITE_IF_EXISTS_OR_ADD", "header": {"key": "x-path", "value": "%REQ(:PATH)%"}}
    route = {"match": {"prefix": "/"}, "direct_response": {"status": 200}, "response_headers_to_add": [said]}
    manager = {
        "@type": _MANAGER,
        "stat_prefix": name,
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
        "http_filters": [*(filters or []), {"name": "router", "typed_config": {"@type": _ROUTER}}],
        **options,
    }
    return {
        "name": name,
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": 0}},
        "filter_chains": [{"filters": [{"name": "http", "typed_config": manager}]}],
    }


def jwt_filter() -> envoy.Json:
    """As Istio writes one RequestAuthentication: the rule, or no token."""
    provider = {"issuer": "i", "local_jwks": {"inline_string": KEYS}, "audiences": ["shop"], "clock_skew_seconds": 60}
    any_of = {"requires_any": {"requirements": [{"provider_name": "p"}, {"allow_missing": {}}]}}
    return {
        "name": "jwt",
        "typed_config": {"@type": _JWT, "providers": {"p": provider}, "rules": [{"match": {"prefix": "/"}, "requires": any_of}]},
    }


@dataclass(frozen=True, slots=True)
class Oracle:
    """A running Envoy, and the ports of its listeners."""

    ports: dict[str, int]

    def ask(self, name: str, path: bytes, *lines: bytes) -> tuple[int, dict[bytes, bytes], bytes]:
        """Status, headers and body."""
        with socket.create_connection(("127.0.0.1", self.ports[name]), timeout=30) as connection:
            head = b"\r\n".join([b"GET " + path + b" HTTP/1.1", b"host: shop", b"connection: close", *lines])
            connection.sendall(head + b"\r\n\r\n")
            answer = b""
            # Not until it closes: Envoy lingers for a second.
            while (data := connection.recv(65536)) and not _is_whole(answer := answer + data):
                pass
        head, _, body = answer.partition(b"\r\n\r\n")
        return int(head.split()[1]), _headers(head), body


def _headers(head: bytes) -> dict[bytes, bytes]:
    return {line.partition(b": ")[0].lower(): line.partition(b": ")[2] for line in head.split(b"\r\n")[1:]}


def _is_whole(answer: bytes) -> bool:
    head, mark, body = answer.partition(b"\r\n\r\n")
    return bool(mark) and len(body) >= int(_headers(head).get(b"content-length", b"0"))


@pytest.fixture(scope="module", name="oracle")
def fixture_oracle() -> Iterator[Oracle]:
    listeners = [listener(how.value, None, **options) for how, options in OPTIONS.items()]
    listeners.append(listener("jwt", [jwt_filter()]))
    with envoy.running({"static_resources": {"listeners": listeners}}) as running:
        yield Oracle({str(each["name"]): running.port(str(each["name"])) for each in listeners})


PATHS = [
    b"/",
    b"/a/b?x=1",
    b"/%61%2Db",
    b"/a%2561",
    b"/a/./b/../c",
    b"/a/%2e%2E/b",
    b"/../../a",
    b"/a/..",
    b"/a/.",
    b"/a/.hidden",
    b"/a/..b",
    b"/a\\b",
    b"//a///b",
    b"/a//../b",
    b"/a%2Fb%5cc",
    b"/a%2F..%2Fb",
    b"/a%2F%2fb",
    b"/a%5C..%5Cb",
    b"/a?x=/../%2e//",
    b"/a%00b",
    b"/a;b=c/d,e",
    b"/~user/%7euser/%7Euser",
    b"/a%20b",
    b"/a%zz",
    b"/a%4",
    b"/a|b",
    b"/a^b",
    b"/a[b]",
    b'/a"b',
    b"/a<b>",
    b"/a{b}",
    b"/a`b",
    b"/caf\xc3\xa9",
]


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize("how", OPTIONS, ids=lambda how: how.value)
def test_paths_are_normalised_as_envoy_does_it(oracle: Oracle, how: PathNormalization, path: bytes) -> None:
    status, headers, _ = oracle.ask(how.value, path)
    theirs = headers[b"x-path"] if status == 200 else None
    assert normalize(path, how) == theirs


def changed(algorithm: str = "ES256", **more: object) -> bytes:
    """A good token of this moment with other claims; those that begin with `in_` are seconds from now."""
    now = int(time.time())
    times = {name.removeprefix("in_"): now + value for name, value in more.items() if isinstance(value, int)}
    others = {name: value for name, value in more.items() if not isinstance(value, int)}
    payload = {"iss": "i", "sub": "alice", "aud": "shop", "exp": now + 3600, **others, **times}
    return sign({key: value for key, value in payload.items() if value is not None}, algorithm)


HEADER = b64(json.dumps({"alg": "ES256"}).encode()).encode()
TOKENS: dict[str, Callable[[], bytes]] = {
    "good": changed,
    "good RS256": lambda: changed("RS256"),
    "no expiry": lambda: changed(exp=None),
    "expired": lambda: changed(in_exp=-3600),
    "expired within the skew": lambda: changed(in_exp=-10),
    "not yet": lambda: changed(in_nbf=3600),
    "other issuer": lambda: changed(iss="j"),
    "no issuer": lambda: changed(iss=None),
    "other audience": lambda: changed(aud="cart"),
    "one of several audiences": lambda: changed(aud=["cart", "shop"]),
    "no audience": lambda: changed(aud=None),
    "other algorithm": lambda: changed("HS256"),
    "forged": lambda: changed()[:-8] + b"AAAAAAAA",
    "two sections": lambda: b"a.b",
    "rubbish": lambda: b"rubbish",
    "four sections": lambda: b"a.b.c.d",
    "header is no JSON": lambda: b64(b"x").encode() + b".e30.AAAA",
    "algorithm none": lambda: b64(b'{"alg":"none"}').encode() + b".e30.AAAA",
    "payload is no JSON": lambda: HEADER + b"." + b64(b"x").encode() + b".AAAA",
}


@pytest.mark.parametrize("name", [*TOKENS, "none at all"])
def test_tokens_are_answered_as_envoy_does_it(oracle: Oracle, name: str) -> None:
    token = TOKENS[name]() if name in TOKENS else None
    lines = [] if token is None else [b"authorization: Bearer " + token]
    status, headers, body = oracle.ask("jwt", b"/", *lines)
    gate = JwtGate([JwtAuthentication("x", "default", (JwtRule("i", ("shop",), KEYS),))], KeySets())
    ours = gate.check(Request(b"GET", b"/", b"shop", [] if token is None else [(b"authorization", b"Bearer " + token)]), time.time())
    if status == 200:
        assert not isinstance(ours, LocalReply), ours
        return
    assert isinstance(ours, LocalReply)
    assert (ours.status, ours.body) == (status, body)
    assert dict(ours.headers)[b"www-authenticate"] == headers[b"www-authenticate"]
