"""Circuit breakers of one cluster: how much of it may be under way at once. Source: Envoy, "Circuit breaking", "Retry budgets"."""

from __future__ import annotations

from ztunnel.mesh.l7.clusters import PoolLimits


class Breakers:
    """Counters against limits. `admit_…` counts one more, or says no (flag UO); each admitted one is released once."""

    __slots__ = ("connections", "limits", "pending", "requests", "retries")

    def __init__(self, limits: PoolLimits) -> None:
        self.limits = limits
        self.connections = 0
        self.pending = 0
        self.requests = 0
        self.retries = 0

    def admit_connection(self) -> bool:
        """One more connection, HTTP/1.1 or TCP."""
        if self.connections >= self.limits.max_connections:
            return False
        self.connections += 1
        return True

    def release_connection(self) -> None:
        """It is closed."""
        self.connections -= 1

    def admit_pending(self) -> bool:
        """One more request that waits for a connection."""
        if self.pending >= self.limits.max_pending:
            return False
        self.pending += 1
        return True

    def release_pending(self) -> None:
        """It waits no longer."""
        self.pending -= 1

    def admit_request(self) -> bool:
        """One more request under way."""
        if self.requests >= self.limits.max_requests:
            return False
        self.requests += 1
        return True

    def release_request(self) -> None:
        """It is over."""
        self.requests -= 1

    def admit_retry(self) -> bool:
        """One more retry under way: within the budget where there is one, else within the limit."""
        budget = self.limits.retry_budget
        most = self.limits.max_retries if budget is None else max(budget.minimum, int(budget.share * (self.requests + self.pending)))
        if self.retries >= most:
            return False
        self.retries += 1
        return True

    def release_retry(self) -> None:
        """It is over."""
        self.retries -= 1
