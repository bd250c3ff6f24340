"""Passive health checks: who answers wrongly too often in a row is left alone for a while.

Source: Envoy, "Outlier detection", `outlier_detection_impl.cc`; what Istio turns off (success rate, failure percentage) is not here.
Each worker judges by its own requests.
"""

from __future__ import annotations

from collections.abc import Sequence

from waypoint.upstream.endpoints import EndpointAtWork
from waypoint.upstream.outcome import CONNECT_REASONS, Outcome, ResetReason
from ztunnel.mesh.l7.clusters import Outlier

MAX_EJECTION = 300.0
"""Seconds: Envoy's `max_ejection_time`, which Istio does not set."""


class OutlierDetector:
    """The judge of one cluster's endpoints."""

    __slots__ = ("_errors", "_next_sweep", "_settings")

    def __init__(self, settings: Outlier, now: float) -> None:
        self._settings = settings
        self._errors = frozenset(settings.http_errors)
        self._next_sweep = now + settings.interval

    def judge(self, endpoint: EndpointAtWork, outcome: Outcome, endpoints: Sequence[EndpointAtWork], now: float) -> bool:
        """Counts one outcome; whether the endpoint is ejected because of it.

        Args:
            endpoints: all of the cluster.
        """
        settings = self._settings
        status = outcome.status
        if status == 0:
            if settings.split_local:
                endpoint.consecutive_local += 1
                if endpoint.consecutive_local != settings.consecutive_local:
                    return False
                endpoint.consecutive_local = 0
                return self._eject(endpoint, endpoints, now)
            status = status_of_local(outcome)
        else:
            endpoint.consecutive_local = 0
        if not self._is_error(status):
            endpoint.consecutive_5xx = endpoint.consecutive_gateway = 0
            return False
        ejected = False
        endpoint.consecutive_gateway = endpoint.consecutive_gateway + 1 if 502 <= status <= 504 else 0
        if endpoint.consecutive_gateway == settings.consecutive_gateway > 0:
            endpoint.consecutive_gateway = 0
            ejected = self._eject(endpoint, endpoints, now)
        endpoint.consecutive_5xx += 1
        if endpoint.consecutive_5xx == settings.consecutive_5xx > 0:
            endpoint.consecutive_5xx = 0
            ejected = self._eject(endpoint, endpoints, now) or ejected
        return ejected

    def sweep(self, endpoints: Sequence[EndpointAtWork], now: float) -> bool:
        """Takes back who has been out for long enough, once each interval; whether anybody was."""
        if now < self._next_sweep:
            return False
        self._next_sweep = now + self._settings.interval
        changed = False
        for endpoint in endpoints:
            if not endpoint.ejected:
                # one healthy interval takes one step off the next ejection's time
                endpoint.ejections = max(0, endpoint.ejections - 1)
            elif now >= endpoint.ejected_at + self._duration(endpoint):
                endpoint.ejected = False
                endpoint.consecutive_5xx = endpoint.consecutive_gateway = endpoint.consecutive_local = 0
                changed = True
        return changed

    def _is_error(self, status: int) -> bool:
        return status >= 500 or status in self._errors

    def _duration(self, endpoint: EndpointAtWork) -> float:
        base = self._settings.base_ejection
        return min(base * endpoint.ejections, max(MAX_EJECTION, base))

    def _eject(self, endpoint: EndpointAtWork, endpoints: Sequence[EndpointAtWork], now: float) -> bool:
        if endpoint.ejected or not endpoints:
            return False
        out = sum([each.ejected for each in endpoints])
        if 100 * out >= self._settings.max_ejection_percent * len(endpoints):
            return False
        endpoint.ejected = True
        endpoint.ejected_at = now
        endpoint.ejections += 1
        return True


def status_of_local(outcome: Outcome) -> int:
    """The status that a failure without an answer counts as."""
    if outcome.timed_out or outcome.reset is ResetReason.CONNECTION_TIMEOUT:
        return 504
    return 503 if outcome.reset in CONNECT_REASONS else 500
