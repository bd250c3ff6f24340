"""Issuers' keys: fetched, refreshed, kept while a source fails, forgotten when nobody asks."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import trio
import trio.testing

from tests.kit.tokens import jwks
from waypoint.key_sets import MAX_BYTES, FetchError, KeySetFetcher, fetch_uri, jwks_uri_of
from ztunnel.mesh.l7.security import JwtRule
from ztunnel.runtime.http import HttpServer, Request, Response

RULE = JwtRule("i", jwks_uri="https://keys")


class Issuer:
    """A fake of what is behind URIs."""

    def __init__(self, answers: dict[str, str]) -> None:
        self.answers = answers
        self.asked: list[tuple[str, float]] = []

    async def fetch(self, uri: str, seconds: float) -> bytes:
        self.asked.append((uri, trio.current_time()))
        await trio.lowlevel.checkpoint()
        if uri not in self.answers:
            raise FetchError("status 500")
        return self.answers[uri].encode()


async def eventually(holds: Callable[[], bool]) -> None:
    """On a clock that jumps: an hour is nothing."""
    with trio.fail_after(3600):
        while not holds():  # noqa: ASYNC110 - what is waited for is not ours to signal
            await trio.sleep(1)


async def test_keys_are_fetched_refreshed_and_kept_while_the_source_fails(mock_clock: trio.testing.MockClock) -> None:
    issuer, delivered = Issuer({"https://keys": jwks()}), []
    fetcher = KeySetFetcher(lambda source, text: delivered.append((source, text)), issuer.fetch)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fetcher.run)
        fetcher.want([RULE, JwtRule("inline", jwks=jwks())])
        await eventually(lambda: bool(delivered))
        assert delivered == [("https://keys", jwks())]
        del issuer.answers["https://keys"]
        await eventually(lambda: len(issuer.asked) >= 3)
        (_, first), (_, second), (_, third) = issuer.asked[:3]
        assert 18 * 60 <= second - first <= 22 * 60
        assert 54 <= third - second <= 66
        assert fetcher.failures == {"https://keys": "status 500"}
        assert fetcher.known == {"https://keys": jwks()}
        issuer.answers["https://keys"] = jwks("HS256")
        await eventually(lambda: len(delivered) == 2)
        assert fetcher.failures == {}
        fetcher.want([])
        await eventually(lambda: not fetcher.known)
        count = len(issuer.asked)
        await trio.sleep(3000)
        assert len(issuer.asked) == count
        nursery.cancel_scope.cancel()


async def test_a_provider_is_asked_where_its_keys_are(mock_clock: trio.testing.MockClock) -> None:
    discovery = "https://i/.well-known/openid-configuration"
    issuer = Issuer({discovery: json.dumps({"jwks_uri": "https://i/keys"}), "https://i/keys": jwks()})
    fetcher = KeySetFetcher(lambda source, text: None, issuer.fetch)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fetcher.run)
        fetcher.want([JwtRule("https://i/")])
        await eventually(lambda: fetcher.known == {discovery: jwks()})
        nursery.cancel_scope.cancel()


async def test_what_is_no_key_set_is_a_failure(mock_clock: trio.testing.MockClock) -> None:
    fetcher = KeySetFetcher(lambda source, text: None, Issuer({"https://keys": '{"keys": []}'}).fetch)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fetcher.run)
        fetcher.want([RULE])
        await eventually(lambda: bool(fetcher.failures))
        assert fetcher.failures["https://keys"].startswith("Jwks does not have any key")
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("document", [b"", b"[]", b"{}", b'{"jwks_uri": 5}', b'{"jwks_uri": "file:///etc/passwd"}'])
def test_configurations_without_keys(document: bytes) -> None:
    with pytest.raises(FetchError, match="OpenID configuration"):
        jwks_uri_of(document)


async def published(request: Request) -> Response:
    match request.path:
        case "/keys":
            return Response(200, b"the keys")
        case "/moved":
            return Response(302, headers=(("location", "/keys"),))
        case "/circle":
            return Response(302, headers=(("location", "/circle"),))
        case "/huge":
            return Response(200, b"x" * (MAX_BYTES + 1))
        case "/slow":
            await trio.sleep_forever()
    return Response(404)


async def test_bodies_are_fetched_within_bounds() -> None:
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
            port = listeners[0].socket.getsockname()[1]
            nursery.start_soon(trio.serve_listeners, HttpServer(published).serve, listeners)
            root = f"http://127.0.0.1:{port}"
            assert await fetch_uri(f"{root}/keys", 30) == b"the keys"
            assert await fetch_uri(f"{root}/moved", 30) == b"the keys"
            wrong = {"/none": "status 404", "/circle": "redirects", "/huge": "more than 1048576 bytes"}
            for path, reason in wrong.items():
                with pytest.raises(FetchError, match=reason):
                    await fetch_uri(root + path, 30)
            with pytest.raises(FetchError, match=r"no answer within 0\.05 s"):
                await fetch_uri(f"{root}/slow", 0.05)
            nursery.cancel_scope.cancel()
    with pytest.raises(FetchError):
        await fetch_uri(f"http://127.0.0.1:{port}/keys", 30)
    with pytest.raises(FetchError):
        await fetch_uri("http://[bad/keys", 30)
