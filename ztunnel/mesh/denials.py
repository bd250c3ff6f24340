"""Policies that deny since nobody can say what was meant, as values: what a worker needs to know of them without any manifest."""

from __future__ import annotations

from ztunnel.mesh.rules import Action, Clause, Match, Policy, Rule, Scope, StringKind, StringMatch

DENY_EVERYTHING = (Rule(),)
"""A rule without clauses matches every connection."""
NOT_AUTHENTICATED = Clause((Match(not_principals=(StringMatch(StringKind.PRESENCE),)),))
"""Matches a connection whose peer has no identity: plaintext."""


def unknown_policy(key: str) -> Policy:
    """For a workload that lists a policy which has not arrived: nobody knows what it forbids.

    Args:
        key: `Policy.key`.
    """
    kind, _, rest = key.partition("/")
    namespace, _, name = rest.partition("/")
    reason = "the workload is selected by this policy, which has not been received; denied until it is"
    return Policy(name, namespace, Scope.SELECTOR, Action.DENY, DENY_EVERYTHING, kind, reason=reason)
