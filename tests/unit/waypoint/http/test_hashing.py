"""The key of a request for consistent hashing, and the cookie that makes one."""

from __future__ import annotations

import pytest
from xxhash import xxh64_intdigest

from tests.kit.l7 import client, request
from waypoint.http.hashing import hash_of
from waypoint.http.messages import Request
from ztunnel.mesh.l7.clusters import HashKey, HashSource

HEADER, QUERY = HashKey(HashSource.HEADER, "X-User"), HashKey(HashSource.QUERY, "u")
IP, COOKIE = HashKey(HashSource.SOURCE_IP), HashKey(HashSource.COOKIE, "c")


def key_of(keys: tuple[HashKey, ...], asked: Request) -> int | None:
    return hash_of(keys, asked, client(address="10.0.0.9"), lambda _: 7)[0]


@pytest.mark.parametrize(
    ("key", "asked", "hashed"),
    [
        (HEADER, request(x_user="jason"), b"jason"),
        (HEADER, request(), None),
        (IP, request(), b"10.0.0.9"),
        (QUERY, request("/?a=1&u=jason"), b"jason"),
        (QUERY, request("/"), None),
        (COOKIE, request(cookie="a=b; c=jason;d=e"), b"jason"),
        (COOKIE, request(cookie='c="jason"'), b"jason"),
        (COOKIE, request(cookie="cc=jason; c="), None),
        (COOKIE, request(), None),
    ],
)
def test_keys(key: HashKey, asked: Request, hashed: bytes | None) -> None:
    assert key_of((key,), asked) == (None if hashed is None else xxh64_intdigest(hashed))


def test_several_keys_are_mixed_and_missing_ones_say_nothing() -> None:
    one, other = xxh64_intdigest(b"jason"), xxh64_intdigest(b"10.0.0.9")
    rotated = (one << 1 | one >> 63) % 2**64
    assert key_of((HEADER, IP), request(x_user="jason")) == rotated ^ other
    assert key_of((QUERY, IP), request()) == other
    assert key_of((), request()) is None


@pytest.mark.parametrize(
    ("key", "cookie"),
    [
        (HashKey(HashSource.COOKIE, "c", ttl=0.0), b'c="0000000000000007"; HttpOnly'),
        (HashKey(HashSource.COOKIE, "c", "/shop", 3600.0), b'c="0000000000000007"; Max-Age=3600; Path=/shop; HttpOnly'),
        (
            HashKey(HashSource.COOKIE, "c", ttl=0.0, attributes=(("SameSite", "Strict"), ("Secure", ""))),
            b'c="0000000000000007"; SameSite=Strict; Secure; HttpOnly',
        ),
    ],
)
def test_a_cookie_is_made_where_there_is_none(key: HashKey, cookie: bytes) -> None:
    made = hash_of((key,), request(), client(), lambda _: 7)
    assert made == (xxh64_intdigest(b"0000000000000007"), cookie)
    assert hash_of((key,), request(cookie="c=0000000000000007"), client(), lambda _: 8) == (made[0], None)
