"""Envoy's `%VARIABLE%`s in header values: what a value says, compiled, and what is known of an exchange when it is said.

Only the variables that a header edit of VirtualService, HTTPRoute or DestinationRule can make sense of. One that is not known here stays
as it was written; `unknown_variables` lists those, for a status. Source: Envoy, "Access logging: command operators" and "Custom
request/response headers"; a variable without a value is empty there, and a header whose value turns out empty is not added.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime

from waypoint.http.messages import Client, Request, Response

_OPERATOR = re.compile(r"%(?:%|([A-Z_0-9]+)(?:\(([^()]*)\))?(?::(\d{1,5}))?%)")


class Variables:
    """What is known of an exchange. Mutable: the engine fills in `upstream` and `response` when they are known."""

    __slots__ = ("client", "cluster", "hostname", "now", "request", "response", "route", "upstream")

    def __init__(self, request: Request, client: Client, now: float, route: str = "", hostname: str = "") -> None:
        """
        Args:
            now: when the request came, seconds since the epoch.
            hostname: of this proxy's pod.
        """
        self.request = request
        self.client = client
        self.now = now
        self.route = route
        self.hostname = hostname
        self.cluster = ""
        self.upstream = ""
        """`address:port` of the endpoint."""
        self.response: Response | None = None


class Template:
    """A value with variables in it."""

    __slots__ = ("parts",)

    def __init__(self, parts: list[bytes | _Operator]) -> None:
        self.parts = parts

    def text(self, variables: Variables) -> bytes:
        """The value, said of this exchange."""
        return b"".join([part if isinstance(part, bytes) else part.text(variables) for part in self.parts])


class _Operator:
    __slots__ = ("argument", "limit", "of")

    def __init__(self, of: Callable[[Variables, str], bytes], argument: str, limit: int) -> None:
        self.of = of
        self.argument = argument
        self.limit = limit

    def text(self, variables: Variables) -> bytes:
        said = _clean(self.of(variables, self.argument))
        return said[: self.limit] if self.limit else said


def compile_value(value: str) -> bytes | Template:
    """A header's value: bytes where it holds no variable."""
    parts: list[bytes | _Operator] = []
    literal, at = "", 0
    for match in _OPERATOR.finditer(value):
        literal += value[at : match.start()]
        at = match.end()
        name = match.group(1)
        if name is None:
            literal += "%"
        elif name in _OPERATORS:
            if literal:
                parts.append(literal.encode())
            parts.append(_Operator(_OPERATORS[name], match.group(2) or "", int(match.group(3) or 0)))
            literal = ""
        else:
            literal += match.group()
    literal += value[at:]
    if not parts:
        return literal.encode()
    if literal:
        parts.append(literal.encode())
    return Template(parts)


def unknown_variables(value: str) -> list[str]:
    """Names of variables in a value that this proxy does not know."""
    return [match.group(1) for match in _OPERATOR.finditer(value) if match.group(1) is not None and match.group(1) not in _OPERATORS]


def _clean(value: bytes) -> bytes:
    # what a client sent may hold no line's end (the codecs' promise); a certificate's names could
    return value.replace(b"\r", b"").replace(b"\n", b"").replace(b"\0", b"")


def _named(headers_of: Request | Response, argument: str) -> bytes:
    for name in argument.lower().split("?", 1):
        if name.startswith(":"):
            value: bytes | None = _pseudo(headers_of, name)
        else:
            value = headers_of.get(name.encode())
        if value is not None:
            return value
    return b""


def _pseudo(message: Request | Response, name: str) -> bytes | None:
    if isinstance(message, Response):
        return str(message.status).encode() if name == ":status" else None
    values = {":authority": message.authority, ":path": message.path, ":method": message.method, ":scheme": message.scheme}
    return values.get(name)


def _address(address: str, port: int) -> bytes:
    return (f"[{address}]:{port}" if ":" in address else f"{address}:{port}").encode()


_PROTOCOLS = {10: b"HTTP/1.0", 11: b"HTTP/1.1", 20: b"HTTP/2"}


def _start_time(variables: Variables, argument: str) -> bytes:
    moment = datetime.fromtimestamp(variables.now, UTC)
    if not argument:
        return (moment.strftime("%Y-%m-%dT%H:%M:%S") + f".{moment.microsecond // 1000:03d}Z").encode()
    return moment.strftime(argument.replace("%3f", f"{moment.microsecond // 1000:03d}")).encode()


def _response_code(variables: Variables, _: str) -> bytes:
    return b"" if variables.response is None else str(variables.response.status).encode()


def _response_header(variables: Variables, argument: str) -> bytes:
    return b"" if variables.response is None else _named(variables.response, argument)


def _peer_uri(variables: Variables, _: str) -> bytes:
    return b"" if variables.client.identity is None else variables.client.identity.uri.encode()


_OPERATORS: dict[str, Callable[[Variables, str], bytes]] = {
    "REQ": lambda known, name: _named(known.request, name),
    "RESP": _response_header,
    "RESPONSE_CODE": _response_code,
    "PROTOCOL": lambda known, _: _PROTOCOLS.get(known.request.version, b""),
    "START_TIME": _start_time,
    "ROUTE_NAME": lambda known, _: known.route.encode(),
    "UPSTREAM_CLUSTER": lambda known, _: known.cluster.encode(),
    "UPSTREAM_HOST": lambda known, _: known.upstream.encode(),
    "UPSTREAM_REMOTE_ADDRESS": lambda known, _: known.upstream.encode(),
    "HOSTNAME": lambda known, _: known.hostname.encode(),
    "DOWNSTREAM_PEER_URI_SAN": _peer_uri,
    "DOWNSTREAM_REMOTE_ADDRESS": lambda known, _: _address(known.client.address, known.client.port),
    "DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT": lambda known, _: known.client.address.encode(),
    "DOWNSTREAM_REMOTE_PORT": lambda known, _: str(known.client.port).encode(),
    "DOWNSTREAM_DIRECT_REMOTE_ADDRESS": lambda known, _: _address(known.client.address, known.client.port),
    "DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT": lambda known, _: known.client.address.encode(),
    "DOWNSTREAM_LOCAL_ADDRESS": lambda known, _: _address(known.client.destination, known.client.service_port),
    "DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT": lambda known, _: known.client.destination.encode(),
    "DOWNSTREAM_LOCAL_PORT": lambda known, _: str(known.client.service_port).encode(),
    "REQUESTED_SERVER_NAME": lambda known, _: known.client.sni.encode(),
}
