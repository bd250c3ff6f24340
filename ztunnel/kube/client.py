"""Requests to one API server: get, list, watch, create, patch, delete, on httpcore2 over trio.

Every answer is bounded in size and time. What is refused is a typed error whose text names what was asked for (`kube.errors`).
Credentials that the server does not take are read anew and tried once more, so that a token that was rotated costs a round trip.
Nothing else is retried here: whether to try again is the caller's to say.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from time import time
from types import TracebackType
from urllib.parse import unquote, urlencode, urlsplit

import httpcore2
import msgspec
import trio

import ztunnel
from ztunnel.kube.config import Access
from ztunnel.kube.credentials import Login
from ztunnel.kube.errors import ApiRefused, BadAnswer, Unauthorized, Unreachable, refused
from ztunnel.kube.resources import Resource

Json = dict[str, object]

JSON = "application/json"
MERGE_PATCH = "application/merge-patch+json"
APPLY_PATCH = "application/apply-patch+yaml"
_CLOSE_SECONDS = 1.0
_LONGEST_CHAIN = 8
_MOST_CONNECTIONS = 128
"""One for the watch of each kind, and as many requests again."""
_IDLE_CONNECTIONS = 8
_IDLE_SECONDS = 60.0
_FAILURES = (
    httpcore2.NetworkError,
    httpcore2.TimeoutException,
    httpcore2.ProtocolError,
    httpcore2.ProxyError,
    httpcore2.UnsupportedProtocol,
    httpcore2.ConnectionNotAvailable,
    OSError,
)
_LONGEST_WAIT = 600.0
"""Seconds; a server that says Retry-After a year is not believed."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What an API server may make us hold or wait for."""

    answer_bytes: int = 256 << 20
    """One whole answer. A page of 500 objects is a few megabytes; the bound is for servers that give no pages."""
    error_bytes: int = 64 << 10
    """Of an answer that refuses; the rest is not read."""
    line_bytes: int = 8 << 20
    """One event of a watch. etcd takes objects of 1.5 MB; JSON makes them somewhat larger."""
    connect_seconds: float = 10.0
    answer_seconds: float = 60.0
    """For a whole answer that is not a watch."""


@dataclass(frozen=True, slots=True)
class _Call:
    """One request, and in `what` the words for it."""

    verb: str
    method: str
    path: str
    what: str
    body: object = None
    params: Mapping[str, str] | None = None
    content_type: str = JSON
    read_seconds: float | None = None


@asynccontextmanager
async def closing(client: KubeClient | None) -> AsyncIterator[None]:
    """Closes a client at the end, if there is one."""
    if client is None:
        yield
    else:
        async with client:
            yield


class KubeClient:
    """Asks one API server. One for the whole program: it keeps connections.

    An async context manager, which closes the connections at its end.

    Args:
        access: where and who.
        program: for the server's audit log.
    """

    def __init__(self, access: Access, bounds: Bounds = Bounds(), program: str = "ztunnel") -> None:
        self.access = access
        self._bounds = bounds
        self._headers = [("User-Agent", f"{program}/{ztunnel.__version__}"), ("Accept", JSON), *access.headers]
        # Not compressed: the way is short, and a bound on what is unpacked is one more thing to get wrong.
        self._headers.append(("Accept-Encoding", "identity"))
        self._http: httpcore2.AsyncConnectionPool | None = None
        self._made_for: tuple[bytes, bytes, bytes] | None = None
        self._retired: list[httpcore2.AsyncConnectionPool] = []
        """Connections of former certificates; watches may still go on in them."""
        self.requests: dict[tuple[str, int], int] = {}
        """How many requests there were, by verb and status; 0 for those without an answer. For metrics."""

    async def __aenter__(self) -> KubeClient:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with trio.CancelScope(shield=True), trio.move_on_after(_CLOSE_SECONDS):
            for each in (self._http, *self._retired):
                if each is not None:
                    await each.aclose()

    # --------------------------------------------------------------------------------------------------------- requests

    async def get(self, resource: Resource, name: str, namespace: str = "") -> Json:
        """One object.

        Raises:
            KubeError: see `kube.errors`; so for every method here.
        """
        return await self._ask(_Call("get", "GET", resource.path(namespace, name), resource.words("get")))

    async def list(self, resource: Resource, namespace: str = "", params: Mapping[str, str] | None = None) -> Json:
        """One page of a collection, or all of it."""
        return await self._ask(_Call("list", "GET", resource.path(namespace), resource.words("list"), params=params))

    async def create(
        self, resource: Resource, body: Mapping[str, object], namespace: str = "", *, name: str = "", subresource: str = ""
    ) -> Json:
        """Create an object, or what a subresource of an object makes (a token)."""
        path = resource.path(namespace, name, subresource)
        return await self._ask(_Call("create", "POST", path, resource.words("create", subresource), body))

    async def update(
        self, resource: Resource, body: Mapping[str, object], name: str, namespace: str = "", *, subresource: str = ""
    ) -> Json:
        """Replace an object; with the resourceVersion that the body names, only if nobody changed it since (Conflict)."""
        path = resource.path(namespace, name, subresource)
        return await self._ask(_Call("update", "PUT", path, resource.words("update", subresource), body))

    async def patch(
        self,
        resource: Resource,
        body: object,
        name: str,
        namespace: str = "",
        *,
        subresource: str = "",
        content_type: str = MERGE_PATCH,
        params: Mapping[str, str] | None = None,
    ) -> Json:
        """Change an object."""
        path = resource.path(namespace, name, subresource)
        words = resource.words("patch", subresource)
        return await self._ask(_Call("patch", "PATCH", path, words, body, params=params, content_type=content_type))

    async def apply(self, resource: Resource, body: Mapping[str, object], name: str, namespace: str = "", *, manager: str) -> Json:
        """Server-side apply: make the fields that the body has as it says, and take them from whoever had them."""
        params = {"fieldManager": manager, "force": "true"}
        return await self.patch(resource, body, name, namespace, content_type=APPLY_PATCH, params=params)

    async def delete(self, resource: Resource, name: str, namespace: str = "", uid: str = "") -> Json:
        """Delete an object, with a UID only that one (Conflict); what it owns goes in the background."""
        path = resource.path(namespace, name)
        body: Json = {"propagationPolicy": "Background", **({"preconditions": {"uid": uid}} if uid else {})}
        return await self._ask(_Call("delete", "DELETE", path, resource.words("delete"), body))

    async def raw(self, path: str, what: str) -> Json:
        """Any other path, e.g. `/apis`.

        Args:
            what: for errors, as "find out what is served".
        """
        return await self._ask(_Call("get", "GET", path, what))

    @asynccontextmanager
    async def watch(
        self, resource: Resource, params: Mapping[str, str], namespace: str = "", *, idle_seconds: float
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """The lines of a watch, until the server ends it.

        Args:
            params: further ones than `watch`.
            idle_seconds: silence after which the watch is given up as stalled.
        Raises:
            KubeError: at the start or while iterating. A line that is cut off is not given: that is a `BadAnswer`.
        """
        words = resource.words("watch")
        call = _Call("watch", "GET", resource.path(namespace), words, params={**params, "watch": "true"}, read_seconds=idle_seconds)
        with _deadline(self._bounds.answer_seconds, words):
            response = await self._send(call)
        try:
            async with aclosing(self._lines(response, words)) as lines:
                yield lines
        finally:
            await _close(response)

    # --------------------------------------------------------------------------------------------------------- carrying

    async def _ask(self, call: _Call) -> Json:
        with _deadline(self._bounds.answer_seconds, call.what):
            response = await self._send(call)
            try:
                content = await _whole(response, self._bounds.answer_bytes, call.what)
            except _FAILURES as error:
                raise self._unreachable(call.what, error) from error
            finally:
                await _close(response)
        return decoded(content, call.what)

    async def _send(self, call: _Call) -> httpcore2.Response:
        """An answer that is no refusal, with its body still to be read. The caller closes it."""
        attempt = 1
        while True:
            response = await self._send_once(call)
            if response.status < 300:
                return response
            try:
                error = await _refusal(response, call.what, self._bounds.error_bytes)
            except _FAILURES as broken:
                raise self._unreachable(call.what, broken) from broken
            finally:
                await _close(response)
            if attempt == 2 or not isinstance(error, Unauthorized):
                raise error
            self.access.credentials.refused()
            attempt += 1

    async def _send_once(self, call: _Call) -> httpcore2.Response:
        login = await self.access.credentials.login()
        http = await self._client(login)
        content = b"" if call.body is None else msgspec.json.encode(call.body)
        headers = [("Host", urlsplit(self.access.server).netloc), *self._headers, ("Content-Length", str(len(content)))]
        if content:
            headers.append(("Content-Type", call.content_type))
        if login.authorization:
            headers.append(("Authorization", login.authorization))
        url = self.access.server + call.path + ("?" + urlencode(call.params) if call.params else "")
        bounds = self._bounds
        timeouts = dict.fromkeys(("write", "pool", "read"), bounds.answer_seconds) | {"connect": bounds.connect_seconds}
        if call.read_seconds is not None:
            timeouts["read"] = call.read_seconds
        extensions: dict[str, object] = {"timeout": timeouts}
        if self.access.server_name:
            extensions["sni_hostname"] = self.access.server_name
        request = httpcore2.Request(call.method, url, headers=headers, content=content, extensions=extensions)
        try:
            response = await http.handle_async_request(request)
        except _FAILURES as error:
            self._count(call.verb, 0)
            raise self._unreachable(call.what, error) from error
        self._count(call.verb, response.status)
        return response

    async def _client(self, login: Login) -> httpcore2.AsyncConnectionPool:
        """One for the present certificates: the login's, and the authority's."""
        wanted = (login.certificate_pem, login.key_pem, self.access.authority())
        if self._http is None or self._made_for != wanted:
            made = self._make(login)
            if self._http is not None:
                self._retired.append(self._http)
            while len(self._retired) > 2:
                await self._retired.pop(0).aclose()
            self._http, self._made_for = made, wanted
        return self._http

    def _make(self, login: Login) -> httpcore2.AsyncConnectionPool:
        proxy = None
        if self.access.proxy:
            parts = urlsplit(self.access.proxy)
            auth = (unquote(parts.username), unquote(parts.password or "")) if parts.username else None
            proxy = httpcore2.Proxy(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}", auth)
        return httpcore2.AsyncConnectionPool(
            self.access.tls(login),
            proxy,
            max_connections=_MOST_CONNECTIONS,
            max_keepalive_connections=_IDLE_CONNECTIONS,
            keepalive_expiry=_IDLE_SECONDS,
            network_backend=httpcore2.TrioBackend(),
        )

    async def _lines(self, response: httpcore2.Response, what: str) -> AsyncGenerator[bytes, None]:
        buffer = bytearray()
        try:
            async with aclosing(_chunks(response)) as chunks:
                async for chunk in chunks:
                    searched = len(buffer)
                    buffer += chunk
                    while (end := buffer.find(b"\n", searched)) >= 0:
                        line = bytes(buffer[:end])
                        del buffer[: end + 1]
                        searched = 0
                        if line.strip():
                            yield line
                    if len(buffer) > self._bounds.line_bytes:
                        raise BadAnswer(f"cannot {what}: an event of more than {self._bounds.line_bytes} bytes")
        except _FAILURES as error:
            raise self._unreachable(what, error) from error
        if buffer.strip():
            raise BadAnswer(f"cannot {what}: the answer ends in the middle of an event")

    def _unreachable(self, what: str, error: Exception) -> Unreachable:
        said = _cause(error)
        through = f" through {urlsplit(self.access.proxy).hostname}" if self.access.proxy else ""
        return Unreachable(f"cannot {what}: {self.access.server}{through}: {said}")

    def _count(self, verb: str, status: int) -> None:
        self.requests[verb, status] = self.requests.get((verb, status), 0) + 1


def decoded(content: bytes, what: str) -> Json:
    """A JSON object.

    Raises:
        BadAnswer: it is something else.
    """
    try:
        answer = msgspec.json.decode(content)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise BadAnswer(f"cannot {what}: the answer is not JSON: {str(error)[:200]}") from error
    if not isinstance(answer, dict):
        raise BadAnswer(f"cannot {what}: the answer is no JSON object")
    return answer


def _cause(error: BaseException) -> str:
    """What really happened: the connection's own errors are often empty, and what TLS or the kernel said stands behind them."""
    chain = [error]
    while (behind := _behind(chain[-1])) is not None and len(chain) < _LONGEST_CHAIN:
        chain.append(behind)
    deepest = [each for each in chain if isinstance(each, OSError) and str(each)]
    texts = [str(each) for each in (*deepest[-1:], *chain) if str(each)]
    return " ".join(texts[0].split())[:300] if texts else type(error).__name__


def _behind(error: BaseException) -> BaseException | None:
    return error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error.__cause__ or error.__context__


async def _whole(response: httpcore2.Response, limit: int, what: str) -> bytes:
    content = bytearray()
    async with aclosing(_chunks(response)) as chunks:
        async for chunk in chunks:
            content += chunk
            if len(content) > limit:
                raise BadAnswer(f"cannot {what}: an answer of more than {limit} bytes")
    return bytes(content)


async def _refusal(response: httpcore2.Response, what: str, limit: int) -> ApiRefused:
    content = bytearray()
    async with aclosing(_chunks(response)) as chunks:
        async for chunk in chunks:
            content += chunk
            if len(content) >= limit:
                break
    message, reason = content[:500].decode(errors="replace"), ""
    try:
        status = msgspec.json.decode(bytes(content), type=_Status)
        message, reason = status.message or message, status.reason
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        # Whatever stands between us and the API server may answer in its own way.
        pass
    return refused(what, response.status, message, reason, retry_after(_header(response, b"retry-after")))


async def _chunks(response: httpcore2.Response) -> AsyncGenerator[bytes, None]:
    # Its own generator is closed with ours: what is left to the garbage collector would be closed by trio, with a warning.
    assert isinstance(response.stream, AsyncIterable)
    async with aclosing(aiter(response.stream)) as stream:  # type: ignore[type-var]  # it is a generator
        async for chunk in stream:
            yield chunk


def _header(response: httpcore2.Response, name: bytes) -> str | None:
    return next((value.decode("latin-1") for key, value in response.headers if key.lower() == name), None)


class _Status(msgspec.Struct):
    """`Status` of meta/v1."""

    message: str = ""
    reason: str = ""


async def _close(response: httpcore2.Response) -> None:
    # Also when we are cancelled; what is left of an answer is not waited for, its connection is given up.
    with trio.CancelScope(shield=True), trio.move_on_after(_CLOSE_SECONDS):
        await response.aclose()


@contextmanager
def _deadline(seconds: float, what: str) -> Iterator[None]:
    try:
        with trio.fail_after(seconds):
            yield
    except trio.TooSlowError as error:
        raise Unreachable(f"cannot {what}: no answer within {seconds:g} s") from error


def retry_after(text: str | None) -> float | None:
    """Seconds that a Retry-After header asks for (RFC 9110 §10.2.3: seconds or a date), within reason."""
    if not text:
        return None
    try:
        seconds = float(text) if text.strip().isdigit() else parsedate_to_datetime(text).timestamp() - time()
    except (ValueError, TypeError, OverflowError):
        return None
    return min(max(0.0, seconds), _LONGEST_WAIT) if math.isfinite(seconds) else None
