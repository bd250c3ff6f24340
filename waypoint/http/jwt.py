"""Tokens of requests: who the user is, and what the application is told of it.

A request without a token passes (policies may demand one); with one, some rule must accept it. Headers that carry verified claims are
removed from every request first, so that nobody forges them. Verified signatures are remembered, times and audiences are judged anew.
Source: Istio RequestAuthentication; Envoy `jwt_authn` (requires any of the rules, or no token).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final
from urllib.parse import quote

from waypoint.http.jws import NO_KEY_SET, Jws, KeySet, TokenError, read_key_set
from waypoint.http.messages import LocalReply, Request
from waypoint.http.rules import claim_texts
from ztunnel.mesh.l7.security import Claims, JwtAuthentication, JwtLocation, JwtRule

SKEW: Final = 60.0
"""Seconds that clocks may differ."""
MAX_REMEMBERED: Final = 1024
"""Tokens of one rule whose signature is known to be good."""
MAX_TOKENS: Final = 8
"""Of one request at the places of one rule."""
UNKNOWN_ISSUER: Final = "Jwt issuer is not configured"
WRONG_AUDIENCE: Final = "Audiences in Jwt are not allowed"
_REALM: Final = 256
_DISCOVERY: Final = "/.well-known/openid-configuration"


def key_set_source(rule: JwtRule) -> str:
    """Where a rule's keys are fetched from; empty for inline ones. What `KeySets` knows a set by."""
    if rule.jwks:
        return ""
    return rule.jwks_uri or rule.issuer.rstrip("/") + _DISCOVERY


class KeySets:
    """Fetched key sets, by source. A source that nobody has fetched yet has none, and its tokens are refused."""

    __slots__ = ("_sets",)

    def __init__(self) -> None:
        self._sets: dict[str, KeySet] = {}

    def put(self, source: str, jwks: str) -> None:
        """A set that was fetched; empty for one that could not be."""
        try:
            self._sets[source] = read_key_set(jwks) if jwks else _ABSENT
        except ValueError:
            self._sets[source] = _ABSENT

    def keep(self, sources: Iterable[str]) -> None:
        """Forgets all others."""
        wanted = set(sources)
        for source in [each for each in self._sets if each not in wanted]:
            del self._sets[source]

    def get(self, source: str) -> KeySet:
        """The set of a source."""
        return self._sets.get(source, _ABSENT)


_ABSENT: Final = KeySet((), NO_KEY_SET)


class _Place:
    """One place where a rule looks for its token."""

    __slots__ = ("cookie", "header", "parameter", "prefix")

    def __init__(self, location: JwtLocation) -> None:
        self.header = location.header.encode()
        self.prefix = location.prefix.encode().lower()
        self.parameter = location.parameter.encode()
        self.cookie = location.cookie.encode()

    def tokens(self, request: Request) -> list[bytes]:
        """All that are there. A header whose value does not begin with the prefix has none."""
        if self.header:
            size = len(self.prefix)
            values = [value for name, value in request.headers if name == self.header]
            return [value[size:].strip() for value in values if value[:size].lower() == self.prefix]
        if self.parameter:
            return [value for name, value in _parameters(request.path) if name == self.parameter]
        return [value for name, value in _cookies(request) if name == self.cookie]

    def remove(self, request: Request) -> None:
        """Takes the place's token out of the request."""
        if self.header:
            size = len(self.prefix)
            request.headers = [line for line in request.headers if line[0] != self.header or line[1][:size].lower() != self.prefix]
        elif self.parameter:
            _remove_parameter(request, self.parameter)
        else:
            _remove_cookie(request, self.cookie)


def _parameters(path: bytes) -> list[tuple[bytes, bytes]]:
    query = path.partition(b"?")[2]
    if not query:
        return []
    pairs = (pair.partition(b"=") for pair in query.split(b"&"))
    return [(name, value) for name, _, value in pairs]


def _remove_parameter(request: Request, name: bytes) -> None:
    path, _, query = request.path.partition(b"?")
    kept = b"&".join(pair for pair in query.split(b"&") if pair.partition(b"=")[0] != name)
    request.path = path + b"?" + kept if kept else path


def _cookies(request: Request) -> list[tuple[bytes, bytes]]:
    found = []
    for name, value in request.headers:
        if name == b"cookie":
            for pair in value.split(b";"):
                key, _, text = pair.strip().partition(b"=")
                found.append((key, text.strip(b'"')))
    return found


def _remove_cookie(request: Request, name: bytes) -> None:
    kept = []
    for line in request.headers:
        if line[0] == b"cookie":
            pairs = [pair.strip() for pair in line[1].split(b";")]
            rest = b"; ".join(pair for pair in pairs if pair.partition(b"=")[0] != name)
            if rest:
                kept.append((b"cookie", rest))
        else:
            kept.append(line)
    request.headers = kept


class _Verified:
    """A token with a good signature."""

    __slots__ = ("claims", "not_after", "not_before", "payload", "payload_text")

    def __init__(self, token: Jws, rule: JwtRule) -> None:
        self.payload = token.payload
        self.payload_text = token.payload_text
        self.not_before, self.not_after = _times(token.payload)
        self.claims = _claims(token.payload, rule)


class _Rule:
    """One rule at work."""

    __slots__ = ("_audiences", "_inline", "_places", "_remembered", "_rule", "_sets", "_source", "problem")

    def __init__(self, rule: JwtRule, sets: KeySets) -> None:
        self._rule = rule
        self._places = [_Place(location) for location in rule.locations]
        self._audiences = frozenset(_audience(each) for each in rule.audiences)
        self._sets = sets
        self._source = key_set_source(rule)
        self._inline: KeySet | None = None
        if rule.jwks:
            try:
                self._inline = read_key_set(rule.jwks)
            except ValueError as error:
                self._inline = KeySet((), str(error))
        self._remembered: dict[bytes, tuple[KeySet, _Verified]] = {}

    def tokens(self, request: Request) -> list[bytes]:
        found: list[bytes] = []
        for place in self._places:
            found += place.tokens(request)
        return [token for token in dict.fromkeys(found) if token]

    def accept(self, token: bytes, now: float) -> _Verified:
        """
        Raises:
            TokenError: this rule does not accept it.
        """
        keys = self._inline if self._inline is not None else self._sets.get(self._source)
        known = self._remembered.get(token)
        if known is not None and known[0] is keys:
            self._judge(known[1].payload, known[1].not_before, known[1].not_after, now)
            return known[1]
        parsed = Jws(token)
        self._judge(parsed.payload, *_times(parsed.payload), now)
        keys.verify(parsed)
        verified = _Verified(parsed, self._rule)
        self._remembered.pop(token, None)
        self._remembered[token] = (keys, verified)
        if len(self._remembered) > MAX_REMEMBERED:
            del self._remembered[next(iter(self._remembered))]
        return verified

    def _judge(self, payload: dict[str, object], not_before: float, not_after: float, now: float) -> None:
        if payload.get("iss") != self._rule.issuer:
            raise TokenError(UNKNOWN_ISSUER)
        if now < not_before - SKEW:
            raise TokenError("Jwt not yet valid")
        if not_after and now > not_after + SKEW:
            raise TokenError("Jwt is expired")
        if self._audiences and self._audiences.isdisjoint(_audience(each) for each in _texts(payload.get("aud"))):
            raise TokenError(WRONG_AUDIENCE, 403)

    def apply(self, request: Request, verified: _Verified) -> None:
        """What the rule says about the request that goes on."""
        if not self._rule.forward_token:
            for place in self._places:
                if place.tokens(request):
                    place.remove(request)
        if self._rule.payload_header:
            request.headers.append((self._rule.payload_header.encode(), verified.payload_text))
        for header, path in self._rule.claim_headers:
            value = _header_value(verified.payload, path)
            if value is not None:
                request.headers.append((header.encode(), value))


class JwtGate:
    """The RequestAuthentications that apply to one service (or pod, or host)."""

    __slots__ = ("_refused", "_rules", "_ours")

    def __init__(self, authentications: Sequence[JwtAuthentication], key_sets: KeySets) -> None:
        rules = [rule for each in authentications for rule in each.rules]
        self._rules = [_Rule(rule, key_sets) for rule in rules]
        headers = [header for rule in rules for header in (rule.payload_header, *(name for name, _ in rule.claim_headers)) if header]
        self._ours = frozenset(header.encode() for header in headers)
        self._refused = [_Rule(JwtRule(""), key_sets)] if any(each.reason for each in authentications) else []

    @property
    def is_idle(self) -> bool:
        """Whether it lets everything pass untouched."""
        return not self._rules and not self._refused

    def check(self, request: Request, now: float) -> Claims | LocalReply | None:
        """Claims of a verified token; None without a token; the answer to a request whose token is refused. Edits the request.

        Args:
            now: seconds since the epoch.
        """
        if self._ours:
            request.headers = [line for line in request.headers if line[0] not in self._ours]
        if _is_preflight(request):
            return None
        failure: TokenError | None = None
        for rule in self._rules:
            tokens = rule.tokens(request)
            if not tokens:
                continue
            try:
                verified = [_accept(rule, token, now, index) for index, token in enumerate(tokens)]
            except TokenError as error:
                if failure is None or failure.text == UNKNOWN_ISSUER:
                    failure = error
            else:
                rule.apply(request, verified[0])
                return verified[0].claims
        if failure is None and any(rule.tokens(request) for rule in self._refused):
            failure = TokenError(NO_KEY_SET)
        return None if failure is None else _refusal(request, failure)


def _accept(rule: _Rule, token: bytes, now: float, index: int) -> _Verified:
    if index == MAX_TOKENS:
        raise TokenError("Jwt is given more often than a request may give it")
    return rule.accept(token, now)


def _is_preflight(request: Request) -> bool:
    if request.method != b"OPTIONS":
        return False
    return bool(request.get(b"origin")) and bool(request.get(b"access-control-request-method"))


def _refusal(request: Request, error: TokenError) -> LocalReply:
    where = request.scheme + b"://" + request.authority + request.path.partition(b"?")[0]
    realm = quote(where[:_REALM].decode("latin-1"), safe=":/?#[]@!$&'()*+,;=%-._~", encoding="latin-1").encode()
    headers = [(b"content-type", b"text/plain"), (b"www-authenticate", b'Bearer realm="' + realm + b'", error="invalid_token"')]
    details = f"jwt_authn_access_denied{{{'_'.join(error.text.split())}}}"
    return LocalReply(error.status, error.text.encode(), headers, "UAEX", details)


# Payloads.


def _times(payload: Mapping[str, object]) -> tuple[float, float]:
    """Not before and not after; 0 where the token does not say."""
    found = []
    for name in ("nbf", "exp", "iat"):
        value = payload.get(name, 0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**63:
            raise TokenError(f"Jwt payload [{name}] field is not an integer or is out of range")
        found.append(float(value))
    return found[0], found[1]


def _texts(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return value
    if value is None:
        return []
    raise TokenError("Jwt payload [aud] field is not string or string list")


def _audience(text: str) -> str:
    """Without a scheme and a slash at the end, which do not count. Source: Envoy jwt_verify_lib `check_audience`."""
    return text.removeprefix("https://").removeprefix("http://").removesuffix("/")


def _claims(payload: dict[str, object], rule: JwtRule) -> Claims:
    subject, presenter = payload.get("sub", ""), payload.get("azp", "")
    if not isinstance(subject, str):
        raise TokenError("Jwt payload [sub] field is not a string")
    values = {name: _split(value) if name in rule.space_delimited else value for name, value in payload.items()}
    return Claims(rule.issuer, subject, tuple(_texts(payload.get("aud"))), presenter if isinstance(presenter, str) else "", values)


def _split(value: object) -> object:
    return value.split() if isinstance(value, str) else value


def _header_value(payload: dict[str, object], path: tuple[str, ...]) -> bytes | None:
    """Text, number or boolean at a path; None for anything else and for what no header can carry."""
    value: object = payload
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    if isinstance(value, list | dict) or value is None:
        return None
    texts = claim_texts({"value": value}, ("value",))
    said = texts[0].encode("utf-8", "replace") if texts else b""
    return said if texts and said.strip() == said and not any(byte < 0x20 or byte == 0x7F for byte in said) else None
