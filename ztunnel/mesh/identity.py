"""SPIFFE identities as Istio forms them: `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`, and nothing else."""

from __future__ import annotations

import re
from dataclasses import dataclass

_SPIFFE = re.compile(r"spiffe://([a-z0-9._-]{1,255})/ns/([a-z0-9.-]{1,253})/sa/([a-z0-9.-]{1,253})")


@dataclass(frozen=True, slots=True)
class SpiffeId:
    """Who a workload is. Two workloads with the same service account are the same peer."""

    trust_domain: str
    namespace: str
    service_account: str

    @property
    def uri(self) -> str:
        """The URI SAN of its certificate."""
        return f"spiffe://{self.principal}"

    @property
    def principal(self) -> str:
        """The form that AuthorizationPolicy's `principals` match: the URI without its scheme."""
        return f"{self.trust_domain}/ns/{self.namespace}/sa/{self.service_account}"

    def __str__(self) -> str:
        return self.uri


def parse_spiffe(uri: str) -> SpiffeId:
    """The identity that a URI SAN names.

    Raises:
        ValueError: anything but the five parts of Istio's form, or an empty, overlong or upper-case part.
    Source: SPIFFE-ID §2; Istio ztunnel `identity/manager.rs` (the grammar is strict on purpose).
    """
    match = _SPIFFE.fullmatch(uri)
    if match is None:
        raise ValueError(f"not a SPIFFE id of the form spiffe://<trust-domain>/ns/<namespace>/sa/<service-account>: {uri[:100]!r}")
    return SpiffeId(*match.groups())
