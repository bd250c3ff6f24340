"""Rules of authorization policies compiled into tests of one request; what is left of a rule is one test for each field that it names.

A request's attributes are what the proxy knows itself: the client's identity and address from its connection, the token's claims after
verification, the rest from the (normalised) request.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from waypoint.http.messages import Client, Request
from waypoint.http.paths import Template
from ztunnel.mesh.addresses import block_bounds, canonical, number
from ztunnel.mesh.l7.routes import TextKind, TextMatch
from ztunnel.mesh.l7.security import Claims, Condition, L7Rule, Operation, Source
from ztunnel.mesh.rules import Cidr

_NO_REQUEST: Final = Request(b"", b"", b"", [])
MAX_DEPTH: Final = 16
"""Of claims within claims."""


class Facts:
    """What rules ask about: one request of one client, or one connection (an empty request)."""

    __slots__ = ("claims", "client", "path", "request")

    def __init__(self, request: Request | None, client: Client, claims: Claims | None) -> None:
        self.client = client
        self.claims = claims
        self.request = _NO_REQUEST if request is None else request
        self.path = self.request.path.partition(b"?")[0]

    def host(self) -> bytes:
        """As sent, with its port, in lower case and without the root's dot, which does not count for a gateway's routes either."""
        name, colon, port = self.request.authority.lower().partition(b":")
        return name.rstrip(b".") + colon + port

    def header(self, name: bytes) -> bytes:
        """A header's values joined, or a pseudo-header; empty without one."""
        if name.startswith(b":") or name == b"host":
            request = self.request
            if name in (b":authority", b"host"):
                return request.authority
            return {b":method": request.method, b":path": request.path, b":scheme": request.scheme}.get(name, b"")
        return self.request.get(name) or b""

    def remote_address(self) -> str:
        """The last entry of X-Forwarded-For, else the peer; empty when that entry is no address."""
        forwarded = self.request.get(b"x-forwarded-for")
        if not forwarded:
            return self.client.address
        return canonical(forwarded.rpartition(b",")[2].strip().decode("ascii", "replace")) or ""


class Test:
    """One question about a request."""

    __slots__ = ()

    def holds(self, facts: Facts) -> bool:
        """The answer."""
        raise NotImplementedError


class Always(Test):
    """No limit."""

    __slots__ = ()

    def holds(self, facts: Facts) -> bool:
        return True


class Never(Test):
    """Nothing."""

    __slots__ = ()

    def holds(self, facts: Facts) -> bool:
        return False


class Every(Test):
    """An AND."""

    __slots__ = ("tests",)

    def __init__(self, tests: list[Test]) -> None:
        self.tests = tests

    def holds(self, facts: Facts) -> bool:
        for test in self.tests:  # noqa: SIM110 - a generator costs more than the tests in it
            if not test.holds(facts):
                return False
        return True


class Some(Test):
    """An OR."""

    __slots__ = ("tests",)

    def __init__(self, tests: list[Test]) -> None:
        self.tests = tests

    def holds(self, facts: Facts) -> bool:
        for test in self.tests:  # noqa: SIM110 - as above
            if test.holds(facts):
                return True
        return False


class Not(Test):
    """The opposite."""

    __slots__ = ("test",)

    def __init__(self, test: Test) -> None:
        self.test = test

    def holds(self, facts: Facts) -> bool:
        return not self.test.holds(facts)


class Texts:
    """Comparisons of one text, sorted by how they are looked up. Nothing matches the empty text: it means that there is none."""

    __slots__ = ("exact", "only_exact", "prefixes", "present", "suffixes")

    def __init__(self, matches: Sequence[TextMatch]) -> None:
        def of(kind: TextKind) -> tuple[bytes, ...]:
            return tuple(match.value.encode() for match in matches if match.kind is kind)

        self.exact = frozenset(of(TextKind.EXACT))
        self.prefixes = of(TextKind.PREFIX)
        self.suffixes = of(TextKind.SUFFIX)
        self.present = any(match.kind is TextKind.PRESENT for match in matches)
        self.only_exact = not (self.prefixes or self.suffixes or self.present)

    def match(self, value: bytes) -> bool:
        """Whether any of them is true."""
        if self.only_exact:
            return value in self.exact
        if not value:
            return False
        return self.present or value in self.exact or value.startswith(self.prefixes) or value.endswith(self.suffixes)


class Attribute(Test):
    """Comparisons of one attribute that a request has once."""

    __slots__ = ("texts",)

    def __init__(self, texts: Texts) -> None:
        self.texts = texts

    def value(self, facts: Facts) -> bytes:
        """Empty: it has none."""
        raise NotImplementedError

    def holds(self, facts: Facts) -> bool:
        return self.texts.match(self.value(facts))


class Principal(Attribute):
    """The client's identity without its scheme."""

    def value(self, facts: Facts) -> bytes:
        return facts.client.principal_bytes


class Namespace(Attribute):
    """Of the client's identity."""

    def value(self, facts: Facts) -> bytes:
        identity = facts.client.identity
        return b"" if identity is None else identity.namespace.encode()


class TrustDomain(Attribute):
    """Of the client's identity."""

    def value(self, facts: Facts) -> bytes:
        identity = facts.client.identity
        return b"" if identity is None else identity.trust_domain.encode()


class Account(Attribute):
    """`namespace/name` of the client's service account."""

    def value(self, facts: Facts) -> bytes:
        identity = facts.client.identity
        return b"" if identity is None else f"{identity.namespace}/{identity.service_account}".encode()


class TokenPrincipal(Attribute):
    """Of the verified token."""

    def value(self, facts: Facts) -> bytes:
        return token_principal(facts.claims)


def token_principal(claims: Claims | None) -> bytes:
    """`issuer/subject`; a token needs both to have one."""
    if claims is None or not claims.issuer or not claims.subject:
        return b""
    return claims.principal.encode("utf-8", "replace")


class Presenter(Attribute):
    """The token's authorized party (azp)."""

    def value(self, facts: Facts) -> bytes:
        return b"" if facts.claims is None else facts.claims.presenter.encode("utf-8", "replace")


class Host(Attribute):
    """Compared in lower case."""

    def value(self, facts: Facts) -> bytes:
        return facts.host()


class Method(Attribute):
    """Of the request."""

    def value(self, facts: Facts) -> bytes:
        return facts.request.method


class Path(Attribute):
    """Without its query."""

    def value(self, facts: Facts) -> bytes:
        return facts.path


class ServerName(Attribute):
    """Of the connection's TLS hello."""

    def value(self, facts: Facts) -> bytes:
        return facts.client.sni.encode()


class Header(Attribute):
    """One header."""

    __slots__ = ("name",)

    def __init__(self, texts: Texts, name: bytes) -> None:
        super().__init__(texts)
        self.name = name

    def value(self, facts: Facts) -> bytes:
        return facts.header(self.name)


class Templates(Test):
    """Path templates."""

    __slots__ = ("templates",)

    def __init__(self, texts: Sequence[str]) -> None:
        self.templates = [Template(text) for text in texts]

    def holds(self, facts: Facts) -> bool:
        return any(template.matches(facts.path) for template in self.templates)


class Port(Test):
    """The port that the client addressed."""

    __slots__ = ("ports",)

    def __init__(self, ports: Sequence[int]) -> None:
        self.ports = frozenset(ports)

    def holds(self, facts: Facts) -> bool:
        return facts.client.service_port in self.ports


class Audience(Test):
    """Any of the token's audiences."""

    __slots__ = ("texts",)

    def __init__(self, texts: Texts) -> None:
        self.texts = texts

    def holds(self, facts: Facts) -> bool:
        claims = facts.claims
        return claims is not None and any(self.texts.match(each.encode("utf-8", "replace")) for each in claims.audiences)


class Claim(Test):
    """A claim of the token, or any member of one that is a list."""

    __slots__ = ("path", "texts")

    def __init__(self, texts: Texts, path: tuple[str, ...]) -> None:
        self.texts = texts
        self.path = path

    def holds(self, facts: Facts) -> bool:
        if facts.claims is None:
            return False
        return any(self.texts.match(each.encode("utf-8", "replace")) for each in claim_texts(facts.claims.values, self.path))


def claim_texts(values: dict[str, object], path: tuple[str, ...]) -> list[str]:
    """The texts at a path of a token's payload; numbers and booleans as JSON writes them; none for what is not there."""
    value: object = values
    for name in path[:MAX_DEPTH]:
        if not isinstance(value, dict):
            return []
        value = value.get(name)
    if isinstance(value, list):
        return [text for text in map(_scalar, value) if text is not None]
    text = _scalar(value)
    return [] if text is None else [text]


def _scalar(value: object) -> str | None:
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, int) else None


class Blocks(Test):
    """The peer's address (what is connected to us)."""

    __slots__ = ("bounds",)

    def __init__(self, blocks: Sequence[Cidr]) -> None:
        self.bounds = tuple(block_bounds(block) for block in blocks)

    def address(self, facts: Facts) -> str:
        """Canonical."""
        return facts.client.address

    def holds(self, facts: Facts) -> bool:
        bits, value = number(self.address(facts))
        return any(bits == block_bits and first <= value <= last for block_bits, first, last in self.bounds)


class RemoteBlocks(Blocks):
    """The client's address as the last proxy in front of us says."""

    __slots__ = ()

    def address(self, facts: Facts) -> str:
        return facts.remote_address()


class DestinationBlocks(Blocks):
    """The address that the client addressed."""

    __slots__ = ()

    def address(self, facts: Facts) -> str:
        return facts.client.destination


# Compilation.


def compile_rule(rule: L7Rule) -> Test:
    """The test of one rule."""
    if rule.never:
        return Never()
    tests: list[Test] = []
    if rule.sources:
        tests.append(_some([compile_source(source) for source in rule.sources]))
    if rule.operations:
        tests.append(_some([compile_operation(operation) for operation in rule.operations]))
    tests.extend(compile_condition(condition) for condition in rule.conditions)
    return _every(tests)


def _every(tests: list[Test]) -> Test:
    if not tests:
        return Always()
    return tests[0] if len(tests) == 1 else Every(tests)


def _some(tests: list[Test]) -> Test:
    return tests[0] if len(tests) == 1 else Some(tests)


class _Fields:
    """The tests of a source or an operation, collected."""

    def __init__(self) -> None:
        self.tests: list[Test] = []

    def texts(self, kind: type[Attribute], wanted: Sequence[TextMatch], unwanted: Sequence[TextMatch]) -> None:
        if wanted:
            self.tests.append(kind(Texts(wanted)))
        if unwanted:
            self.tests.append(Not(kind(Texts(unwanted))))

    def blocks(self, kind: type[Blocks], wanted: Sequence[Cidr], unwanted: Sequence[Cidr]) -> None:
        if wanted:
            self.tests.append(kind(wanted))
        if unwanted:
            self.tests.append(Not(kind(unwanted)))


def compile_source(source: Source) -> Test:
    """The test of one alternative of `from`."""
    fields = _Fields()
    fields.texts(Principal, source.principals, source.not_principals)
    fields.texts(TokenPrincipal, source.request_principals, source.not_request_principals)
    fields.texts(Namespace, source.namespaces, source.not_namespaces)
    fields.texts(TrustDomain, source.trust_domains, source.not_trust_domains)
    accounts, others = source.service_accounts, source.not_service_accounts
    fields.texts(
        Account,
        [TextMatch(TextKind.EXACT, f"{each.namespace}/{each.service_account}") for each in accounts],
        [TextMatch(TextKind.EXACT, f"{each.namespace}/{each.service_account}") for each in others],
    )
    fields.blocks(Blocks, source.ips, source.not_ips)
    fields.blocks(RemoteBlocks, source.remote_ips, source.not_remote_ips)
    return _every(fields.tests)


def compile_operation(operation: Operation) -> Test:
    """The test of one alternative of `to`."""
    fields = _Fields()
    if operation.ports:
        fields.tests.append(Port(operation.ports))
    if operation.not_ports:
        fields.tests.append(Not(Port(operation.not_ports)))
    fields.texts(Method, operation.methods, operation.not_methods)
    fields.texts(Host, host_texts(operation.hosts), host_texts(operation.not_hosts))
    if operation.paths or operation.path_templates:
        fields.tests.append(_paths(operation.paths, operation.path_templates))
    if operation.not_paths or operation.not_path_templates:
        fields.tests.append(Not(_paths(operation.not_paths, operation.not_path_templates)))
    return _every(fields.tests)


def host_texts(matches: Sequence[TextMatch]) -> list[TextMatch]:
    """Comparisons in the form of `Facts.host`."""
    ends = (TextKind.EXACT, TextKind.SUFFIX)
    return [TextMatch(each.kind, each.value.lower().rstrip("." if each.kind in ends else "")) for each in matches]


def _paths(texts: Sequence[TextMatch], templates: Sequence[str]) -> Test:
    tests: list[Test] = [Path(Texts(texts))] if texts else []
    if templates:
        tests.append(Templates(templates))
    return _some(tests)


_ATTRIBUTES: Final[dict[str, type[Attribute]]] = {
    "source.namespace": Namespace,
    "source.principal": Principal,
    "source.trustDomain": TrustDomain,
    "source.serviceAccount": Account,
    "request.auth.principal": TokenPrincipal,
    "request.auth.presenter": Presenter,
    "connection.sni": ServerName,
}
_ADDRESSES: Final[dict[str, type[Blocks]]] = {"source.ip": Blocks, "remote.ip": RemoteBlocks, "destination.ip": DestinationBlocks}


def compile_condition(condition: Condition) -> Test:
    """The test of one `when`."""
    fields = _Fields()
    if condition.key in _ADDRESSES:
        fields.blocks(_ADDRESSES[condition.key], condition.cidrs, condition.not_cidrs)
        return _every(fields.tests)
    tests: list[Test] = []
    if condition.values:
        tests.append(_value(condition, condition.values))
    if condition.not_values:
        tests.append(Not(_value(condition, condition.not_values)))
    return _every(tests)


def _value(condition: Condition, values: Sequence[TextMatch]) -> Test:
    key = condition.key
    if key in _ATTRIBUTES:
        return _ATTRIBUTES[key](Texts(values))
    if key == "destination.port":
        return Port([int(match.value) for match in values])
    if key == "request.headers":
        return Header(Texts(values), condition.path[0].encode())
    if key == "request.auth.audiences":
        return Audience(Texts(values))
    if key == "request.auth.claims":
        return Claim(Texts(values), condition.path)
    return Never()
