"""What stands in the place of a policy that cannot be enforced as written.

A policy that we cannot read may have been meant to deny, so its absence would let through what somebody forbade. Until a good
version arrives, the strictest thing that it could have meant is enforced wherever it could have applied: an AuthorizationPolicy
denies everything, a PeerAuthentication is STRICT, a RequestAuthentication accepts no token. Every denial says which object, field and
cause.
"""

from __future__ import annotations

from ztunnel.mesh.denials import DENY_EVERYTHING, NOT_AUTHENTICATED
from ztunnel.mesh.errors import ManifestError
from ztunnel.mesh.manifests.authorization import DRY_RUN, is_true
from ztunnel.mesh.manifests.backend_policies import BackendTlsPolicyObject
from ztunnel.mesh.manifests.destination_rule import DestinationRuleObject, TrafficPolicy
from ztunnel.mesh.manifests.fields import Field
from ztunnel.mesh.manifests.metadata import Metadata, ObjectKey
from ztunnel.mesh.manifests.parse import POLICY_KINDS, RefusedPolicy, key_of
from ztunnel.mesh.manifests.selectors import TargetRef, read_selector, read_targets
from ztunnel.mesh.manifests.virtual_hosts import read_host
from ztunnel.mesh.rules import Action, Policy, Rule, Scope

StandIn = RefusedPolicy | DestinationRuleObject | BackendTlsPolicyObject


def stand_in(body: object, error: ManifestError) -> StandIn | None:
    """What to keep in the place of a refused document that has no earlier good version.

    Args:
        body: the document.
        error: what `parse` said about it.
    Returns: for a DestinationRule or BackendTLSPolicy, one that closes what it was for, since it may have asked for TLS. None when
        nothing is lost by its absence: it is no policy of ours, or one that never denies (AUDIT, dry-run).
    """
    key = key_of(body)
    if key is None or not isinstance(body, dict):
        return None
    if key.kind == "DestinationRule":
        return _closed_destination(key, body.get("spec"), error)
    if key.kind == "BackendTLSPolicy":
        # Whatever Service of its namespace it was for: which one would be read from a document that cannot be trusted.
        return BackendTlsPolicyObject(Metadata(key.name, key.namespace), (), stand_in=str(error))
    if key.kind not in POLICY_KINDS:
        return None
    if key.kind == "AuthorizationPolicy" and _never_denies(body):
        return None
    # Nameless documents share a key: each must stand for all of them.
    spec = body.get("spec") if key.name else None
    return RefusedPolicy(key, _selector(spec), not key.namespace, str(error), _targets(spec) if key.namespace else ())


def refused_policy(refused: RefusedPolicy, root_namespace: str) -> Policy:
    """The policy that is enforced for a stand-in, with the same key as the good version that will replace it."""
    key = refused.key
    if refused.selector is not None and not refused.everywhere:
        scope = Scope.SELECTOR
    elif refused.everywhere or key.namespace == root_namespace:
        scope = Scope.GLOBAL
    else:
        scope = Scope.NAMESPACE
    authentication = key.kind == "PeerAuthentication"
    rules = (Rule((NOT_AUTHENTICATED,)),) if authentication else DENY_EVERYTHING
    effect = "treated as STRICT" if authentication else "everything that it may apply to is denied"
    return Policy(key.name, key.namespace, scope, Action.DENY, rules, key.kind, reason=f"refused, so {effect}: {refused.reason}")


def is_stand_in(item: object) -> bool:
    """Whether an object in force only stands for one that was refused."""
    return isinstance(item, RefusedPolicy) or (isinstance(item, DestinationRuleObject | BackendTlsPolicyObject) and bool(item.stand_in))


def _closed_destination(key: ObjectKey, spec: object, error: ManifestError) -> DestinationRuleObject:
    try:
        host = read_host(Field("", "spec.host", spec.get("host"))) if isinstance(spec, dict) else "*"
    except ManifestError:
        host = "*"
    return DestinationRuleObject(Metadata(key.name, key.namespace), host, TrafficPolicy(refused=str(error)), stand_in=True)


def _never_denies(body: dict[object, object]) -> bool:
    spec, metadata = body.get("spec"), body.get("metadata")
    if isinstance(spec, dict) and spec.get("action") == "AUDIT":
        return True
    annotations = metadata.get("annotations") if isinstance(metadata, dict) else None
    return isinstance(annotations, dict) and is_true(annotations.get(DRY_RUN))


def _selector(spec: object) -> dict[str, str] | None:
    """None, for the whole namespace, when there is none or it cannot be read, or stands beside targetRefs: which one was meant?"""
    if isinstance(spec, dict) and (spec.get("targetRef") or spec.get("targetRefs")):
        return None
    try:
        return read_selector(Field("", "spec", spec)) or None
    except ManifestError:
        return None


def _targets(spec: object) -> tuple[TargetRef, ...]:
    """None when nobody can say what they are: then it may have been meant for L4."""
    try:
        return read_targets(Field("", "spec", spec))
    except ManifestError:
        return ()
