"""Whether a request is tried again, and when. Source: Envoy "x-envoy-retry-on", `retry_state_impl.cc`; Istio's defaults are in `Retry`.

Never tried again: what a circuit breaker refused, an answer with `x-envoy-overloaded`. Not decided here, since the engine knows it: a
request whose answer has begun, or whose body is gone. Concurrency of retries is the cluster's (`ClusterAtWork.admit_retry`).
"""

from __future__ import annotations

from collections.abc import Callable

from waypoint.http.messages import Request, header
from waypoint.upstream.outcome import CONNECT_REASONS, Outcome, ResetReason
from ztunnel.mesh.l7.routes import Retry, RetryOn

_BITS = {condition: 1 << place for place, condition in enumerate(RetryOn)}
_FIVE_XX = _BITS[RetryOn.FIVE_XX]
_GATEWAY = _BITS[RetryOn.GATEWAY_ERROR]
_RESET = _BITS[RetryOn.RESET]
_BEFORE_REQUEST = _BITS[RetryOn.RESET_BEFORE_REQUEST]
_CONNECT = _BITS[RetryOn.CONNECT_FAILURE]
_REFUSED = _BITS[RetryOn.REFUSED_STREAM]
_4XX = _BITS[RetryOn.RETRIABLE_4XX]
_CODES = _BITS[RetryOn.RETRIABLE_STATUS_CODES]
_HEADERS = _BITS[RetryOn.RETRIABLE_HEADERS]
_RATELIMITED = _BITS[RetryOn.ENVOY_RATELIMITED]
_GRPC: dict[bytes, int] = {
    b"1": _BITS[RetryOn.CANCELLED],
    b"4": _BITS[RetryOn.DEADLINE_EXCEEDED],
    b"8": _BITS[RetryOn.RESOURCE_EXHAUSTED],
    b"13": _BITS[RetryOn.INTERNAL],
    b"14": _BITS[RetryOn.UNAVAILABLE],
}
_ANY_GRPC = sum(_GRPC.values())
_BY_NAME: dict[bytes, int] = {condition.value.encode(): bit for condition, bit in _BITS.items()}

_OVERRIDES = frozenset(
    {
        b"x-envoy-max-retries",
        b"x-envoy-retry-on",
        b"x-envoy-retry-grpc-on",
        b"x-envoy-retriable-status-codes",
        b"x-envoy-retriable-header-names",
        b"x-envoy-upstream-rq-timeout-ms",
        b"x-envoy-upstream-rq-per-try-timeout-ms",
        b"x-envoy-hedge-on-per-try-timeout",
    }
)
MAX_ATTEMPTS = 1000
"""More than any route or caller means."""


class CompiledRetry:
    """A route's `Retry`, ready. Without one nothing is retried unless a trusted caller asks."""

    __slots__ = ("attempts", "avoid_previous_hosts", "base", "codes", "maximum", "on", "per_try", "remote_localities")

    def __init__(self, retry: Retry | None) -> None:
        self.attempts = 0 if retry is None else max(0, min(retry.attempts, MAX_ATTEMPTS))
        self.on = 0
        self.codes: frozenset[int] = frozenset()
        self.per_try = 0.0
        self.base = 0.025
        self.maximum = 0.25
        self.avoid_previous_hosts = True
        self.remote_localities = False
        if retry is not None:
            for condition in retry.on:
                self.on |= _BITS[condition]
            self.codes = frozenset(retry.status_codes)
            self.per_try = retry.per_try
            self.base = retry.base
            self.maximum = retry.maximum
            self.avoid_previous_hosts = retry.avoid_previous_hosts
            self.remote_localities = retry.remote_localities


class RetryState:
    """One request's tries.

    `timeout` and `per_try` are this request's, seconds, 0 none. `retries`: made so far. `exhausted`: one more was wanted and there was
    none left (flag URX).
    """

    __slots__ = ("_codes", "_left", "_named", "_on", "_policy", "exhausted", "grpc_deadline", "per_try", "retries", "timeout")

    def __init__(self, policy: CompiledRetry, request: Request, timeout: float = 0.0, *, trusted: bool = True) -> None:
        """Takes what a caller says of retries and timeouts out of the request, and obeys it.

        Args:
            timeout: the route's, seconds; 0 none.
            trusted: a caller of the mesh; of others the headers go unread.
        """
        self._policy = policy
        self._left = policy.attempts
        self._on = policy.on
        self._codes = policy.codes
        self._named: list[bytes] = []
        self.timeout = timeout
        self.per_try = policy.per_try
        self.retries = 0
        self.exhausted = False
        self.grpc_deadline = False
        """The timeout is the caller's `grpc-timeout`: its end is DEADLINE_EXCEEDED (4)."""
        overridden = counted = False
        for name, value in request.headers:
            if name.startswith(b"x-envoy-"):
                if name in _OVERRIDES:
                    overridden = True
                    counted = counted or (name == b"x-envoy-max-retries" and value.isdigit())
                    if trusted:
                        self._override(name, value)
            elif name == b"grpc-timeout":
                self._grpc_timeout(value)
        if self._on and not policy.on and not self._left and not counted:
            self._left = 1  # Envoy: a caller's conditions alone mean one retry
        if overridden:
            request.headers = [line for line in request.headers if line[0] not in _OVERRIDES]
        if self.per_try and self.timeout and self.per_try >= self.timeout:
            self.per_try = 0.0  # Envoy: no shorter than the whole, so it says nothing
        if self.timeout or self.per_try:
            expected = int((self.per_try or self.timeout) * 1000)
            request.headers = [line for line in request.headers if line[0] != b"x-envoy-expected-rq-timeout-ms"]
            request.headers.append((b"x-envoy-expected-rq-timeout-ms", b"%d" % expected))

    @property
    def avoids_previous(self) -> bool:
        """Whether another endpoint is to be chosen for another try."""
        return self._policy.avoid_previous_hosts

    @property
    def names_headers(self) -> bool:
        """Whether a header of any response could lead to another try."""
        return bool(self._named)

    @property
    def may_retry(self) -> bool:
        """Whether any outcome could lead to another try: only then is a body worth keeping."""
        return self._left > 0 and self._on != 0

    def wants(self, outcome: Outcome, dice: Callable[[], float]) -> float | None:
        """Seconds until the next try, which is counted as made; None: this outcome is what the client gets.

        Args:
            dice: uniform in [0, 1).
        """
        if not self._on or not self._matches(outcome):
            return None
        if self._left <= 0:
            self.exhausted = True
            return None
        self._left -= 1
        self.retries += 1
        return dice() * back_off(self._policy.base, self._policy.maximum, self.retries)

    def give_up(self) -> None:
        """The retry that `wants` granted is not made (the budget said no)."""
        self.retries -= 1
        self.exhausted = True

    def _matches(self, outcome: Outcome) -> bool:
        on = self._on
        if outcome.status == 0:
            return self._matches_reset(on, outcome)
        headers = outcome.headers or []
        if header(headers, b"x-envoy-overloaded") is not None:
            return False
        if header(headers, b"x-envoy-ratelimited") is not None:
            return on & _RATELIMITED != 0
        status = outcome.status
        if on & _FIVE_XX and status >= 500:
            return True
        if on & _GATEWAY and 502 <= status <= 504:
            return True
        if on & _4XX and status == 409:
            return True
        if on & _CODES and status in self._codes:
            return True
        if on & _HEADERS:
            for name in self._named:
                if header(headers, name) is not None:
                    return True
        if on & _ANY_GRPC:
            code = header(headers, b"grpc-status")
            return code is not None and on & _GRPC.get(code, 0) != 0
        return False

    def _matches_reset(self, on: int, outcome: Outcome) -> bool:
        reason = outcome.reset
        if reason is ResetReason.OVERFLOW:
            return False
        if on & (_FIVE_XX | _GATEWAY | _RESET):
            return True
        if on & _BEFORE_REQUEST and not outcome.request_begun:
            return True
        if on & _REFUSED and reason is ResetReason.REFUSED_STREAM:
            return True
        return on & _CONNECT != 0 and reason in CONNECT_REASONS

    def _override(self, name: bytes, value: bytes) -> None:
        if name in (b"x-envoy-retry-on", b"x-envoy-retry-grpc-on"):
            for word in value.split(b","):
                self._on |= _BY_NAME.get(word.strip(), 0)
        elif name == b"x-envoy-max-retries":
            self._left = min(_number(value, self._left), MAX_ATTEMPTS)
        elif name == b"x-envoy-retriable-status-codes":
            self._codes |= {int(word) for word in value.replace(b" ", b"").split(b",") if word.isdigit() and len(word) == 3}
        elif name == b"x-envoy-retriable-header-names":
            self._named += [word.strip().lower() for word in value.split(b",")[:16] if word.strip()]
        elif name == b"x-envoy-upstream-rq-timeout-ms":
            self.timeout = _number(value, int(self.timeout * 1000)) / 1000
        elif name == b"x-envoy-upstream-rq-per-try-timeout-ms":
            self.per_try = _number(value, int(self.per_try * 1000)) / 1000

    def _grpc_timeout(self, value: bytes) -> None:
        asked = grpc_timeout_of(value)
        if asked is not None and (not self.timeout or asked < self.timeout):
            self.timeout = asked
            self.grpc_deadline = True


def back_off(base: float, maximum: float, retry: int) -> float:
    """The most that is waited before the `retry`th retry (from 1): min((2^N - 1)·base, maximum)."""
    return min((2.0 ** min(retry, 32) - 1.0) * base, maximum)


_UNITS: dict[bytes, float] = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}


def grpc_timeout_of(value: bytes) -> float | None:
    """Seconds that a `grpc-timeout` names; None if it names none. Source: gRPC over HTTP/2, Timeout."""
    number, unit = value[:-1], _UNITS.get(value[-1:])
    if unit is None or not number.isdigit() or len(number) > 8:
        return None
    # 0 would mean "none" to us; the caller means "at once"
    return max(int(number) * unit, 1e-3)


def _number(value: bytes, otherwise: int) -> int:
    return int(value) if value.isdigit() and len(value) <= 9 else otherwise
