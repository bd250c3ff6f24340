"""The key of consistent hashing that a request carries. Source: Istio `consistentHash`, Envoy `hash_policy.cc`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from xxhash import xxh64_intdigest

from waypoint.http.conditions import parameter_of
from waypoint.http.messages import Client, Request
from ztunnel.mesh.l7.clusters import HashKey, HashSource

_64 = 2**64 - 1


def hash_of(keys: Sequence[HashKey], request: Request, client: Client, randrange: Callable[[int], int]) -> tuple[int | None, bytes | None]:
    """(the request's key or None, the `set-cookie` that its response gets or None).

    Keys that the request lacks say nothing; several that it has are mixed.
    """
    mixed: int | None = None
    cookie: bytes | None = None
    for key in keys:
        if key.source is HashSource.HEADER:
            value = request.get(key.name.lower().encode())
        elif key.source is HashSource.SOURCE_IP:
            value = client.address.encode()
        elif key.source is HashSource.QUERY:
            value = parameter_of(request.path, key.name.encode())
        else:
            value = cookie_of(request, key.name.encode())
            if value is None and key.ttl is not None:
                value = b"%016x" % randrange(2**64)
                cookie = set_cookie(key, value)
        if value is not None:
            one = xxh64_intdigest(value)
            mixed = one if mixed is None else ((mixed << 1 | mixed >> 63) & _64) ^ one
    return mixed, cookie


def cookie_of(request: Request, name: bytes) -> bytes | None:
    """The value of a cookie; None without one. An empty one counts as none, as with Envoy."""
    for header, value in request.headers:
        if header == b"cookie":
            for pair in value.split(b";"):
                key, _, text = pair.strip().partition(b"=")
                if key == name:
                    if len(text) >= 2 and text[:1] == text[-1:] == b'"':
                        text = text[1:-1]
                    return text or None
    return None


def set_cookie(key: HashKey, value: bytes) -> bytes:
    """The header's value: Max-Age if the cookie is not the session's, Path, the attributes, HttpOnly."""
    made = key.name.encode() + b'="' + value + b'"'
    if key.ttl:
        made += b"; Max-Age=%d" % int(key.ttl)
    if key.path:
        made += b"; Path=" + key.path.encode()
    for name, text in key.attributes:
        made += b"; " + name.encode() + (b"=" + text.encode() if text else b"")
    return made + b"; HttpOnly"
