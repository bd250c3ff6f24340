"""What came of one try upstream: what retries and outlier detection judge by."""

from __future__ import annotations

from enum import Enum


class ResetReason(Enum):
    """Why there is no (whole) answer from upstream. Value: as Envoy's bodies and details write it."""

    CONNECTION_FAILURE = "remote connection failure"
    LOCAL_CONNECTION_FAILURE = "local connection failure"
    CONNECTION_TIMEOUT = "connection timeout"
    CONNECTION_TERMINATION = "connection termination"
    REMOTE_RESET = "remote reset"
    REFUSED_STREAM = "remote refused stream reset"
    LOCAL_RESET = "local reset"
    OVERFLOW = "overflow"
    PROTOCOL_ERROR = "protocol error"
    OVERLOAD = "overload manager reset"


CONNECT_REASONS = frozenset({ResetReason.CONNECTION_FAILURE, ResetReason.LOCAL_CONNECTION_FAILURE, ResetReason.CONNECTION_TIMEOUT})
"""Those of a connection that never stood."""


class Outcome:
    """Either a response's head, or a reset before one."""

    __slots__ = ("headers", "request_begun", "reset", "status", "timed_out")

    def __init__(
        self,
        status: int = 0,
        headers: list[tuple[bytes, bytes]] | None = None,
        *,
        reset: ResetReason | None = None,
        timed_out: bool = False,
        request_begun: bool = True,
    ) -> None:
        """
        Args:
            status: of the response; 0 without one.
            headers: of the response.
            timed_out: the try's own time ran out (`per_try`).
            request_begun: the request's head had gone out before the reset.
        """
        self.status = status
        self.headers = headers
        self.reset = reset
        self.timed_out = timed_out
        self.request_begun = request_begun
