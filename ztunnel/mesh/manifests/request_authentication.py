"""RequestAuthentication: whose tokens an L7 proxy verifies, and what it makes of them.

Only those with `targetRefs` mean anything to us: with a selector they are for sidecars, which there are none of. One that is refused
lets no token pass, since nobody can say which it would have accepted.
Source: Istio API reference of RequestAuthentication.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from ztunnel.mesh.l7.security import JwtAuthentication, JwtLocation, JwtRule
from ztunnel.mesh.manifests.fields import Field
from ztunnel.mesh.manifests.metadata import Metadata, read_metadata
from ztunnel.mesh.manifests.selectors import SPEC, TargetRef, read_selector, read_targets
from ztunnel.mesh.manifests.values import header_name, positive_duration

MAX_RULES: Final = 255
MAX_LOCATIONS: Final = 16
LONGEST_URI: Final = 2048
LONGEST_JWKS: Final = 1 << 18
"""Characters of an inline key set; what identity providers publish has a few thousand."""
_SPEC = ("jwtRules", "selector", "targetRef", "targetRefs")
_RULE = (
    *("issuer", "audiences", "jwksUri", "jwks_uri", "jwks", "fromHeaders", "fromParams", "fromCookies", "outputPayloadToHeader"),
    *("forwardOriginalToken", "outputClaimToHeaders", "timeout", "spaceDelimitedClaims"),
)
_URI = re.compile(r"https?://[A-Za-z0-9.\[\]:_~%-]{1,300}(?:/[!-\"$-~]*)?(?:\?[!-\"$-~]*)?")
_RESERVED = frozenset({"host", "content-length", "transfer-encoding", "connection", "te", "upgrade"})
"""Headers that carry the message itself: no claim may be written to them."""
_DEFAULTS = JwtRule("").locations


@dataclass(frozen=True, slots=True)
class RequestAuthenticationObject:
    """One RequestAuthentication."""

    metadata: Metadata
    authentication: JwtAuthentication
    targets: tuple[TargetRef, ...] = ()
    """Empty: it is for pods, and of those only an ingress gateway's look at tokens."""
    selector: dict[str, str] | None = None


def read_request_authentication(document: Field) -> RequestAuthenticationObject:
    """A RequestAuthentication.

    Raises:
        ManifestError: an unknown or misspelt field, or a value that is not what it should be.
    """
    document.only(SPEC)
    metadata = read_metadata(document)
    spec = document.get("spec")
    spec.only(_SPEC)
    selector = read_selector(spec)
    rules = tuple(_rule(item) for item in spec.get("jwtRules").items(MAX_RULES))
    authentication = JwtAuthentication(metadata.name, metadata.namespace, rules)
    return RequestAuthenticationObject(metadata, authentication, read_targets(spec), selector)


def refused_authentication(name: str, namespace: str, reason: str) -> JwtAuthentication:
    """What is in force in the place of one that was refused."""
    return JwtAuthentication(name, namespace, reason=f"refused, so no token is accepted: {reason}")


def _rule(place: Field) -> JwtRule:
    place.only(_RULE)
    uri = place.get("jwksUri") if not place.get("jwksUri").absent else place.get("jwks_uri")
    jwks = place.get("jwks")
    if not uri.absent and not jwks.absent:
        raise uri.error("a rule has jwks or jwksUri, not both")
    return JwtRule(
        issuer=place.get("issuer").text(),
        audiences=_texts(place.get("audiences")),
        jwks=_jwks(jwks),
        jwks_uri="" if uri.absent else _uri(uri),
        locations=_locations(place),
        forward_token=place.get("forwardOriginalToken").boolean(),
        payload_header=_header(place.get("outputPayloadToHeader")),
        claim_headers=tuple(_claim(item) for item in place.get("outputClaimToHeaders").items(64)),
        timeout=positive_duration(place.get("timeout"), 5.0),
        space_delimited=tuple(dict.fromkeys((*JwtRule("").space_delimited, *_texts(place.get("spaceDelimitedClaims"))))),
    )


def _texts(place: Field) -> tuple[str, ...]:
    return tuple(dict.fromkeys(item.text() for item in place.items(64)))


def _jwks(place: Field) -> str:
    if place.absent:
        return ""
    text = place.text()
    if len(text) > LONGEST_JWKS:
        raise place.error(f"more than {LONGEST_JWKS} characters")
    return text


def _uri(place: Field) -> str:
    text = place.text()
    if len(text) > LONGEST_URI or not _URI.fullmatch(text):
        raise place.wrong(f"not a URI of http or https with at most {LONGEST_URI} characters")
    return text


def _locations(place: Field) -> tuple[JwtLocation, ...]:
    found: list[JwtLocation] = []
    for item in place.get("fromHeaders").items(MAX_LOCATIONS):
        item.only(("name", "prefix"))
        prefix = item.get("prefix")
        found.append(JwtLocation(header=header_name(item.get("name")), prefix="" if prefix.value in (None, "") else prefix.text()))
    found += [JwtLocation(parameter=item.text()) for item in place.get("fromParams").items(MAX_LOCATIONS)]
    found += [JwtLocation(cookie=item.text()) for item in place.get("fromCookies").items(MAX_LOCATIONS)]
    return tuple(dict.fromkeys(found)) or _DEFAULTS


def _header(place: Field) -> str:
    if place.absent:
        return ""
    name = header_name(place)
    if name in _RESERVED or name.startswith(":"):
        raise place.wrong("not a header that a proxy may write a token to")
    return name


def _claim(place: Field) -> tuple[str, tuple[str, ...]]:
    place.only(("header", "claim"))
    place.get("header").text()
    return _header(place.get("header")), tuple(place.get("claim").text().split("."))
