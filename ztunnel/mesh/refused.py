"""What stands in the place of a policy that cannot be enforced as written.

A policy that we cannot read may have been meant to deny, so its absence would let through what somebody forbade. Until a good
version arrives, everything that it could have selected is denied, and every denial says which object, field and cause.
"""

from __future__ import annotations

from ztunnel.mesh.rules import Action, Policy, Rule, Scope

DENY_EVERYTHING = (Rule(),)
"""A rule without clauses matches every connection."""


def unknown_policy(key: str) -> Policy:
    """For a workload that lists a policy which has not arrived: nobody knows what it forbids.

    Args:
        key: `Policy.key`.
    """
    kind, _, rest = key.partition("/")
    namespace, _, name = rest.partition("/")
    reason = "the workload is selected by this policy, which has not been received; denied until it is"
    return Policy(name, namespace, Scope.SELECTOR, Action.DENY, DENY_EVERYTHING, kind, reason=reason)
