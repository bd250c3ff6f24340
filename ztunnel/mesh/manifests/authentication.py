"""PeerAuthentication: whether a workload takes plaintext. DISABLE is PERMISSIVE here: tunnels are always accepted.

Source: Istio API reference of PeerAuthentication; Istio `pilot/pkg/serviceregistry/ambient/policies.go`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from ztunnel.mesh.manifests.fields import Field
from ztunnel.mesh.manifests.metadata import Metadata, read_metadata
from ztunnel.mesh.manifests.selectors import SPEC, read_selector


class Mode(Enum):
    """What a port demands of its clients. UNSET inherits."""

    UNSET = "UNSET"
    PERMISSIVE = "PERMISSIVE"
    STRICT = "STRICT"


_MODES = {"UNSET": Mode.UNSET, "DISABLE": Mode.PERMISSIVE, "PERMISSIVE": Mode.PERMISSIVE, "STRICT": Mode.STRICT}


@dataclass(frozen=True, slots=True)
class PeerAuthenticationObject:
    """One PeerAuthentication."""

    metadata: Metadata
    mode: Mode = Mode.UNSET
    ports: dict[int, Mode] = field(default_factory=dict)
    """By the workload's own port number."""
    selector: dict[str, str] | None = None


def read_peer_authentication(document: Field) -> PeerAuthenticationObject:
    """A PeerAuthentication.

    Raises:
        ManifestError: a field that is unknown, or not what it should be; ports without a selector.
    """
    document.only(SPEC)
    spec = document.get("spec")
    spec.only(("selector", "mtls", "portLevelMtls"))
    selector = read_selector(spec)
    ports = spec.get("portLevelMtls")
    if not selector and not ports.absent:
        raise ports.error("needs a selector: ports are those of the selected workloads")
    return PeerAuthenticationObject(
        metadata=read_metadata(document),
        mode=_mode(spec.get("mtls")),
        ports=_ports(ports),
        # Istio takes an empty selector for none: the policy is for the namespace.
        selector=selector or None,
    )


def _ports(place: Field) -> dict[int, Mode]:
    ports: dict[int, Mode] = {}
    for key, member in place.entries():
        number = member.instead(key).port_text()
        if number in ports:
            raise member.error(f"port {number} is listed twice")
        ports[number] = _mode(member)
    return ports


def _mode(place: Field) -> Mode:
    place.only(("mode",))
    mode = place.get("mode")
    text = mode.text("UNSET")
    if text not in _MODES:
        raise mode.wrong(f"not one of {', '.join(_MODES)}")
    return _MODES[text]
