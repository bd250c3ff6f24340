"""External authorization: what an authorizer is asked about a request, and what its answer does to the request and its answer. Pure.

HTTP: the request's method, path (behind a prefix), Host, Authorization and chosen headers; 200 allows, another status is the client's
answer, 5xx is an error of the authorizer. gRPC: envoy.service.auth.v3.Authorization/Check.
Source: Istio MeshConfig `envoyExtAuthzHttp` and `envoyExtAuthzGrpc`; Envoy `ext_authz` and `external_auth.proto`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from waypoint.http.messages import Client, Headers, LocalReply, Request
from waypoint.http.rules import Texts
from ztunnel.mesh.l7.routes import TextMatch
from ztunnel.mesh.l7.security import AuthorizerKind, ExtensionProvider
from ztunnel.rpc.messages import PREFIX_BYTES
from ztunnel.rpc.protobuf import WireError, bytes_field, int_field, read_bytes, read_fields, read_int64, read_text

MAX_HEADERS: Final = 256
"""Header edits that one answer may ask for."""
_CHECK: Final = b"/envoy.service.auth.v3.Authorization/Check"
_ALWAYS: Final = frozenset({b"authorization"})
_NEVER: Final = frozenset({b"host", b"content-length", b"transfer-encoding", b"connection", b"te", b"upgrade", b"expect"})
"""Headers that say how the message itself is carried: they are never taken over."""
_ALWAYS_DOWN: Final = frozenset({b"www-authenticate", b"location", b"proxy-authenticate"})
_PARTIAL: Final = b"x-envoy-auth-partial-body"


class Allowed:
    """The request may go on."""

    __slots__ = ("append", "remove", "respond", "respond_append", "set")

    def __init__(self) -> None:
        self.set: Headers = []
        """Of the request, in the place of what it had."""
        self.append: Headers = []
        self.remove: list[bytes] = []
        self.respond: Headers = []
        """Of the answer that the client will get, likewise."""
        self.respond_append: Headers = []

    def apply(self, request: Request) -> None:
        """Edits the request."""
        if self.remove or self.set:
            gone = {*self.remove, *(name for name, _ in self.set)}
            request.headers = [line for line in request.headers if line[0] not in gone]
        request.headers += self.set
        request.headers += self.append

    def decorate(self, headers: Headers) -> None:
        """Edits the answer's headers."""
        if self.respond:
            gone = {name for name, _ in self.respond}
            headers[:] = [line for line in headers if line[0] not in gone]
        headers += self.respond
        headers += self.respond_append


class Authorizer:
    """One provider, compiled."""

    __slots__ = ("_add", "_down_allow", "_down_deny", "_include", "_up", "provider")

    def __init__(self, provider: ExtensionProvider) -> None:
        self.provider = provider
        self._include = Texts(provider.include_headers)
        self._add = [(name.encode(), value.encode()) for name, value in provider.add_headers]
        self._up = _texts(provider.headers_upstream)
        self._down_deny = _texts(provider.headers_downstream_deny)
        self._down_allow = _texts(provider.headers_downstream_allow)

    @property
    def is_grpc(self) -> bool:
        """Whether it is spoken to in gRPC."""
        return self.provider.kind is AuthorizerKind.GRPC

    # Asking

    def question(self, request: Request, client: Client, body: bytes, *, partial: bool = False) -> tuple[Request, bytes]:
        """What is asked: a request and its body.

        Args:
            body: the first bytes of the request's, as many as the provider wants.
            partial: the request's body is longer.
        """
        if self.is_grpc:
            return self._grpc_question(request, client, body, partial)
        added = {name for name, _ in self._add}
        headers = [
            line
            for line in request.headers
            if line[0] not in _NEVER and line[0] not in added and (line[0] in _ALWAYS or self._include.match(line[0]))
        ]
        headers += self._add
        if self.provider.body_bytes:
            headers.append((_PARTIAL, b"true" if partial else b"false"))
        headers.append((b"content-length", b"%d" % len(body)))
        path = self.provider.path_prefix.encode() + request.path
        return Request(request.method, path, request.authority, headers, scheme=request.scheme), body

    def _grpc_question(self, request: Request, client: Client, body: bytes, partial: bool) -> tuple[Request, bytes]:
        message = check_request(request, client, body if self.provider.body_bytes else None, partial)
        headers = [
            (b"content-type", b"application/grpc"),
            (b"te", b"trailers"),
            (b"grpc-timeout", b"%dm" % min(99_999_999, max(1, int(self.provider.timeout * 1000)))),
        ]
        asked = Request(b"POST", _CHECK, self.provider.authority.encode(), headers, version=20)
        return asked, b"\0" + len(message).to_bytes(4, "big") + message

    # Answers

    def verdict(self, status: int, headers: Headers, body: bytes, trailers: Headers) -> Allowed | LocalReply:
        """What an answer means."""
        if self.is_grpc:
            return self._grpc_verdict(status, headers, body, trailers)
        if status == 200:
            allowed = Allowed()
            allowed.set = _chosen(headers, self._up)
            allowed.respond = _chosen(headers, self._down_allow)
            return allowed
        if status >= 500 or status < 200:
            return self.failed()
        if self._down_deny is None:
            kept = [line for line in headers if line[0] not in _NEVER]
        else:
            kept = [line for line in headers if line[0] in _ALWAYS_DOWN or (line[0] not in _NEVER and self._down_deny.match(line[0]))]
        return _denied(status, body, kept)

    def failed(self) -> Allowed | LocalReply:
        """It did not answer, or not as it should."""
        if self.provider.fail_open:
            return Allowed()
        return LocalReply(self.provider.status_on_error, b"", [], "UAEX", "ext_authz_error")

    def _grpc_verdict(self, status: int, headers: Headers, body: bytes, trailers: Headers) -> Allowed | LocalReply:
        said = next((value for name, value in (*trailers, *headers) if name == b"grpc-status"), b"")
        size = int.from_bytes(body[1:PREFIX_BYTES], "big")
        if status != 200 or said != b"0" or body[:1] != b"\0" or len(body) != PREFIX_BYTES + size:
            return self.failed()
        try:
            return check_response(body[PREFIX_BYTES:])
        except WireError:
            return self.failed()


def _texts(matches: Sequence[TextMatch]) -> Texts | None:
    return Texts(matches) if matches else None


def _chosen(headers: Headers, wanted: Texts | None) -> Headers:
    return [] if wanted is None else [line for line in headers if line[0] not in _NEVER and wanted.match(line[0])]


def _denied(status: int, body: bytes, headers: Headers) -> LocalReply:
    return LocalReply(status, body, headers, "UAEX", "ext_authz_denied")


# The messages of envoy.service.auth.v3, by their field numbers.


def check_request(request: Request, client: Client, body: bytes | None, partial: bool) -> bytes:
    """CheckRequest.

    Args:
        body: None: it is not part of the question.
    """
    headers = {b":authority": request.authority, b":method": request.method, b":path": request.path, b":scheme": request.scheme}
    for name, value in request.headers:
        headers[name] = headers[name] + b"," + value if name in headers else value
    if body is not None:
        headers[_PARTIAL] = b"true" if partial else b"false"
    request_id = request.get(b"x-request-id") or b""
    size = request.get(b"content-length")
    http = b"".join(
        [
            _text(1, request_id),
            _text(2, request.method),
            *(bytes_field(3, _text(1, name) + _text(2, value)) for name, value in headers.items()),
            _text(4, request.path),
            _text(5, request.authority),
            _text(6, request.scheme),
            int_field(9, int(size) if size is not None and size.isdigit() and len(size) < 19 else -1),
            _text(10, b"HTTP/2" if request.version == 20 else b"HTTP/1.1"),
            b"" if body is None else _text(11, body),
        ]
    )
    principal = b"" if client.identity is None else client.identity.uri.encode()
    attributes = b"".join(
        [
            bytes_field(1, _peer(client.address, client.port, principal)),
            bytes_field(2, _peer(client.destination, client.service_port, b"")),
            bytes_field(4, bytes_field(2, http)),
        ]
    )
    return bytes_field(1, attributes)


def _peer(address: str, port: int, principal: bytes) -> bytes:
    socket = bytes_field(2, address) + int_field(3, port)
    return bytes_field(1, bytes_field(1, socket)) + _text(4, principal)


def _text(number: int, value: bytes) -> bytes:
    """A string field; bytes that are no UTF-8 are replaced, for protobuf's strings must be."""
    return bytes_field(number, value.decode("utf-8", "replace")) if value else b""


def check_response(message: bytes) -> Allowed | LocalReply:
    """What a CheckResponse says.

    Raises:
        WireError: it is none.
    """
    code = 0
    allowed, denied = b"", b""
    for number, value in read_fields(message):
        if number == 1:
            code = next((read_int64(inner, said) for inner, said in read_fields(read_bytes(1, value)) if inner == 1), 0)
        elif number == 2:
            denied = read_bytes(number, value)
        elif number == 3:
            allowed = read_bytes(number, value)
    return _grpc_allowed(allowed) if code == 0 else _grpc_denied(denied)


def _grpc_denied(message: bytes) -> LocalReply:
    status, body, headers = 403, b"", Allowed()
    for number, value in read_fields(message):
        if number == 1:
            status = next((read_int64(inner, said) for inner, said in read_fields(read_bytes(1, value)) if inner == 1), 403)
        elif number == 2:
            _option(read_bytes(number, value), headers.set, headers.append)
        elif number == 3:
            body = read_bytes(number, value)
    return _denied(status if 200 <= status <= 599 else 403, body, headers.set + headers.append)


def _grpc_allowed(message: bytes) -> Allowed:
    found = Allowed()
    for number, value in read_fields(message):
        if number == 2:
            _option(read_bytes(number, value), found.set, found.append)
        elif number == 5:
            name = read_text(number, value).lower().encode()
            if name not in _NEVER and not name.startswith(b":"):
                found.remove.append(name)
        elif number == 6:
            _option(read_bytes(number, value), found.respond, found.respond_append)
    return found


def _option(message: bytes, replacing: Headers, appending: Headers) -> None:
    """One HeaderValueOption. Without `append` it replaces; what cannot be a header is refused."""
    name, value, append = b"", b"", False
    for number, field in read_fields(message):
        if number == 1:
            for inner, said in read_fields(read_bytes(number, field)):
                if inner == 1:
                    name = read_text(inner, said).lower().encode()
                elif inner in (2, 3):
                    value = read_bytes(inner, said)
        elif number == 2:
            append = any(inner == 1 and said for inner, said in read_fields(read_bytes(number, field)))
    if not name or name in _NEVER or name.startswith(b":"):
        return
    if not _TOKEN.issuperset(name) or any((byte < 0x20 and byte != 0x09) or byte == 0x7F for byte in value):
        raise WireError("a header that cannot be one")
    target = appending if append else replacing
    if len(target) >= MAX_HEADERS:
        raise WireError(f"more than {MAX_HEADERS} headers")
    target.append((name, value))


_TOKEN: Final = frozenset(b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyz")
