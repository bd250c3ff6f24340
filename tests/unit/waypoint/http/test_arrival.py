"""Headers that only proxies may write: taken away, and written anew."""

from __future__ import annotations

import pytest

from waypoint.http.arrival import CONTROL, FORGED, arrive
from waypoint.http.messages import Client, Request
from ztunnel.mesh.identity import SpiffeId

CART = Client(SpiffeId("td", "shop", "cart"), "10.0.0.1")
STRANGER = Client(None, "1.2.3.4", tls=False)


def arrived(client: Client, *lines: tuple[bytes, bytes], own: bytes = b"") -> tuple[dict[bytes, bytes], bool]:
    request = Request(b"GET", b"/", b"a", list(lines))
    has_id = arrive(request, client, own)
    assert len(dict(request.headers)) == len(request.headers)
    return dict(request.headers), has_id


@pytest.mark.parametrize("client", [CART, STRANGER], ids=["mesh", "stranger"])
@pytest.mark.parametrize("name", sorted(FORGED))
def test_nobody_speaks_for_a_proxy(client: Client, name: bytes) -> None:
    headers, _ = arrived(client, (name, b"forged"), (b"x", b"y"))
    assert headers.get(name) != b"forged"
    assert headers[b"x"] == b"y"
    assert headers[b"x-forwarded-proto"] == b"http"


@pytest.mark.parametrize("name", sorted(CONTROL))
def test_only_the_mesh_asks_for_retries_and_time(name: bytes) -> None:
    assert arrived(CART, (name, b"5"))[0][name] == b"5"
    assert name not in arrived(STRANGER, (name, b"5"))[0]


def test_a_stranger_is_named_after_those_who_came_before() -> None:
    assert arrived(STRANGER)[0][b"x-forwarded-for"] == b"1.2.3.4"
    headers, _ = arrived(STRANGER, (b"x-forwarded-for", b"9.9.9.9"))
    assert (headers[b"x-forwarded-for"], headers[b"x-envoy-external-address"]) == (b"9.9.9.9,1.2.3.4", b"1.2.3.4")
    assert arrived(CART, (b"x-forwarded-for", b"9.9.9.9"))[0][b"x-forwarded-for"] == b"9.9.9.9"


def test_the_application_is_told_who_asks_where_it_wants_to_know() -> None:
    headers, _ = arrived(CART, (b"x-forwarded-client-cert", b"By=x;URI=forged"), own=b"spiffe://td/ns/shop/sa/waypoint")
    assert headers[b"x-forwarded-client-cert"] == b"By=spiffe://td/ns/shop/sa/waypoint;URI=spiffe://td/ns/shop/sa/cart"
    assert b"x-forwarded-client-cert" not in arrived(STRANGER, own=b"spiffe://td/ns/shop/sa/waypoint")[0]


def test_whether_there_is_a_request_id() -> None:
    assert arrived(CART, (b"x-request-id", b"1"))[1]
    assert not arrived(CART)[1]
