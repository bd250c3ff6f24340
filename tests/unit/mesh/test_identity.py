"""SPIFFE ids in Istio's form, and nothing else."""

from __future__ import annotations

import pytest

from ztunnel.mesh.identity import SpiffeId, parse_spiffe


def test_an_identity_is_its_uri() -> None:
    identity = parse_spiffe("spiffe://cluster.local/ns/shop/sa/cart")
    assert identity == SpiffeId("cluster.local", "shop", "cart")
    assert str(identity) == identity.uri == "spiffe://cluster.local/ns/shop/sa/cart"
    assert identity.principal == "cluster.local/ns/shop/sa/cart"


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "https://cluster.local/ns/a/sa/b",
        "spiffe://cluster.local/ns/a/sa/b/",
        "spiffe://cluster.local/ns/a/sa/b\n",
        "spiffe://cluster.local/ns//sa/b",
        "spiffe://CLUSTER.local/ns/a/sa/b",
        "spiffe://cluster.local/ns/a/b/sa/c",
        "spiffe://cluster.local/ns/a/sa/" + "b" * 254,
    ],
)
def test_anything_else_is_refused(uri: str) -> None:
    with pytest.raises(ValueError, match="not a SPIFFE id"):
        parse_spiffe(uri)
