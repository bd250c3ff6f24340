"""Where redirects lead: scheme, host, port and path, by Gateway API's, Istio's and Envoy's rules."""

from __future__ import annotations

import pytest

from tests.kit.l7 import client, request
from waypoint.http.authority import split_authority
from waypoint.http.redirects import CompiledRedirect
from ztunnel.mesh.l7.routes import PathKind, PathMatch, Redirect

FOO = PathMatch(PathKind.SEGMENTS, "/foo")


@pytest.mark.parametrize(
    ("redirect", "authority", "port", "path", "location"),
    [
        (Redirect(), "a:9080", 9080, "/foo?q=1", "http://a:9080/foo?q=1"),
        (Redirect(authority="b"), "a", 80, "/foo", "http://b/foo"),
        (Redirect(authority="b"), "a", 8080, "/foo", "http://b:8080/foo"),
        (Redirect(authority="b:99"), "a", 8080, "/foo", "http://b:99/foo"),
        (Redirect(port=8443), "a", 80, "/", "http://a:8443/"),
        (Redirect(port=80), "a", 8080, "/", "http://a/"),
        (Redirect(scheme="https"), "a:8080", 8080, "/", "https://a/"),
        (Redirect(scheme="https", port=443), "a", 80, "/", "https://a/"),
        (Redirect(scheme="https", port=80), "a", 80, "/", "https://a:80/"),
        (Redirect(derive_port="FROM_PROTOCOL_DEFAULT"), "a:8080", 8080, "/", "http://a/"),
        (Redirect(derive_port="FROM_REQUEST_PORT", authority="b"), "a", 8080, "/", "http://b:8080/"),
        (Redirect(derive_port="FROM_REQUEST_PORT", authority="b"), "a", 80, "/", "http://b/"),
        (Redirect(derive_port="FROM_HOST"), "a", 8080, "/", "http://a/"),
        (Redirect(derive_port="FROM_HOST"), "a:8081", 8080, "/", "http://a:8081/"),
        (Redirect(derive_port="FROM_HOST", authority="b"), "a:8081", 8080, "/", "http://b/"),
        (Redirect(derive_port="FROM_HOST", scheme="https"), "a:80", 80, "/", "https://a/"),
        (Redirect(derive_port="FROM_HOST", scheme="https"), "a:81", 81, "/", "https://a:81/"),
        (Redirect(path="/new"), "a", 80, "/foo/x?q=1", "http://a/new?q=1"),
        (Redirect(path="/new?z=2"), "a", 80, "/foo/x?q=1", "http://a/new?z=2"),
        (Redirect(prefix="/bar"), "a", 80, "/foo/x?q=1", "http://a/bar/x?q=1"),
        (Redirect(prefix="/"), "a", 80, "/foo", "http://a/"),
        (Redirect(), "[fd00::1]:8080", 8080, "/", "http://[fd00::1]:8080/"),
    ],
)
def test_location(redirect: Redirect, authority: str, port: int, path: str, location: str) -> None:
    reply = CompiledRedirect(redirect, FOO).answer(request(path, authority=authority), client(port=port))
    assert (reply.status, reply.headers) == (302, [(b"location", location.encode())])


def test_status() -> None:
    assert CompiledRedirect(Redirect(status=301), None).answer(request(), client()).status == 301


@pytest.mark.parametrize(
    ("authority", "parts"),
    [
        (b"a", (b"a", 0)), (b"a:80", (b"a", 80)), (b"a:", (b"a:", 0)), (b"a:x", (b"a:x", 0)), (b"[::1]", (b"[::1]", 0)),
        (b"[::1]:80", (b"[::1]", 80)), (b"::1", (b"::1", 0)), (b"a:123456", (b"a:123456", 0)), (b"", (b"", 0)),
    ],
)  # fmt: skip
def test_authorities(authority: bytes, parts: tuple[bytes, int]) -> None:
    assert split_authority(authority) == parts
