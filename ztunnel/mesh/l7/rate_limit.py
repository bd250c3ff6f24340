"""Local rate limits as people write them: an annotation on a Service, an HTTPRoute, a GRPCRoute or a VirtualService.

    ztunnel.io/local-rate-limit: "100/s burst 200, 10/s per-client"

Each limit is `TOKENS/UNIT` (s, m or h), then in any order `burst TOKENS` (the same as TOKENS where it is not said) and `per-client` (one
bucket for each client identity). All of them must have a token left. A Service's limits count all requests to one of its ports, a route's
those that it takes; a request that is one too many is answered 429 `local_rate_limited`.
Istio has no resource for this but EnvoyFilter, which waypoints do not take; the semantics are those of Envoy's local rate limit.
"""

from __future__ import annotations

import re

from ztunnel.mesh.l7.routes import RateLimit
from ztunnel.mesh.manifests.fields import Field

ANNOTATION = "ztunnel.io/local-rate-limit"
MAX_LIMITS = 8
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
_RATE = re.compile(r"([0-9]{1,9})/([smh])")
_TOKENS = re.compile(r"[0-9]{1,9}")


def parse_rate_limits(text: str, origin: str) -> tuple[RateLimit, ...]:
    """The limits that an annotation says.

    Args:
        origin: the object that it is on: routes that share its limits share the buckets.
    Raises:
        ValueError: it says something else.
    """
    parts = text.split(",")
    if len(parts) > MAX_LIMITS:
        raise ValueError(f"at most {MAX_LIMITS} limits")
    return tuple(_limit(part.split(), origin) for part in parts)


def _limit(words: list[str], origin: str) -> RateLimit:
    rate = _RATE.fullmatch(words[0]) if words else None
    if rate is None or int(rate[1]) == 0:
        raise ValueError(f'a limit begins like "100/s", "6000/m" or "10/h", not {" ".join(words)!r:.60}')
    tokens = burst = int(rate[1])
    per_client = False
    rest = iter(words[1:])
    for word in rest:
        if word == "per-client":
            per_client = True
        elif word == "burst":
            number = next(rest, "")
            if _TOKENS.fullmatch(number) is None or int(number) == 0:
                raise ValueError(f"burst is followed by a number of requests, not {number!r:.40}")
            burst = int(number)
        else:
            raise ValueError(f"{word!r:.40} is neither burst nor per-client")
    return RateLimit(tokens, _UNITS[rate[2]], burst, per_client, origin)


def check_rate_limits(document: Field) -> None:
    """Refuses a document whose annotation says no limits.

    Raises:
        ManifestError: naming the annotation.
    """
    place = document.get("metadata").get("annotations").get(ANNOTATION)
    if not place.absent:
        try:
            parse_rate_limits(place.text(), "")
        except ValueError as error:
            raise place.error(str(error)) from None


def rate_limits(annotations: dict[str, str], origin: str) -> tuple[RateLimit, ...]:
    """The limits of an object whose document was checked."""
    text = annotations.get(ANNOTATION)
    return () if text is None else parse_rate_limits(text, origin)
