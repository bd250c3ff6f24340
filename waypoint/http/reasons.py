"""Why a rule of an authorization policy does not match a request, for people: the same tests as the verdict's, one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

from waypoint.http.rules import (
    Facts,
    claim_texts,
    compile_condition,
    compile_operation,
    compile_source,
    token_principal,
)
from ztunnel.mesh.l7.routes import TextKind, TextMatch
from ztunnel.mesh.l7.security import Condition, L7Rule, Operation, Source
from ztunnel.mesh.rules import Cidr, ServiceAccountMatch

_Part = TypeVar("_Part", Source, Operation)
SHOWN = 4
"""Values of one field that are told."""
LONGEST = 120


def why_not(rule: L7Rule, facts: Facts) -> str:
    """What of a rule does not match; empty if it matches. Every alternative of `from` and `to` is accounted for."""
    if rule.never:
        return "it never matches: it needs what a proxy does not know when it asks"
    found: list[str] = []
    if rule.sources and not any(compile_source(source).holds(facts) for source in rule.sources):
        found.append(_alternatives("from", [_of_source(source, facts) for source in rule.sources]))
    if rule.operations and not any(compile_operation(operation).holds(facts) for operation in rule.operations):
        found.append(_alternatives("to", [_of_operation(operation, facts) for operation in rule.operations]))
    failing = [condition for condition in rule.conditions if not compile_condition(condition).holds(facts)]
    return "; ".join([*found, *(f"when: {_of_condition(condition, facts)}" for condition in failing)])


def _alternatives(name: str, reasons: Sequence[str]) -> str:
    if len(reasons) == 1:
        return f"{name}: {reasons[0]}"
    shown = " / ".join(reasons[:SHOWN])
    return f"{name}: none of {len(reasons)}: {shown}{' / …' if len(reasons) > SHOWN else ''}"


def _of_source(source: Source, facts: Facts) -> str:
    identity = facts.client.identity
    said = {
        "principals": facts.client.principal,
        "request_principals": token_principal(facts.claims).decode("utf-8", "replace"),
        "namespaces": "" if identity is None else identity.namespace,
        "trust_domains": "" if identity is None else identity.trust_domain,
        "service_accounts": "" if identity is None else f"{identity.namespace}/{identity.service_account}",
        "ips": facts.client.address,
        "remote_ips": facts.remote_address(),
    }
    return next(_first(source, Source(), said, lambda part: not compile_source(part).holds(facts)), "it does not match")


def _of_operation(operation: Operation, facts: Facts) -> str:
    path = facts.path.decode("ascii", "backslashreplace")
    said = {
        "hosts": facts.host().decode("ascii", "backslashreplace"),
        "ports": str(facts.client.service_port),
        "methods": facts.request.method.decode("ascii", "backslashreplace"),
        "paths": path,
        "path_templates": path,
    }
    if (operation.paths and operation.path_templates) or (operation.not_paths and operation.not_path_templates):
        values = _shown([*operation.paths, *operation.path_templates, *operation.not_paths, *operation.not_path_templates])
        return f"path {_quoted(path)} against {values}"
    return next(_first(operation, Operation(), said, lambda part: not compile_operation(part).holds(facts)), "it does not match")


def _first(part: _Part, empty: _Part, said: dict[str, str], fails: Callable[[_Part], bool]) -> Iterator[str]:
    """The fields that alone do not match, as sentences."""
    for each in fields(part):
        values = getattr(part, each.name)
        alone: dict[str, Any] = {each.name: values}
        if not values or not fails(replace(empty, **alone)):
            continue
        negated = each.name.startswith("not_")
        name = each.name.removeprefix("not_")
        is_what = "is one of" if negated else "is none of"
        yield f"{_WORDS[name]} {_quoted(said[name])} {is_what} {_shown(values)}"


_WORDS = {
    "principals": "principal",
    "request_principals": "token's principal",
    "namespaces": "namespace",
    "trust_domains": "trust domain",
    "service_accounts": "service account",
    "ips": "address",
    "remote_ips": "remote address",
    "hosts": "host",
    "ports": "port",
    "methods": "method",
    "paths": "path",
    "path_templates": "path",
}


def _of_condition(condition: Condition, facts: Facts) -> str:
    name = condition.key + "".join(f"[{part}]" for part in condition.path)
    wanted, unwanted = (*condition.values, *condition.cidrs), (*condition.not_values, *condition.not_cidrs)
    parts = [f"is none of {_shown(wanted)}"] if wanted else []
    if unwanted:
        parts.append(f"is one of {_shown(unwanted)}")
    return f"{name} {_quoted(_value(condition, facts))} {' or '.join(parts)}"


def _value(condition: Condition, facts: Facts) -> str:
    client, claims = facts.client, facts.claims
    match condition.key:
        case "request.headers":
            return facts.header(condition.path[0].encode()).decode("ascii", "backslashreplace")
        case "request.auth.claims":
            return "" if claims is None else ", ".join(claim_texts(claims.values, condition.path))
        case "request.auth.audiences":
            return "" if claims is None else ", ".join(claims.audiences)
        case "request.auth.presenter":
            return "" if claims is None else claims.presenter
        case "request.auth.principal":
            return token_principal(claims).decode("utf-8", "replace")
        case "source.ip":
            return client.address
        case "remote.ip":
            return facts.remote_address()
        case "destination.ip":
            return client.destination
        case "destination.port":
            return str(client.service_port)
        case "connection.sni":
            return client.sni
        case "source.namespace":
            return "" if client.identity is None else client.identity.namespace
        case "source.trustDomain":
            return "" if client.identity is None else client.identity.trust_domain
        case "source.serviceAccount":
            return "" if client.identity is None else f"{client.identity.namespace}/{client.identity.service_account}"
        case _:
            return client.principal


def _shown(values: Iterable[object]) -> str:
    listed = [_one(value) for value in values]
    return ", ".join(listed[:SHOWN]) + (f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else "")


def _one(value: object) -> str:
    if isinstance(value, TextMatch):
        forms = {TextKind.PREFIX: f"{value.value}*", TextKind.SUFFIX: f"*{value.value}", TextKind.PRESENT: "*"}
        return forms.get(value.kind, value.value)
    if isinstance(value, Cidr):
        return f"{value.network}/{value.prefix}"
    if isinstance(value, ServiceAccountMatch):
        return f"{value.namespace}/{value.service_account}"
    return str(value)


def _quoted(text: str) -> str:
    return f'"{text[:LONGEST]}"' if text else "(none)"
