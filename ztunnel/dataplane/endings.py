"""How a tunnel ends that does not end well, and how long it may take to do what it must."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ztunnel.mesh.errors import Flag, PeerError, UpstreamError, UpstreamTimeout


class TunnelLost(UpstreamError):
    """The tunnel ended under its streams."""


class TlsFailed(PeerError):
    """The handshake did not come to an end."""

    flag: ClassVar[Flag] = Flag.TLS_FAILURE


class TlsTimeout(UpstreamTimeout):
    """The TLS handshake did not come to an end in time."""

    flag: ClassVar[Flag] = Flag.TLS_FAILURE


class SettingsTimeout(UpstreamTimeout):
    """The peer's first SETTINGS did not come in time."""

    flag: ClassVar[Flag] = Flag.H2_HANDSHAKE_FAILURE


@dataclass(frozen=True, slots=True)
class TunnelTimes:
    """Seconds. `ping` after so much silence, dead after `ping_timeout` more; the handshake includes the peer's SETTINGS."""

    handshake: float
    ping: float
    ping_timeout: float
