"""The L7 authorization verdict: the one place that decides whether a request may go on.

CUSTOM policies are asked first, before tokens are looked at; then, with a token's claims, AUDIT notes, DENY forbids, and with any ALLOW
policy present one of them must match. Policies are compiled once; a verdict that says nothing about the single request is made once, too.
Dry-run policies are evaluated beside those that are enforced and change nothing.
Source: Istio AuthorizationPolicy; the texts are Envoy's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from waypoint.http.filing import Filed, Rules
from waypoint.http.messages import Client, LocalReply, Request
from waypoint.http.replies import rbac_denied
from waypoint.http.rules import Facts
from ztunnel.mesh.l7.security import Claims, ExtensionProvider, L7Action, L7Policy

NAMED_POLICIES: Final = 8
"""So many policies that did not match are named in a denial's text."""


class Shadow:
    """What one dry-run policy says to a request."""

    __slots__ = ("action", "matched", "policy", "rule")

    def __init__(self, policy: str, action: L7Action, rule: int | None) -> None:
        self.policy = policy
        self.action = action
        self.rule = rule
        self.matched = rule is not None

    @property
    def result(self) -> str:
        """`allowed` or `denied`: what it alone would have made of the request."""
        return "allowed" if self.matched is (self.action is L7Action.ALLOW) else "denied"


class Verdict:
    """Whether a request may go on, by which policy and rule, and in words."""

    __slots__ = ("allowed", "audited", "matched", "policy", "rule", "shadow", "text")

    def __init__(
        self,
        allowed: bool,
        text: str,
        policy: str = "",
        rule: int | None = None,
        *,
        matched: str = "",
        audited: tuple[str, ...] = (),
        shadow: tuple[Shadow, ...] = (),
    ) -> None:
        """
        Args:
            text: for the operator; clients never see it.
            policy: `namespace/name` of the one that decided, or empty.
            matched: which rule denied, as response_code_details name it.
            audited: AUDIT policies that matched.
        """
        self.allowed = allowed
        self.text = text
        self.policy = policy
        self.rule = rule
        self.matched = matched
        self.audited = audited
        self.shadow = shadow

    def reply(self) -> LocalReply:
        """What a client is told of a denial: not which policy."""
        return rbac_denied(self.matched)


class Ask:
    """External authorizers must allow the request first, all of them."""

    __slots__ = ("policies", "providers")

    def __init__(self, providers: tuple[ExtensionProvider, ...], policies: tuple[str, ...]) -> None:
        self.providers = providers
        self.policies = policies


class _Alone:
    """One policy that is looked at on its own."""

    __slots__ = ("policy", "rules", "tcp_rules")

    def __init__(self, policy: L7Policy) -> None:
        self.policy = policy
        self.rules = Rules((policy,))
        self.tcp_rules = Rules((policy,), tcp=True)

    def matching_rule(self, facts: Facts, tcp: bool) -> int | None:
        filed = (self.tcp_rules if tcp else self.rules).first(facts)
        return None if filed is None else filed.index


_OPEN: Final = Verdict(True, "no policy denies it and no ALLOW policy applies")


class Guard:
    """The policies that apply to one service (or pod, or host), compiled."""

    __slots__ = (
        *("_allowed", "_allows", "_audits", "_custom", "_denies", "_dry_run", "_is_plain", "_not_allowed", "_providers"),
        *("_tcp_allows", "_tcp_custom", "_tcp_denies"),
    )

    def __init__(self, policies: Sequence[L7Policy], providers: Mapping[str, ExtensionProvider] | None = None) -> None:
        """
        Args:
            providers: the external authorizers there are, by name. A CUSTOM policy without its own denies what it matches.
        """
        enforced = [policy for policy in policies if not policy.dry_run]

        def of(action: L7Action) -> list[L7Policy]:
            return [policy for policy in enforced if policy.action is action]

        allows = of(L7Action.ALLOW)
        self._providers = dict(providers or {})
        self._custom = [_Alone(policy) for policy in of(L7Action.CUSTOM)]
        self._tcp_custom = Rules(of(L7Action.CUSTOM), tcp=True)
        self._audits = [_Alone(policy) for policy in of(L7Action.AUDIT)]
        self._dry_run = [_Alone(each) for each in policies if each.dry_run and each.action in (L7Action.ALLOW, L7Action.DENY)]
        self._denies = Rules(of(L7Action.DENY))
        self._tcp_denies = Rules(of(L7Action.DENY), tcp=True)
        self._allows = Rules(allows)
        self._tcp_allows = Rules(allows, tcp=True)
        self._not_allowed = _missed(allows) if allows else None
        self._allowed: dict[int, Verdict] = {}
        """By place of the rule."""
        self._is_plain = not self._audits and not self._dry_run

    @property
    def asks(self) -> bool:
        """Whether there is any CUSTOM policy."""
        return bool(self._custom)

    def custom(self, request: Request, client: Client) -> Ask | Verdict | None:
        """Before tokens are verified: whom to ask, or a denial because there is nobody to ask. None: go on."""
        if not self._custom:
            return None
        facts = Facts(request, client, None)
        providers: dict[str, ExtensionProvider] = {}
        policies: list[str] = []
        for alone in self._custom:
            rule = alone.matching_rule(facts, False)
            if rule is None:
                continue
            provider = self._providers.get(alone.policy.provider)
            if provider is None or not provider.cluster:
                return _nobody_to_ask(alone.policy, rule, provider)
            providers[provider.name] = provider
            policies.append(alone.policy.key)
        return Ask(tuple(providers.values()), tuple(policies)) if providers else None

    def decide(self, request: Request, client: Client, claims: Claims | None) -> Verdict:
        """The verdict, after tokens are verified."""
        facts = Facts(request, client, claims)
        verdict = self._enforced(facts, self._denies, self._allows)
        return verdict if self._is_plain else self._watched(verdict, facts, False)

    def decide_tcp(self, client: Client) -> Verdict:
        """The verdict on a connection that carries no requests that we read."""
        facts = Facts(None, client, None)
        custom = self._tcp_custom.first(facts)
        if custom is not None:
            text = f"{_label(custom)} asks an external authorizer, which there is none of for TCP"
            verdict = Verdict(False, text, custom.policy.key, custom.index, matched=_id(custom))
        else:
            verdict = self._enforced(facts, self._tcp_denies, self._tcp_allows)
        return verdict if self._is_plain else self._watched(verdict, facts, True)

    def _enforced(self, facts: Facts, denies: Rules, allows: Rules) -> Verdict:
        denied = denies.first(facts)
        if denied is not None:
            return _denial(denied)
        if self._not_allowed is None:
            return _OPEN
        allowed = allows.first(facts)
        if allowed is None:
            return self._not_allowed
        known = self._allowed.get(allowed.place) if allows is self._allows else None
        if known is None:
            known = Verdict(True, f"allowed by {_label(allowed)}", allowed.policy.key, allowed.index)
            if allows is self._allows:
                self._allowed[allowed.place] = known
        return known

    def _watched(self, verdict: Verdict, facts: Facts, tcp: bool) -> Verdict:
        """The same verdict with what AUDIT and dry-run policies have to say."""
        audited = tuple(alone.policy.key for alone in self._audits if alone.matching_rule(facts, tcp) is not None)
        shadow = tuple(Shadow(alone.policy.key, alone.policy.action, alone.matching_rule(facts, tcp)) for alone in self._dry_run)
        if not audited and not shadow:
            return verdict
        return Verdict(verdict.allowed, verdict.text, verdict.policy, verdict.rule, matched=verdict.matched, audited=audited, shadow=shadow)


def _id(filed: Filed) -> str:
    return f"ns[{filed.policy.namespace}]-policy[{filed.policy.name}]-rule[{filed.index}]"


def _label(filed: Filed) -> str:
    return f"AuthorizationPolicy {filed.policy.key}, rules[{filed.index}]"


def _denial(filed: Filed) -> Verdict:
    text = f"denied by {_label(filed)}"
    if filed.policy.reason:
        text = f"{text}: {filed.policy.reason}"
    return Verdict(False, text, filed.policy.key, filed.index, matched=_id(filed))


def _missed(allows: Sequence[L7Policy]) -> Verdict:
    named = ", ".join(_noted(policy) for policy in allows[:NAMED_POLICIES])
    text = f"ALLOW policies apply and none matches; tried {named}"
    if len(allows) > NAMED_POLICIES:
        text += f" and {len(allows) - NAMED_POLICIES} more"
    return Verdict(False, text, matched="none")


def _noted(policy: L7Policy) -> str:
    return f"AuthorizationPolicy {policy.key} ({policy.reason})" if policy.reason else f"AuthorizationPolicy {policy.key}"


def _nobody_to_ask(policy: L7Policy, rule: int, provider: ExtensionProvider | None) -> Verdict:
    why = provider.problem if provider is not None else "MeshConfig.extensionProviders has no external authorizer of this name"
    text = f"denied by AuthorizationPolicy {policy.key}, rules[{rule}]: provider {policy.provider}: {why}"
    matched = f"ns[{policy.namespace}]-policy[{policy.name}]-rule[{rule}]-deny-due-to-bad-CUSTOM-action"
    return Verdict(False, text, policy.key, rule, matched=matched)
