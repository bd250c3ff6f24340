"""The ports that the proxy listens on, and those that nobody may reach through it.

Source: Istio ztunnel, `ARCHITECTURE.md` (port table).
"""

from __future__ import annotations

OUTBOUND = 15001
"""In each pod's network namespace: TCP that the pod sends."""
INBOUND_PLAINTEXT = 15006
"""In each pod's network namespace: TCP that reaches the pod outside a tunnel."""
INBOUND_HBONE = 15008
"""In each pod's network namespace: tunnels."""
METRICS = 15020
READINESS = 15021

ILLEGAL_TARGETS = frozenset((OUTBOUND, INBOUND_PLAINTEXT, INBOUND_HBONE))
"""A proxied connection that ends at one of these would come back to the proxy for ever."""
