"""Who may have which certificate. Pure.

Two kinds of callers: a node agent asks for the service accounts of pods that run on its own node, and names the one it means; anybody
else asks for itself and names nobody. What a caller is comes from its token, which node it runs on from its pod: nothing that it says of
itself counts. So an agent that was taken over, or its token, can have no identity of another node's pods.
Source: Istio `security/pkg/server/ca/node_auth.go`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from ztunnel.mesh.identity import SpiffeId, parse_spiffe


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose token it is, as the API server says."""

    namespace: str
    service_account: str
    pod: str = ""
    """Name of the pod that the token is bound to, and its UID; empty when it is bound to none."""
    pod_uid: str = ""

    def __str__(self) -> str:
        return f"{self.namespace}/{self.service_account}"


class Reason(Enum):
    """Outcomes of a request: a metric's label and a word of the audit line."""

    ISSUED = "issued"
    BUSY = "busy"
    """Too many requests from this address or node."""
    NO_TOKEN = "no_token"  # noqa: S105 - a label
    TOKEN_REFUSED = "token_refused"  # noqa: S105 - a label
    NO_REVIEW = "no_review"
    """The API server could not be asked about the token."""
    NOT_SYNCED = "not_synced"
    """Pods are not known yet, or not any more."""
    NO_POD = "no_pod"
    """The token is bound to no pod, or to one that is not there."""
    NOT_AN_AGENT = "not_an_agent"
    NOT_ON_NODE = "not_on_node"
    BAD_IDENTITY = "bad_identity"
    BAD_REQUEST = "bad_request"
    FAILED = "failed"
    """The authority itself could not sign."""


class Refusal(Exception):
    """A request that gets no certificate. The text is for the audit line; the caller learns less."""

    def __init__(self, reason: Reason, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class Pods(Protocol):
    """The pods of the cluster, as a watch knows them; ended ones are not among them."""

    @property
    def synced(self) -> bool:
        """Whether they are all known."""
        ...

    def node_of(self, namespace: str, name: str, uid: str) -> str | None:
        """The node of a pod, None if there is no such pod or it has no node yet."""
        ...

    def runs_on(self, node: str, namespace: str, service_account: str) -> bool:
        """Whether a pod of this service account is bound to this node."""
        ...


@dataclass(frozen=True, slots=True)
class Rules:
    """What an operator decides."""

    trust_domain: str
    agents: frozenset[tuple[str, str]]
    """Namespace and name of the service accounts that node agents run as."""


@dataclass(frozen=True, slots=True)
class Grant:
    """A certificate that may be signed."""

    identity: SpiffeId
    node: str


def decide(caller: Caller, impersonated: str, pods: Pods, rules: Rules) -> Grant:
    """The identity that a caller gets, and the node that it runs on.

    Args:
        impersonated: the SPIFFE id that the caller names, or empty.
    Raises:
        Refusal: it gets none.
    """
    if not pods.synced:
        raise Refusal(Reason.NOT_SYNCED, "the cluster's pods are not known yet")
    node = pods.node_of(caller.namespace, caller.pod, caller.pod_uid) if caller.pod and caller.pod_uid else None
    if node is None:
        raise Refusal(Reason.NO_POD, "the token is bound to no pod that runs now")
    if not impersonated:
        if not pods.runs_on(node, caller.namespace, caller.service_account):
            raise Refusal(Reason.NO_POD, "the token's pod has another service account")
        return Grant(SpiffeId(rules.trust_domain, caller.namespace, caller.service_account), node)
    if (caller.namespace, caller.service_account) not in rules.agents:
        raise Refusal(Reason.NOT_AN_AGENT, "only node agents may ask for others")
    try:
        wanted = parse_spiffe(impersonated)
    except ValueError as error:
        raise Refusal(Reason.BAD_IDENTITY, str(error)) from error
    if wanted.trust_domain != rules.trust_domain:
        raise Refusal(Reason.BAD_IDENTITY, f"trust domain {wanted.trust_domain} is not ours")
    if not pods.runs_on(node, wanted.namespace, wanted.service_account):
        raise Refusal(Reason.NOT_ON_NODE, f"no pod of {wanted.namespace}/{wanted.service_account} on {node}")
    return Grant(wanted, node)
