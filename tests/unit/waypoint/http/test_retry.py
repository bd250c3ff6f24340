"""What is retried, how often and when: Envoy's conditions and Istio's defaults."""

from __future__ import annotations

import pytest

from tests.kit.l7 import request
from waypoint.http.messages import Request
from waypoint.http.retry import CompiledRetry, RetryState, back_off, grpc_timeout_of
from waypoint.upstream.outcome import Outcome, ResetReason
from ztunnel.mesh.l7.routes import Retry, RetryOn


def state(retry: Retry | None = None, asked: Request | None = None, *, trusted: bool = True) -> RetryState:
    return RetryState(CompiledRetry(retry), asked or request(), trusted=trusted)


def on(*conditions: RetryOn, codes: tuple[int, ...] = ()) -> Retry:
    return Retry(on=conditions, status_codes=codes)


def answer(status: int, **headers: str) -> Outcome:
    return Outcome(status, [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()])


def reset(reason: ResetReason, *, begun: bool = True) -> Outcome:
    return Outcome(reset=reason, request_begun=begun)


PER_TRY = Outcome(reset=ResetReason.LOCAL_RESET, timed_out=True)
CONNECT, REFUSED, REMOTE = (reset(each) for each in (ResetReason.CONNECTION_FAILURE, ResetReason.REFUSED_STREAM, ResetReason.REMOTE_RESET))
CLOSED, OVERFLOW = reset(ResetReason.CONNECTION_TERMINATION), reset(ResetReason.OVERFLOW)


@pytest.mark.parametrize(
    ("retry", "retried", "not_retried"),
    [
        (Retry(), [CONNECT, reset(ResetReason.CONNECTION_TIMEOUT), REFUSED, answer(200, grpc_status="14"), answer(200, grpc_status="1")],
         [answer(503), answer(200), REMOTE, CLOSED, OVERFLOW, PER_TRY, answer(200, grpc_status="2"), answer(200, grpc_status="0")]),
        (on(RetryOn.FIVE_XX), [answer(500), answer(503), answer(599), CONNECT, REMOTE, CLOSED, REFUSED, PER_TRY],
         [answer(499), answer(200), OVERFLOW]),
        (on(RetryOn.GATEWAY_ERROR), [answer(502), answer(503), answer(504), REMOTE, PER_TRY], [answer(500), answer(505), OVERFLOW]),
        (on(RetryOn.RESET), [REMOTE, CLOSED, CONNECT, PER_TRY], [answer(503), OVERFLOW]),
        (on(RetryOn.RESET_BEFORE_REQUEST), [reset(ResetReason.CONNECTION_TERMINATION, begun=False)], [CLOSED, REMOTE]),
        (on(RetryOn.CONNECT_FAILURE), [CONNECT, reset(ResetReason.LOCAL_CONNECTION_FAILURE)], [REMOTE, CLOSED, REFUSED, answer(503)]),
        (on(RetryOn.REFUSED_STREAM), [REFUSED], [REMOTE, CONNECT]),
        (on(RetryOn.RETRIABLE_4XX), [answer(409)], [answer(404), answer(400), REMOTE]),
        (on(RetryOn.RETRIABLE_STATUS_CODES, codes=(503, 418)), [answer(503), answer(418)], [answer(500), REMOTE]),
        (on(codes=(503,)), [], [answer(503)]),
        (on(RetryOn.CANCELLED), [answer(200, grpc_status="1")], [answer(200, grpc_status="4")]),
        (on(RetryOn.DEADLINE_EXCEEDED), [answer(200, grpc_status="4")], [answer(200, grpc_status="1")]),
        (on(RetryOn.RESOURCE_EXHAUSTED), [answer(200, grpc_status="8")], [answer(200, grpc_status="14")]),
        (on(RetryOn.INTERNAL), [answer(200, grpc_status="13")], [answer(200, grpc_status="junk"), answer(200)]),
        (on(RetryOn.UNAVAILABLE), [answer(200, grpc_status="14")], [answer(503)]),
        (on(RetryOn.ENVOY_RATELIMITED), [answer(429, x_envoy_ratelimited="true")], [answer(429)]),
        # Envoy's own words to its caller
        (on(RetryOn.FIVE_XX), [], [answer(503, x_envoy_overloaded="true"), answer(503, x_envoy_ratelimited="true")]),
        (None, [], [CONNECT, answer(503)]),
        (Retry(attempts=0), [], [CONNECT]),
        (Retry(attempts=-1), [], [CONNECT]),
    ],
)  # fmt: skip
def test_conditions(retry: Retry | None, retried: list[Outcome], not_retried: list[Outcome]) -> None:
    for outcome in retried:
        assert state(retry).wants(outcome, lambda: 0.5) is not None
    for outcome in not_retried:
        assert state(retry).wants(outcome, lambda: 0.5) is None


def test_two_retries_and_no_more() -> None:
    made = state(Retry())
    assert [made.wants(CONNECT, lambda: 0.0) is not None for _ in range(4)] == [True, True, False, False]
    assert (made.retries, made.exhausted) == (2, True)


def test_what_is_no_case_for_a_retry_exhausts_nothing() -> None:
    made = state(Retry(attempts=1))
    assert made.wants(answer(404), lambda: 0.0) is None
    assert (made.retries, made.exhausted, made.may_retry) == (0, False, True)


def test_a_retry_that_the_budget_refused() -> None:
    made = state(Retry())
    assert made.wants(CONNECT, lambda: 0.0) == 0.0
    made.give_up()
    assert (made.retries, made.exhausted) == (0, True)


@pytest.mark.parametrize(("retry", "most"), [(1, 0.025), (2, 0.075), (3, 0.175), (4, 0.25), (5, 0.25), (100, 0.25)])
def test_back_off(retry: int, most: float) -> None:
    assert back_off(0.025, 0.25, retry) == pytest.approx(most)


def test_back_off_is_random_up_to_that() -> None:
    made = state(Retry(attempts=3, base=1.0, maximum=10.0))
    assert [made.wants(CONNECT, lambda: 0.5) for _ in range(3)] == [0.5, 1.5, 3.5]
    assert state(Retry()).wants(CONNECT, lambda: 0.0) == 0.0


@pytest.mark.parametrize(
    ("retry", "headers", "outcome", "retries"),
    [
        (Retry(), {"x_envoy_max_retries": "5"}, CONNECT, 5),
        (Retry(), {"x_envoy_max_retries": "0"}, CONNECT, 0),
        (Retry(), {"x_envoy_max_retries": "many"}, CONNECT, 2),
        (Retry(), {"x_envoy_max_retries": "999999999"}, CONNECT, 1000),
        (Retry(), {"x_envoy_retry_on": "5xx,nonsense"}, answer(503), 2),
        (None, {"x_envoy_retry_on": "5xx"}, answer(503), 1),
        (None, {"x_envoy_max_retries": "0", "x_envoy_retry_on": "5xx"}, answer(503), 0),
        (None, {"x_envoy_retry_on": "5xx", "x_envoy_max_retries": "0"}, answer(503), 0),
        (None, {"x_envoy_retry_on": "5xx", "x_envoy_max_retries": "3"}, answer(503), 3),
        (None, {"x_envoy_retry_on": "nonsense"}, answer(503), 0),
        (None, {"x_envoy_retry_grpc_on": "unavailable, cancelled"}, answer(200, grpc_status="1"), 1),
        (Retry(), {"x_envoy_retriable_status_codes": "503, x,77"}, answer(503), 2),
        (Retry(), {"x_envoy_retry_on": "retriable-headers", "x_envoy_retriable_header_names": "X-Again, x-b"}, answer(200, x_again=""), 2),
        (Retry(), {"x_envoy_retry_on": "retriable-headers", "x_envoy_retriable_header_names": "x-again"}, answer(200, x_b=""), 0),
    ],
)
def test_callers_may_ask(retry: Retry | None, headers: dict[str, str], outcome: Outcome, retries: int) -> None:
    made = state(retry, request(**headers))
    while made.wants(outcome, lambda: 0.0) is not None:
        pass
    assert made.retries == retries
    stranger = state(retry, request(**headers), trusted=False)
    while stranger.wants(outcome, lambda: 0.0) is not None:
        pass
    assert stranger.retries == (2 if retry is not None and outcome is CONNECT else 0)


@pytest.mark.parametrize(
    ("timeout", "per_try", "headers", "expected"),
    [
        (0.0, 0.0, {}, (0.0, 0.0, None)),
        (3.0, 0.0, {}, (3.0, 0.0, "3000")),
        (3.0, 1.0, {}, (3.0, 1.0, "1000")),
        (3.0, 3.0, {}, (3.0, 0.0, "3000")),  # no shorter than the whole: ignored
        (0.0, 1.0, {}, (0.0, 1.0, "1000")),
        (3.0, 0.0, {"x_envoy_upstream_rq_timeout_ms": "250"}, (0.25, 0.0, "250")),
        (3.0, 0.0, {"x_envoy_upstream_rq_timeout_ms": "x"}, (3.0, 0.0, "3000")),
        (3.0, 0.0, {"x_envoy_upstream_rq_per_try_timeout_ms": "500"}, (3.0, 0.5, "500")),
        (0.0, 0.0, {"grpc_timeout": "2S"}, (2.0, 0.0, "2000")),
        (1.0, 0.0, {"grpc_timeout": "2S"}, (1.0, 0.0, "1000")),
        (3.0, 0.0, {"grpc_timeout": "2S"}, (2.0, 0.0, "2000")),
        (3.0, 0.0, {"x_envoy_expected_rq_timeout_ms": "1"}, (3.0, 0.0, "3000")),
    ],
)
def test_timeouts(timeout: float, per_try: float, headers: dict[str, str], expected: tuple[float, float, str | None]) -> None:
    asked = request(**headers)
    made = RetryState(CompiledRetry(Retry(per_try=per_try)), asked, timeout)
    told = asked.get(b"x-envoy-expected-rq-timeout-ms")
    assert (made.timeout, made.per_try, None if told is None else told.decode()) == expected
    assert made.grpc_deadline is (expected[0] == 2.0)


def test_the_application_sees_none_of_it() -> None:
    asked = request(x_envoy_max_retries="1", x_envoy_hedge_on_per_try_timeout="true", x_envoy_other="stays", x_b="2")
    RetryState(CompiledRetry(Retry()), asked, trusted=False)
    assert asked.headers == [(b"x-envoy-other", b"stays"), (b"x-b", b"2")]


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(b"1H", 3600.0), (b"2M", 120.0), (b"3S", 3.0), (b"250m", 0.25), (b"5000u", 0.005), (b"9n", 0.001),
     (b"0S", 0.001), (b"", None), (b"5", None),
     (b"S", None), (b"-1S", None), (b"123456789S", None), (b"1x", None)],
)  # fmt: skip
def test_grpc_timeouts(value: bytes, seconds: float | None) -> None:
    assert grpc_timeout_of(value) == seconds
