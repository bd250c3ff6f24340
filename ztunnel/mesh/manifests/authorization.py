"""AuthorizationPolicy: Istio's policy kind, read into the rules that L4 enforces; one with `targetRefs` is read by `authorization_l7`.

Read strictly: an unknown field, an empty list or a value that could never match is refused, because a restriction that silently
vanishes widens access. Fields that only an L7 proxy can check (users meet this without a waypoint):
in an ALLOW policy a rule that has one never matches (it could not be checked, so nothing may rely on it);
in a DENY policy they are dropped and the rest denies (more than was asked for, never less), and a rule that has nothing else is
refused, since it would otherwise deny nothing or everything.
Source: Istio `pilot/pkg/serviceregistry/ambient/authorization.go`; API reference of AuthorizationPolicy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ztunnel.mesh.errors import ManifestError
from ztunnel.mesh.l7.security import L7Policy
from ztunnel.mesh.manifests.authorization_l7 import read_l7_policy
from ztunnel.mesh.manifests.elements import account, block, each, principal, some, string
from ztunnel.mesh.manifests.fields import Field
from ztunnel.mesh.manifests.metadata import Metadata, read_metadata
from ztunnel.mesh.manifests.selectors import SPEC, TargetRef, read_selector, read_targets
from ztunnel.mesh.rules import Action, Clause, Match, Rule

DRY_RUN = "istio.io/dry-run"
MAX_NOTES = 4
"""Rules that a note describes; it is repeated in every denial."""
_SPEC = ("action", "provider", "rules", "selector", "targetRef", "targetRefs")
_SOURCE_L7 = ("remoteIpBlocks", "notRemoteIpBlocks", "requestPrincipals", "notRequestPrincipals")
_SOURCE_L4 = (
    *("principals", "notPrincipals", "namespaces", "notNamespaces"),
    *("serviceAccounts", "notServiceAccounts", "ipBlocks", "notIpBlocks"),
)
_OPERATION_L7 = ("hosts", "notHosts", "methods", "notMethods", "paths", "notPaths")
_OPERATION_L4 = ("ports", "notPorts")
_WHEN_L7 = ("request.headers[", "request.auth.", "remote.ip", "connection.sni", "experimental.envoy.filters.")
_NEVER = Rule((Clause((Match(),)),))
"""A match with all fields empty never matches. It keeps the place of a rule, so that verdicts name the index that the user wrote."""
_TRUE = ("1", "t", "true")
_BOOLEANS = (*_TRUE, "0", "f", "false")


@dataclass(frozen=True, slots=True)
class AuthorizationPolicyObject:
    """What L4 enforces of one AuthorizationPolicy."""

    metadata: Metadata
    action: Action
    rules: tuple[Rule, ...] = ()
    selector: dict[str, str] | None = None
    """None: its whole namespace, or the mesh when that is the root namespace."""
    dry_run: bool = False
    note: str = ""
    """What of it is not enforced as written, and why."""
    waypoint: bool = False
    """Attached by `targetRefs`: nothing of it is for L4; what it says is in `layer7`."""
    targets: tuple[TargetRef, ...] = ()
    layer7: L7Policy | None = None
    at_gateways: L7Policy | None = None
    """Without `targetRefs`: the whole of it, for the pods of an ingress gateway that it selects, where no ztunnel is. None: it cannot
    be enforced there."""


class _L7Fields:
    """The places in one rule that only an L7 proxy can check."""

    def __init__(self) -> None:
        self.places: list[Field] = []

    def found(self, place: Field, names: tuple[str, ...]) -> bool:
        present = [place.get(name) for name in names if not place.get(name).absent]
        self.places.extend(present)
        return bool(present)


def read_authorization_policy(document: Field) -> AuthorizationPolicyObject:
    """An AuthorizationPolicy.

    Raises:
        ManifestError: see the module's text; also AUDIT and CUSTOM, which L4 cannot carry out, without targetRefs.
    """
    document.only(SPEC)
    metadata = read_metadata(document)
    spec = document.get("spec")
    targets = read_targets(spec)
    dry_run = _dry_run(document.get("metadata").get("annotations").get(DRY_RUN))
    if targets:
        layer7 = read_l7_policy(spec, metadata, dry_run)
        return AuthorizationPolicyObject(metadata, Action.ALLOW, dry_run=dry_run, waypoint=True, targets=targets, layer7=layer7)
    spec.only(_SPEC)
    action = _action(spec.get("action"))
    if not spec.get("provider").absent:
        raise spec.get("provider").error("only CUSTOM policies have a provider")
    notes: list[str] = []
    rules = tuple(_rule(item, action, metadata.namespace, notes) for item in spec.get("rules").items())
    return AuthorizationPolicyObject(
        metadata=metadata,
        action=action,
        rules=rules,
        selector=read_selector(spec),
        dry_run=dry_run,
        note=_summary(notes),
        at_gateways=_at_gateways(spec, metadata, dry_run),
    )


def _at_gateways(spec: Field, metadata: Metadata, dry_run: bool) -> L7Policy | None:
    try:
        return read_l7_policy(spec, metadata, dry_run)
    except ManifestError:
        return None


def _summary(notes: list[str]) -> str:
    rest = len(notes) - MAX_NOTES
    return "; ".join(notes[:MAX_NOTES]) + (f"; and {rest} more rules" if rest > 0 else "")


def _action(place: Field) -> Action:
    text = place.text(Action.ALLOW.value)
    if text in ("AUDIT", "CUSTOM"):
        raise place.error(f"{text} is not available at L4: attach the policy to a waypoint with targetRefs")
    if text not in Action.__members__:
        raise place.wrong("not one of ALLOW, DENY")
    return Action[text]


def is_true(value: object) -> bool:
    """Whether an annotation says yes, also as the boolean that an unquoted YAML value becomes."""
    return value is True or (isinstance(value, str) and value.lower() in _TRUE)


def _dry_run(place: Field) -> bool:
    if place.text("false").lower() not in _BOOLEANS:
        raise place.wrong("not a boolean")
    return is_true(place.value)


def _rule(place: Field, action: Action, namespace: str, notes: list[str]) -> Rule:
    if place.absent:
        raise place.error("a rule without content: write {} for one that matches everything")
    place.only(("from", "to", "when"))
    layer7 = _L7Fields()
    clauses = [
        _clause(place.get("from"), "source", lambda source: _source(source, namespace, layer7)),
        _clause(place.get("to"), "operation", lambda operation: _operation(operation, layer7)),
        *(_condition(item, namespace, layer7) for item in place.get("when").items()),
    ]
    kept = tuple(clause for clause in clauses if clause is not None)
    if not layer7.places:
        return Rule(kept)
    first, names = layer7.places[0], ", ".join(dict.fromkeys(each.path for each in layer7.places[:4]))
    if action is Action.ALLOW:
        notes.append(f"{place.path} never matches without a waypoint: it needs {names}")
        return _NEVER
    if not kept:
        raise first.error(f"only a waypoint can check it, and nothing else limits {place.path}: attach the policy with targetRefs")
    notes.append(f"{place.path} denies more than written without a waypoint: it ignores {names}")
    return Rule(kept)


def _clause(place: Field, member: str, read: Callable[[Field], Match | None]) -> Clause | None:
    """The clause of one list; None when it limits nothing: it is absent, or one of its matches has only L7 fields."""
    if place.absent:
        return None
    matches: list[Match] = []
    limits = True
    for item in some(place):
        item.only((member,))
        if item.get(member).absent:
            raise item.get(member).error("required")
        match = read(item.get(member))
        if match is None:
            limits = False
        else:
            matches.append(match)
    return Clause(tuple(matches)) if limits else None


def _source(place: Field, namespace: str, layer7: _L7Fields) -> Match | None:
    place.only(_SOURCE_L4 + _SOURCE_L7)
    only_l7 = layer7.found(place, _SOURCE_L7)
    match = Match(
        principals=each(place.get("principals"), principal),
        not_principals=each(place.get("notPrincipals"), principal),
        namespaces=each(place.get("namespaces"), string),
        not_namespaces=each(place.get("notNamespaces"), string),
        service_accounts=each(place.get("serviceAccounts"), lambda item: account(item, namespace)),
        not_service_accounts=each(place.get("notServiceAccounts"), lambda item: account(item, namespace)),
        source_ips=each(place.get("ipBlocks"), block),
        not_source_ips=each(place.get("notIpBlocks"), block),
    )
    return _unless_empty(match, place, only_l7)


def _operation(place: Field, layer7: _L7Fields) -> Match | None:
    place.only(_OPERATION_L4 + _OPERATION_L7)
    only_l7 = layer7.found(place, _OPERATION_L7)
    match = Match(
        destination_ports=each(place.get("ports"), Field.port_text),
        not_destination_ports=each(place.get("notPorts"), Field.port_text),
    )
    return _unless_empty(match, place, only_l7)


def _unless_empty(match: Match, place: Field, only_l7: bool) -> Match | None:
    if match != Match():
        return match
    if only_l7:
        return None
    raise place.error("empty: name at least one field")


def _condition(place: Field, namespace: str, layer7: _L7Fields) -> Clause | None:
    place.only(("key", "values", "notValues"))
    key = place.get("key").text()
    values, excluded = place.get("values"), place.get("notValues")
    if values.absent and excluded.absent:
        raise place.error("needs values or notValues")
    match key:
        case "source.principal":
            match = Match(principals=each(values, principal), not_principals=each(excluded, principal))
        case "source.namespace":
            match = Match(namespaces=each(values, string), not_namespaces=each(excluded, string))
        case "source.serviceAccount":
            match = Match(
                service_accounts=each(values, lambda item: account(item, namespace)),
                not_service_accounts=each(excluded, lambda item: account(item, namespace)),
            )
        case "source.ip":
            match = Match(source_ips=each(values, block), not_source_ips=each(excluded, block))
        case "destination.ip":
            match = Match(destination_ips=each(values, block), not_destination_ips=each(excluded, block))
        case "destination.port":
            match = Match(destination_ports=each(values, Field.port_text), not_destination_ports=each(excluded, Field.port_text))
        case _:
            if not key.startswith(_WHEN_L7):
                raise place.get("key").wrong("unknown condition")
            layer7.places.append(place.get("key"))
            return None
    return Clause((match,))
