"""Telemetry of one service (or pod, or gateway's host), compiled: its labels, what is changed in its metrics, its logs, its spans."""

from __future__ import annotations

from typing import Final

from ztunnel.mesh.l7.expressions import Expression
from ztunnel.mesh.l7.telemetry import Metric, TelemetrySettings

UNKNOWN: Final = "unknown"


class ServiceTelemetry:
    """What holds for all requests to one service."""

    __slots__ = ("changes", "disabled", "hostname", "is_plain", "name", "namespace", "port", "settings")

    def __init__(self, hostname: str, name: str, namespace: str, settings: TelemetrySettings, port: int = 0) -> None:
        """
        Args:
            hostname: empty for a pod that is addressed by itself.
        """
        self.hostname = hostname or UNKNOWN
        self.name = name or UNKNOWN
        self.namespace = namespace or UNKNOWN
        self.port = port
        self.settings = settings
        self.disabled: frozenset[Metric] = frozenset(Metric) if not settings.metrics else _disabled(settings)
        self.changes: dict[Metric, tuple[tuple[str, Expression | None], ...]] = {}
        """Labels that a metric has otherwise: by an expression, or (None) not at all."""
        for override in settings.overrides:
            if override.tags:
                compiled = tuple((label, None if text is None else Expression(text)) for label, text in override.tags)
                self.changes[override.metric] = (*self.changes.get(override.metric, ()), *compiled)
        self.is_plain = not self.changes and not self.disabled


def _disabled(settings: TelemetrySettings) -> frozenset[Metric]:
    found: dict[Metric, bool] = {}
    for override in settings.overrides:
        found[override.metric] = override.disabled
    return frozenset(metric for metric, off in found.items() if off)
