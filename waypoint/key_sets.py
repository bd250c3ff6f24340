"""Issuers' keys from where they publish them: fetched in the supervisor, handed to the workers, refreshed for as long as somebody asks.

A set that was fetched once stays in force while its source fails; without one, every token of that issuer is refused. A source ending in
`/.well-known/openid-configuration` is asked where its keys are first. Trio shell; what makes a key set is `http.jws`.
Source: Istio `pilot/pkg/model/jwks_resolver.go` (every 20 minutes, a minute after a failure).
"""

from __future__ import annotations

import logging
import random
import ssl
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable
from contextlib import aclosing
from typing import Final
from urllib.parse import urljoin, urlsplit

import httpcore2
import msgspec
import trio

from waypoint.http.jws import read_key_set
from waypoint.http.jwt import key_set_source
from ztunnel.mesh.l7.security import JwtRule

log = logging.getLogger("waypoint.key_sets")

REFRESH: Final = 20 * 60.0
RETRY: Final = 60.0
JITTER: Final = 0.1
"""Share of a pause, so that replicas do not come all at once."""
MAX_BYTES: Final = 1 << 20
MAX_SOURCES: Final = 256
MAX_REDIRECTS: Final = 3
DISCOVERY: Final = "/.well-known/openid-configuration"

_REDIRECTS: Final = (301, 302, 303, 307, 308)
_FAILURES: Final = (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.TimeoutException, httpcore2.UnsupportedProtocol)

Fetch = Callable[[str, float], Awaitable[bytes]]
"""The body behind a URI, within so many seconds; raises FetchError."""
Deliver = Callable[[str, str], None]
"""(source, JWK set as text)."""


class FetchError(Exception):
    """A source gave no key set; the text says why."""


class KeySetFetcher:
    """Keeps the key sets of all wanted sources fresh. `run` once, `want` whenever the configuration changes."""

    def __init__(self, deliver: Deliver, fetch: Fetch | None = None) -> None:
        """
        Args:
            deliver: called with every set that differs from the last of its source.
        """
        self._deliver = deliver
        self._fetch = fetch or fetch_uri
        self._wanted: dict[str, float] = {}
        self._changed = trio.Event()
        self.known: dict[str, str] = {}
        """Sets that are in force, by source: for a worker that starts."""
        self.failures: dict[str, str] = {}
        """Sources whose last fetch failed, and why."""

    def want(self, rules: Iterable[JwtRule]) -> None:
        """Which rules there are now. Their sources are fetched at once if they are new; others are forgotten."""
        sources = {key_set_source(rule): rule.timeout for rule in rules}
        sources.pop("", None)
        if len(sources) > MAX_SOURCES:
            log.warning("more sources of keys than %d: some issuers' tokens will be refused", MAX_SOURCES)
            sources = dict(list(sources.items())[:MAX_SOURCES])
        self._wanted = sources
        for gone in [each for each in self.known if each not in sources]:
            del self.known[gone]
        self._changed.set()

    async def run(self) -> None:
        """Until cancelled."""
        running: dict[str, trio.CancelScope] = {}
        async with trio.open_nursery() as nursery:
            while True:
                self._changed = trio.Event()
                for source in [each for each in running if each not in self._wanted]:
                    running.pop(source).cancel()
                    self.failures.pop(source, None)
                for source in self._wanted:
                    if source not in running:
                        running[source] = trio.CancelScope()
                        nursery.start_soon(self._keep, source, running[source])
                await self._changed.wait()

    async def _keep(self, source: str, scope: trio.CancelScope) -> None:
        with scope:
            while True:
                pause = REFRESH
                try:
                    text = await self._once(source)
                except FetchError as error:
                    pause = RETRY
                    self._failed(source, str(error))
                else:
                    self.failures.pop(source, None)
                    if self.known.get(source) != text:
                        self.known[source] = text
                        self._deliver(source, text)
                await trio.sleep(pause * random.uniform(1 - JITTER, 1 + JITTER))

    def _failed(self, source: str, why: str) -> None:
        if self.failures.get(source) != why:
            held = "the last ones stay in force" if source in self.known else "tokens of this issuer are refused"
            log.warning("no keys from %s: %s; %s", source, why, held)
        self.failures[source] = why

    async def _once(self, source: str) -> str:
        timeout = self._wanted.get(source, 5.0)
        uri = source
        if source.endswith(DISCOVERY):
            uri = jwks_uri_of(await self._fetch(source, timeout))
        body = await self._fetch(uri, timeout)
        try:
            read_key_set(body)
            return body.decode()
        except ValueError as error:
            raise FetchError(str(error)) from error


def jwks_uri_of(document: bytes) -> str:
    """Where an OpenID provider's keys are, by its configuration.

    Raises:
        FetchError: it does not say.
    """
    try:
        value = msgspec.json.decode(document)
    except (ValueError, RecursionError) as error:
        raise FetchError("the OpenID configuration is not JSON") from error
    uri = value.get("jwks_uri") if isinstance(value, dict) else None
    if not isinstance(uri, str) or urlsplit(uri).scheme not in ("http", "https"):
        raise FetchError("the OpenID configuration has no jwks_uri of http or https")
    return uri


async def fetch_uri(uri: str, seconds: float) -> bytes:
    """The body behind a URI: over TLS trusting the system's roots, a few redirects followed, never more than `MAX_BYTES`.

    Raises:
        FetchError: no answer in time, another status than 200, too large, not trusted.
    """
    try:
        with trio.fail_after(seconds):
            async with httpcore2.AsyncConnectionPool(ssl_context=ssl.create_default_context(), max_connections=1) as pool:
                for _ in range(MAX_REDIRECTS + 1):
                    status, location, body = await _get(pool, uri)
                    if status == 200:
                        return body
                    if status not in _REDIRECTS or not location:
                        raise FetchError(f"status {status}")
                    uri = urljoin(uri, location)
    except trio.TooSlowError as error:
        raise FetchError(f"no answer within {seconds:g} s") from error
    except (*_FAILURES, ssl.SSLError, OSError, ValueError) as error:
        raise FetchError(str(error) or type(error).__name__) from error
    raise FetchError(f"more than {MAX_REDIRECTS} redirects")


async def _get(pool: httpcore2.AsyncConnectionPool, uri: str) -> tuple[int, str, bytes]:
    """Status, where it sends us, and the body if it is what was asked for."""
    body = bytearray()
    headers = [("Host", urlsplit(uri).netloc.rpartition("@")[2]), ("Accept", "application/json"), ("User-Agent", "waypoint")]
    async with pool.stream("GET", uri, headers=headers) as response:
        location = next((value.decode("latin-1") for name, value in response.headers if name.lower() == b"location"), "")
        if response.status == 200:
            assert isinstance(response.stream, AsyncIterable)
            # Its generator is closed with ours: what is left to the garbage collector would be closed by trio, with a warning.
            async with aclosing(aiter(response.stream)) as stream:  # type: ignore[type-var]  # it is a generator
                async for chunk in stream:
                    body += chunk
                    if len(body) > MAX_BYTES:
                        raise FetchError(f"more than {MAX_BYTES} bytes")
        return response.status, location, bytes(body)
