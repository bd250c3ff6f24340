"""The port table is what Istio's peers expect."""

from __future__ import annotations

from ztunnel.mesh import ports


def test_the_ports_are_istios() -> None:
    assert (ports.OUTBOUND, ports.INBOUND_PLAINTEXT, ports.INBOUND_HBONE, ports.METRICS, ports.READINESS) == (
        15001,
        15006,
        15008,
        15020,
        15021,
    )


def test_what_would_loop_is_illegal() -> None:
    assert frozenset((15001, 15006, 15008)) == ports.ILLEGAL_TARGETS
