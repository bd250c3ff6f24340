"""What a CONNECT says, and how it is said: authority, baggage, forwarded, traceparent, and both sides' heads.

Only the authority decides anything, so it alone is refused when it is wrong (400). Baggage, forwarded and traceparent serve
telemetry: what is not understood there counts as absent, because no connection may fail for its labels.
What an authority resolves to, and who may connect, is decided in `ztunnel.mesh`. The names of this file are meant to be read
with its name: `connect.parse_request`.
Source: Istio ztunnel `proxy/outbound.rs`, `proxy/inbound.rs`, `baggage.rs`; RFC 7239; W3C Trace Context.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

from ztunnel.hbone.events import Headers
from ztunnel.hbone.headers import encode, literal_length, name_literal
from ztunnel.mesh.addresses import canonical
from ztunnel.mesh.errors import BadConnect

_LONGEST_AUTHORITY: Final = 255
_LONGEST_HOST: Final = 253
_LONGEST_VALUE: Final = 256
"""Bytes of one baggage value: longer than every Kubernetes name (253). Longer ones are left out."""
_LONGEST_HEADER: Final = 8192
"""Bytes of baggage or forwarded that are read at all, all instances together."""
_AUTHORITIES: Final = 4096
"""Authorities that are remembered: a pod's connections name the same few."""
_REMEMBERED: Final = 1024
"""Ends of `forwarded` headers that are remembered: one per service that is dialled, its connections differ only in their client."""
_REMEMBERED_BYTES: Final = 512
"""Longest of them."""
_PORT: Final = re.compile(r"[1-9][0-9]{0,4}")
_IPV4: Final = re.compile(r"(?:(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])(?:\.(?!$)|$)){4}")
"""An address in its only spelling, so that it needs no parsing."""
_HOSTNAME: Final = re.compile(
    r"(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\.)*(?=[a-z0-9_-]*[a-z_-])[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
)
"""Labels of letters, digits, hyphens and underscores. The last is not a number, or a broken IPv4 address would be a host name."""
_NO_TRACE: Final = "0" * 32
_NO_PARENT: Final = "0" * 16
"""A reader takes these for invalid."""
TRACE_LENGTH: Final = 55
_TRACE_AT: Final = 3
_PARENT_AT: Final = 36
_ZERO: Final = 0x30
_TRACE_SHAPE: Final = b"00-00000000000000000000000000000000-0000000000000000-00"
_MARKS: Final = tuple((place, b"0" if place in (0, 1, 53, 54) else b"-") for place in (0, 1, 2, 35, 52, 53, 54))
"""What stands where in a traceparent of ours, but for its random digits: version 00, hyphens, flags 00."""
_SHAPES: Final = bytes(ord("0") if chr(byte) in "0123456789abcdef" else byte if byte == ord("-") else ord("x") for byte in range(256))
"""Makes a traceparent its shape: `0` for every digit."""
_FORWARDED: Final = name_literal(b"forwarded")
_TRACEPARENT: Final = name_literal(b"traceparent")
_CARRIED: Final = re.compile(r"[\x20-\x2b\x2d-\x3c\x3e-\x7e]+")
"""What a baggage value may consist of: visible ASCII and space, without the comma and the equals sign that end it."""
_VISIBLE: Final = re.compile(rb"[\t\x20-\x7e]*")
_SEMICOLON: Final = 0x3B
_FOR: Final = re.compile(r'for="?([^"]*)"?')
_WORKLOAD_TYPES: Final = ("deployment", "cronjob", "pod", "job")


@dataclass(frozen=True, slots=True)
class Authority:
    """A CONNECT's target. `host` is a canonical address or a lower-case host name; `port` is 1 to 65535."""

    host: str
    port: int
    _text: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Asked for by each connection, while the object is remembered.
        object.__setattr__(self, "_text", f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}")

    def __str__(self) -> str:
        return self._text


@dataclass(frozen=True, slots=True)
class Baggage:
    """What a workload says of itself. An empty string means not said; a type other than Istio's four says nothing of the workload."""

    cluster: str = ""
    namespace: str = ""
    workload_type: str = ""
    workload_name: str = ""
    service_name: str = ""
    revision: str = ""
    region: str = ""
    zone: str = ""


@dataclass(slots=True, init=False)
class ConnectRequest:
    """One CONNECT. Everything but the authority is what the peer claims, for telemetry only, and read when somebody asks."""

    authority: Authority
    traceparent: str
    said_baggage: tuple[bytes, ...]
    said_forwarded: bytes

    def __init__(self, authority: Authority, traceparent: str, said_baggage: tuple[bytes, ...] = (), said_forwarded: bytes = b"") -> None:
        self.authority = authority
        self.traceparent = traceparent
        self.said_baggage = said_baggage
        self.said_forwarded = said_forwarded

    @property
    def baggage(self) -> Baggage:
        """What the peer says of the source."""
        return parse_baggage(self.said_baggage)

    @property
    def forwarded_for(self) -> tuple[str, int] | None:
        """The client of the peer, if it said one that is an address and a port."""
        return parse_forwarded(self.said_forwarded)[0]

    @property
    def forwarded_host(self) -> str:
        """The service that the client dialled, if the peer said one."""
        return parse_forwarded_host(self.said_forwarded)


_FIELD_OF_KEY = {
    "k8s.cluster.name": "cluster",
    "k8s.namespace.name": "namespace",
    "service.name": "service_name",
    "service.version": "revision",
    "cloud.region": "region",
    "cloud.availability_zone": "zone",
}
_TYPE_OF_KEY: Final = {f"k8s.{kind}.name": kind for kind in _WORKLOAD_TYPES}


def parse_authority(text: bytes) -> Authority:
    """`ip:port`, `[ip6]:port` or `host:port`.

    Raises:
        BadConnect: 400 for anything else: no port, port 0, user information, a zone, an address that is nearly one.
    """
    known = _authorities.get(text)
    if known is None:
        known = _parse_authority(text)
        if len(_authorities) >= _AUTHORITIES:
            _authorities.clear()
        _authorities[text] = known
    return known


_authorities: Final[dict[bytes, Authority]] = {}


def _parse_authority(text: bytes) -> Authority:
    if len(text) > _LONGEST_AUTHORITY or not text.isascii():
        raise BadConnect(f"authority too long or not ASCII: {text[:100]!r}")
    host, _, port = text.decode("ascii").rpartition(":")
    if not host or _PORT.fullmatch(port) is None or int(port) > 65535:
        raise BadConnect(f"authority without a host or a port: {text[:100]!r}")
    if _IPV4.fullmatch(host) is not None:
        return Authority(host, int(port))
    if host[0] == "[":
        address = canonical(host[1:-1]) if host[-1] == "]" and ":" in host else None
        if address is None:
            raise BadConnect(f"authority with a broken IPv6 address: {text[:100]!r}")
        return Authority(address, int(port))
    host = host.lower()
    if len(host) > _LONGEST_HOST or _HOSTNAME.fullmatch(host) is None:
        raise BadConnect(f"authority with a broken host: {text[:100]!r}")
    return Authority(host, int(port))


def build_baggage(baggage: Baggage) -> bytes:
    """The header's value, in Istio's order; what is empty or cannot be carried as it is is left out. May be empty altogether."""
    workload = f"k8s.{baggage.workload_type}.name" if baggage.workload_type in _WORKLOAD_TYPES else ""
    members = (
        ("k8s.cluster.name", baggage.cluster),
        ("k8s.namespace.name", baggage.namespace),
        (workload, baggage.workload_name),
        ("service.name", baggage.service_name),
        ("service.version", baggage.revision),
        ("cloud.region", baggage.region),
        ("cloud.availability_zone", baggage.zone),
    )
    # A space at the end of the last value would make the field malformed for strict receivers.
    return ",".join(f"{key}={value}" for key, value in members if key and _is_carried(value)).encode("ascii")


def _is_carried(value: str) -> bool:
    return len(value) <= _LONGEST_VALUE and value[-1:] != " " and _CARRIED.fullmatch(value) is not None


def parse_baggage(values: Iterable[bytes]) -> Baggage:
    """What the instances of a baggage header say, in Istio's dialect: no trimming, no percent-decoding, the last of a key counts.

    One instance that is not visible ASCII, or more than 8 KiB in all, discards everything.
    """
    found: dict[str, str] = {}
    room = _LONGEST_HEADER
    for instance in values:
        room -= len(instance)
        if room < 0 or _VISIBLE.fullmatch(instance) is None:
            return Baggage()
        for member in instance.decode("ascii").split(","):
            key, _, rest = member.partition("=")
            value = rest.partition("=")[0]
            if not value or len(value) > _LONGEST_VALUE:
                continue
            if key in _TYPE_OF_KEY:
                found["workload_type"], found["workload_name"] = _TYPE_OF_KEY[key], value
            elif key in _FIELD_OF_KEY:
                found[_FIELD_OF_KEY[key]] = value
    return Baggage(**found)


def parse_forwarded(value: bytes) -> tuple[tuple[str, int] | None, str]:
    """The client (None unless it is an address and a port) and the host (empty for none) of a forwarded header."""
    return _forwarded_client(value), parse_forwarded_host(value)


def parse_forwarded_host(value: bytes) -> str:
    """The host alone: asked for each connection, while nobody asks for the client."""
    if value.startswith(b"for="):
        if _SEMICOLON not in value:
            return ""
        # The client differs from one connection to the next, and what follows it does not.
        if len(value) > _LONGEST_HEADER or not value.isascii():
            return ""
        value = value[value.index(b";") + 1 :]
    return _host_among(value) if len(value) <= _REMEMBERED_BYTES else _host_among.__wrapped__(value)


@lru_cache(_REMEMBERED)
def _host_among(value: bytes) -> str:
    for pair in _pairs(value):
        if pair.startswith("host=") and (host := _unquoted(pair[len("host=") :])):
            return host
    return ""


def _forwarded_client(value: bytes) -> tuple[str, int] | None:
    for pair in _pairs(value):
        if (match := _FOR.fullmatch(pair)) is not None and (client := _client(match[1])) is not None:
            return client
    return None


def _pairs(value: bytes) -> list[str]:
    if len(value) > _LONGEST_HEADER or not value.isascii():
        return []
    return [part.strip() for part in value.decode("ascii").split(";")]


def _unquoted(text: str) -> str:
    bare = text.removeprefix('"').removesuffix('"')
    return bare if len(bare) <= _LONGEST_HOST and _HOSTNAME.fullmatch(bare.lower()) is not None else ""


def _client(text: str) -> tuple[str, int] | None:
    try:
        authority = parse_authority(text.encode("ascii"))
    except BadConnect:
        return None
    is_address = ":" in authority.host or _IPV4.fullmatch(authority.host) is not None
    return (authority.host, authority.port) if is_address else None


def new_traceparents(digits: str) -> list[str]:
    """Traces of their own, not sampled.

    Args:
        digits: random hexadecimal digits, `TRACE_LENGTH` for each trace.
    """
    text = bytearray(digits, "ascii")
    for place, mark in _MARKS:
        text[place::TRACE_LENGTH] = mark * (len(text) // TRACE_LENGTH)
    for place in (_TRACE_AT, _PARENT_AT):
        # All zeros mean "invalid" to a reader; that they come up is as unlikely as it is cheap to exclude.
        text[place::TRACE_LENGTH] = text[place::TRACE_LENGTH].replace(b"0", b"1")
    traces = text.decode("ascii")
    return [traces[at : at + TRACE_LENGTH] for at in range(0, len(traces), TRACE_LENGTH)]


def parse_traceparent(value: bytes) -> str:
    """The header's text if it is valid in version 00, else an empty string. Later versions are read as far as 00 goes."""
    text = value[:TRACE_LENGTH]
    if text.translate(_SHAPES) != _TRACE_SHAPE:
        return ""
    trace = text.decode("ascii")
    if text[_TRACE_AT] == _ZERO and trace.startswith(_NO_TRACE, _TRACE_AT):
        return ""
    if text[_PARENT_AT] == _ZERO and trace.startswith(_NO_PARENT, _PARENT_AT):
        return ""
    if text.startswith(b"ff"):
        return ""
    if len(value) > TRACE_LENGTH and (text.startswith(b"00") or value[TRACE_LENGTH] != ord("-")):
        return ""
    return trace


class RequestHead:
    """The CONNECTs of one route, in Istio's order. What they have in common is encoded once: each connection makes one."""

    __slots__ = ("_address", "_client", "_front", "_host")

    def __init__(self, authority: str, baggage: bytes, service_host: str) -> None:
        """
        Args:
            authority: the target as text: `10.0.0.1:80`, `[fd00::1]:80`, `host:80`.
            baggage: of `build_baggage`.
            service_host: host name of the service that the application dialled, empty for none.
        """
        front = encode(((b":method", b"CONNECT"), (b":authority", authority.encode("ascii")), (b"baggage", baggage)))
        self._front = front + _FORWARDED
        self._host = b'";host=' + service_host.encode("ascii") if service_host else b'"'
        self._address = ""
        self._client = b""
        """How a `forwarded` begins that is about `_address`."""

    def block(self, source: tuple[str, int], traceparent: str) -> bytes:
        """The header block of one of them.

        Args:
            source: canonical address and port of the application's connection. Told as `for="ip:port"`, with brackets around IPv6.
        """
        address, port = source
        if address != self._address:
            self._address = address
            self._client = (f'for="[{address}]:' if ":" in address else f'for="{address}:').encode("ascii")
        forwarded = b"%b%d%b" % (self._client, port, self._host)
        trace = traceparent.encode("ascii")
        forwarded_length, trace_length = literal_length(len(forwarded)), literal_length(len(trace))
        return b"%b%b%b%b%b%b" % (self._front, forwarded_length, forwarded, _TRACEPARENT, trace_length, trace)


def response_block(baggage: bytes) -> bytes:
    """The header block of a 200 that carries what the destination says of itself (of `build_baggage`)."""
    return encode(((b":status", b"200"), (b"baggage", baggage)))


def parse_request(headers: Headers) -> ConnectRequest:
    """The CONNECT that a well-formed request is. Of a repeated field the first counts, but for baggage.

    Raises:
        BadConnect: 400: another method, or an authority without a host and a port.
    """
    method: bytes | None = None
    authority: bytes | None = None
    forwarded: bytes | None = None
    traceparent: bytes | None = None
    baggage: list[bytes] = []
    for name, value in headers:
        if name == b"baggage":
            baggage.append(value)
        elif name == b"forwarded":
            forwarded = value if forwarded is None else forwarded
        elif name == b"traceparent":
            traceparent = value if traceparent is None else traceparent
        elif name == b":method":
            method = value if method is None else method
        elif name == b":authority":
            authority = value if authority is None else authority
    if method != b"CONNECT":
        raise BadConnect(f"method {(method or b'')[:20]!r} instead of CONNECT")
    return ConnectRequest(parse_authority(authority or b""), parse_traceparent(traceparent or b""), tuple(baggage), forwarded or b"")


def response_baggage(headers: Headers) -> Baggage:
    """What the destination says of itself in its response."""
    return parse_baggage(value for name, value in headers if name == b"baggage")
