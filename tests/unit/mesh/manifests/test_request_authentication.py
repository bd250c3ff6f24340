"""RequestAuthentication: every field, and what is refused."""

from __future__ import annotations

import pytest

from tests.kit.builders import metadata
from ztunnel.mesh.errors import ManifestError
from ztunnel.mesh.l7.attach import placed_authentications
from ztunnel.mesh.l7.security import JwtLocation, JwtRule
from ztunnel.mesh.manifests.parse import RefusedPolicy, parse
from ztunnel.mesh.manifests.request_authentication import RequestAuthenticationObject
from ztunnel.mesh.manifests.selectors import TargetRef
from ztunnel.mesh.refused import stand_in

TARGET = {"kind": "Service", "name": "s", "group": ""}


def body(*rules: object, **spec: object) -> dict[str, object]:
    return {
        "apiVersion": "security.istio.io/v1",
        "kind": "RequestAuthentication",
        "metadata": metadata("x", "default"),
        "spec": {"targetRefs": [TARGET], "jwtRules": list(rules), **spec},
    }


def rule(**fields: object) -> JwtRule:
    found = parse(body({"issuer": "i", **fields}), "test")
    assert isinstance(found, RequestAuthenticationObject)
    return found.authentication.rules[0]


def test_only_an_issuer() -> None:
    found = rule()
    assert found == JwtRule("i")
    assert found.locations == (JwtLocation(header="authorization", prefix="Bearer "), JwtLocation(parameter="access_token"))


def test_every_field() -> None:
    found = rule(
        audiences=["a", "b"],
        jwksUri="https://x.y:8443/keys?z=1",
        fromHeaders=[{"name": "X-Token", "prefix": "Tok "}, {"name": "y"}],
        fromParams=["p"],
        fromCookies=["c"],
        forwardOriginalToken=True,
        outputPayloadToHeader="X-Payload",
        outputClaimToHeaders=[{"header": "X-Sub", "claim": "a.b"}],
        timeout="2s",
        spaceDelimitedClaims=["roles"],
    )
    assert found == JwtRule(
        issuer="i",
        audiences=("a", "b"),
        jwks_uri="https://x.y:8443/keys?z=1",
        locations=(
            JwtLocation(header="x-token", prefix="Tok "),
            JwtLocation(header="y"),
            JwtLocation(parameter="p"),
            JwtLocation(cookie="c"),
        ),
        forward_token=True,
        payload_header="x-payload",
        claim_headers=(("x-sub", ("a", "b")),),
        timeout=2.0,
        space_delimited=("scope", "permission", "roles"),
    )
    assert rule(jwks='{"keys": []}').jwks == '{"keys": []}'


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"issuer": None}, "jwtRules[0].issuer: no value"),
        ({"issuer": ""}, "jwtRules[0].issuer: empty"),
        ({"isuer": "x"}, "jwtRules[0].isuer: unknown field"),
        ({"jwks": "{}", "jwksUri": "https://x"}, "jwtRules[0].jwksUri: a rule has jwks or jwksUri, not both"),
        ({"jwks": "x" * 300_000}, "jwtRules[0].jwks: more than 262144 characters"),
        ({"jwksUri": "ftp://x"}, "jwtRules[0].jwksUri: not a URI of http or https"),
        ({"jwksUri": "https://x/#f"}, "jwtRules[0].jwksUri: not a URI"),
        ({"jwksUri": "https://x/" + "a" * 2048}, "jwtRules[0].jwksUri: not a URI"),
        ({"fromHeaders": [{"name": "a b"}]}, "fromHeaders[0].name: not a header name"),
        ({"outputPayloadToHeader": "host"}, "outputPayloadToHeader: not a header that a proxy may write a token to"),
        ({"outputClaimToHeaders": [{"header": ":path", "claim": "a"}]}, "header: not a header that a proxy may write"),
        ({"outputClaimToHeaders": [{"claim": "a"}]}, "outputClaimToHeaders[0].header: required"),
        ({"timeout": "0s"}, "timeout: not more than nothing"),
        ({"audiences": "x"}, "audiences: not a list"),
    ],
)
def test_what_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ManifestError) as caught:
        rule(**fields)
    assert message in str(caught.value)


def test_a_refused_one_accepts_no_token_where_it_was_attached() -> None:
    wrong = body({"issuer": 5})
    with pytest.raises(ManifestError) as caught:
        parse(wrong, "test")
    refused = stand_in(wrong, caught.value)
    assert isinstance(refused, RefusedPolicy)
    (placed,) = placed_authentications([refused])
    assert placed.targets == (TargetRef("Service", "s"),)
    assert "no token is accepted" in placed.value.reason


def test_one_with_a_selector_is_for_nobody() -> None:
    found = parse(body({"issuer": "i"}, targetRefs=None, selector={"matchLabels": {"a": "b"}}) | {"spec": {"jwtRules": []}}, "test")
    assert placed_authentications([found]) == ()
