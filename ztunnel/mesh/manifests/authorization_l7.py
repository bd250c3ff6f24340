"""AuthorizationPolicy with `targetRefs`: read into what an L7 proxy enforces.

As strict as the L4 reader: what is misspelt or could never match is refused, and a refused policy denies everything that it is attached
to. Attributes that exist but not where the rule is asked are dropped as Istio does it: in an ALLOW policy the rule never matches (a
smaller allow set), in a DENY, AUDIT or CUSTOM policy the attribute is ignored and the rest decides (a bigger deny set). That concerns
attributes of requests on a TCP port, those of tokens in CUSTOM policies (which are asked before tokens are looked at), and Envoy's
filter metadata everywhere.
Source: Istio API reference of AuthorizationPolicy; `pilot/pkg/security/authz/model`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

from ztunnel.mesh.l7.routes import TextKind, TextMatch
from ztunnel.mesh.l7.security import Condition, L7Action, L7Policy, L7Rule, Operation, Source
from ztunnel.mesh.manifests.elements import account, block, each, principal, some, string
from ztunnel.mesh.manifests.fields import Field
from ztunnel.mesh.manifests.metadata import Metadata
from ztunnel.mesh.rules import StringKind, StringMatch

MAX_RULES: Final = 512
MAX_ACCOUNTS: Final = 16
_Part = TypeVar("_Part", Source, Operation)
_SPEC = ("action", "provider", "rules", "targetRef", "targetRefs")
_SOURCE = {
    "principals": "principals",
    "requestPrincipals": "request_principals",
    "namespaces": "namespaces",
    "trustDomains": "trust_domains",
    "serviceAccounts": "service_accounts",
    "ipBlocks": "ips",
    "remoteIpBlocks": "remote_ips",
}
_OPERATION = {"hosts": "hosts", "ports": "ports", "methods": "methods", "paths": "paths"}
_KINDS = {
    StringKind.EXACT: TextKind.EXACT,
    StringKind.PREFIX: TextKind.PREFIX,
    StringKind.SUFFIX: TextKind.SUFFIX,
    StringKind.PRESENCE: TextKind.PRESENT,
}
_ADDRESS_KEYS = ("source.ip", "remote.ip", "destination.ip")
_TEXT_KEYS = (
    *("source.namespace", "source.principal", "source.trustDomain", "source.serviceAccount", "destination.port", "connection.sni"),
    *("request.auth.principal", "request.auth.audiences", "request.auth.presenter"),
)
_BRACKETED = re.compile(
    r"(request\.headers|request\.auth\.claims|experimental\.envoy\.filters\.[^\[\]]{1,200})((?:\[[^\[\]]{1,200}\]){1,16})"
)
_HEADER = re.compile(r":?[!#$%&'*+.^_`|~0-9A-Za-z-]{1,200}")
_TOKEN_SOURCE = ("request_principals", "not_request_principals")
_HTTP_SOURCE = (*_TOKEN_SOURCE, "remote_ips", "not_remote_ips")
_HTTP_OPERATION = (*("hosts", "not_hosts", "methods", "not_methods", "paths", "not_paths", "path_templates", "not_path_templates"),)
NEVER: Final = L7Rule(never=True)


def read_l7_policy(spec: Field, metadata: Metadata, dry_run: bool) -> L7Policy:
    """What a policy says to an L7 proxy.

    Raises:
        ManifestError: see the module's text.
    """
    spec.only(_SPEC)
    action = _action(spec.get("action"))
    rules = tuple(_rule(item, metadata.namespace) for item in spec.get("rules").items(MAX_RULES))
    notes: list[str] = []
    rules = _usable(rules, action, _BEFORE_TOKENS if action is L7Action.CUSTOM else _EVERYWHERE, notes)
    return L7Policy(
        name=metadata.name,
        namespace=metadata.namespace,
        action=action,
        rules=rules,
        tcp_rules=_usable(rules, action, _ON_TCP, []),
        provider=_provider(spec, action),
        dry_run=dry_run,
        reason="; ".join(notes[:4]),
    )


def refused_l7_policy(name: str, namespace: str, reason: str) -> L7Policy:
    """What is enforced in the place of a policy that was refused: nobody may."""
    everything = (L7Rule(),)
    return L7Policy(name, namespace, L7Action.DENY, everything, everything, reason=f"refused, so everything is denied: {reason}")


def _action(place: Field) -> L7Action:
    text = place.text(L7Action.ALLOW.value)
    if text not in L7Action.__members__:
        raise place.wrong(f"not one of {', '.join(L7Action.__members__)}")
    return L7Action[text]


def _provider(spec: Field, action: L7Action) -> str:
    place = spec.get("provider")
    if action is not L7Action.CUSTOM:
        if not place.absent:
            raise place.error("only CUSTOM policies have a provider")
        return ""
    place.only(("name",))
    return place.get("name").text()


def _rule(place: Field, namespace: str) -> L7Rule:
    if place.absent:
        raise place.error("a rule without content: write {} for one that matches everything")
    place.only(("from", "to", "when"))
    return L7Rule(
        sources=tuple(_source(item, namespace) for item in _members(place.get("from"), "source")),
        operations=tuple(_operation(item) for item in _members(place.get("to"), "operation")),
        conditions=tuple(_condition(item, namespace) for item in place.get("when").items()),
    )


def _members(place: Field, name: str) -> list[Field]:
    members: list[Field] = []
    for item in [] if place.absent else some(place):
        item.only((name,))
        if item.get(name).absent:
            raise item.get(name).error("required")
        members.append(item.get(name))
    return members


def _source(place: Field, namespace: str) -> Source:
    place.only([*_SOURCE, *map(_negated, _SOURCE)])
    for prefix in ("serviceAccounts", "notServiceAccounts"):
        accounts = place.get(prefix)
        if len(accounts.items()) > MAX_ACCOUNTS:
            raise accounts.error(f"more than {MAX_ACCOUNTS} service accounts")
    if not place.get("serviceAccounts").absent:
        for other in ("principals", "namespaces"):
            if not place.get(other).absent:
                raise place.get(other).error("not together with serviceAccounts")
    members: dict[str, object] = {}
    for name, attribute in _SOURCE.items():
        read = _source_reader(name, namespace)
        members[attribute] = each(place.get(name), read)
        members[f"not_{attribute}"] = each(place.get(_negated(name)), read)
    if not any(members.values()):
        raise place.error("empty: name at least one field")
    return Source(**members)  # type: ignore[arg-type]  # one reader for each field, above


def _source_reader(name: str, namespace: str) -> Callable[[Field], object]:
    if name == "serviceAccounts":
        return lambda item: account(item, namespace)
    if name in ("ipBlocks", "remoteIpBlocks"):
        return block
    return _principal_text if name == "principals" else _text


def _operation(place: Field) -> Operation:
    place.only([*_OPERATION, *map(_negated, _OPERATION)])
    read: dict[str, Callable[[Field], object]] = {"hosts": _host, "ports": Field.port_text, "methods": _text}
    members: dict[str, object] = {}
    for name, reader in read.items():
        members[name] = each(place.get(name), reader)
        members[f"not_{name}"] = each(place.get(_negated(name)), reader)
    for name, prefix in (("paths", ""), ("notPaths", "not_")):
        found = each(place.get(name), _path)
        members[f"{prefix}paths"] = tuple(item for item in found if isinstance(item, TextMatch))
        members[f"{prefix}path_templates"] = tuple(item for item in found if isinstance(item, str))
    if not any(members.values()):
        raise place.error("empty: name at least one field")
    return Operation(**members)  # type: ignore[arg-type]  # one reader for each field, above


def _negated(name: str) -> str:
    return f"not{name[0].upper()}{name[1:]}"


def _condition(place: Field, namespace: str) -> Condition:
    place.only(("key", "values", "notValues"))
    values, excluded = place.get("values"), place.get("notValues")
    if values.absent and excluded.absent:
        raise place.error("needs values or notValues")
    key, path = _key(place.get("key"))
    if key in _ADDRESS_KEYS:
        return Condition(key, path, cidrs=each(values, block), not_cidrs=each(excluded, block))
    read = _value_reader(key, namespace)
    return Condition(key, path, each(values, read), each(excluded, read))


def _key(place: Field) -> tuple[str, tuple[str, ...]]:
    text = place.text()
    if text in _ADDRESS_KEYS or text in _TEXT_KEYS:
        return text, ()
    found = _BRACKETED.fullmatch(text)
    if found is None:
        raise place.wrong("unknown condition")
    path = tuple(found[2][1:-1].split("]["))
    if found[1] == "request.headers":
        if len(path) > 1 or not _HEADER.fullmatch(path[0]):
            raise place.wrong("not the name of a header")
        return found[1], (path[0].lower(),)
    return found[1], path


def _value_reader(key: str, namespace: str) -> Callable[[Field], TextMatch]:
    match key:
        case "source.principal":
            return _principal_text
        case "source.serviceAccount":
            return lambda item: _exact("/".join(_account_parts(item, namespace)))
        case "destination.port":
            return lambda item: _exact(str(item.port_text()))
        case _:
            return _text


def _account_parts(item: Field, namespace: str) -> tuple[str, str]:
    found = account(item, namespace)
    return found.namespace, found.service_account


def _exact(value: str) -> TextMatch:
    return TextMatch(TextKind.EXACT, value)


def _matched(found: StringMatch, ignore_case: bool = False) -> TextMatch:
    return TextMatch(_KINDS[found.kind], found.value, ignore_case)


def _text(place: Field) -> TextMatch:
    return _matched(string(place))


def _host(place: Field) -> TextMatch:
    found = string(place)
    return _matched(StringMatch(found.kind, found.value.lower()), ignore_case=True)


def _principal_text(place: Field) -> TextMatch:
    return _matched(principal(place))


def _path(place: Field) -> TextMatch | str:
    text = place.text()
    if "{" not in text and "}" not in text:
        return _text(place)
    if not is_template(text):
        raise place.wrong(
            "not a path template: {*} stands for one whole segment, {**} for the rest and comes last, and nothing else has braces"
        )
    return text


def is_template(text: str) -> bool:
    """Whether it is a path with `{*}` or `{**}` where they may be."""
    if not text.startswith("/"):
        return False
    segments = text[1:].split("/")
    operators = [segment for segment in segments if segment in ("{*}", "{**}")]
    if not operators or "{**}" in operators[:-1]:
        return False
    return not any("{" in segment or "}" in segment or "*" in segment for segment in segments if segment not in ("{*}", "{**}"))


# What cannot be checked where a rule is asked.


@dataclass(frozen=True, slots=True)
class _Unknown:
    """Fields of sources and operations, and beginnings of conditions' keys."""

    source: tuple[str, ...] = ()
    operation: tuple[str, ...] = ()
    keys: tuple[str, ...] = ("experimental.",)


_EVERYWHERE = _Unknown()
_BEFORE_TOKENS = _Unknown(source=_TOKEN_SOURCE, keys=("experimental.", "request.auth."))
_ON_TCP = _Unknown(_HTTP_SOURCE, _HTTP_OPERATION, ("experimental.", "request.", "remote."))


def _usable(rules: Sequence[L7Rule], action: L7Action, unknown: _Unknown, notes: list[str]) -> tuple[L7Rule, ...]:
    kept: list[L7Rule] = []
    for index, rule in enumerate(rules):
        stripped = _stripped(rule, unknown)
        if stripped == rule:
            kept.append(rule)
        elif action is L7Action.ALLOW:
            notes.append(f"spec.rules[{index}] never matches: it needs what a proxy does not know when it asks")
            kept.append(NEVER)
        else:
            notes.append(f"spec.rules[{index}] matches more than written: it needs what a proxy does not know when it asks")
            kept.append(stripped)
    return tuple(kept)


def _stripped(rule: L7Rule, unknown: _Unknown) -> L7Rule:
    sources = tuple(_without(each, unknown.source) for each in rule.sources)
    operations = tuple(_without(each, unknown.operation) for each in rule.operations)
    # An alternative of which nothing is left limits nothing, and so lifts the whole list.
    return replace(
        rule,
        sources=() if Source() in sources else sources,
        operations=() if Operation() in operations else operations,
        conditions=tuple(each for each in rule.conditions if not each.key.startswith(unknown.keys)),
    )


def _without(part: _Part, names: tuple[str, ...]) -> _Part:
    gone: dict[str, Any] = {name: () for name in names if getattr(part, name)}
    return replace(part, **gone) if gone else part
