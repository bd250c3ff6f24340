"""Paths, waits and errors: what a request is called, how long to wait, and what the operator is told."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from ztunnel.kube.backoff import Backoff
from ztunnel.kube.client import decoded, retry_after
from ztunnel.kube.discovery import Kind
from ztunnel.kube.errors import ApiRefused, BadAnswer, Conflict, Forbidden, Gone, NotFound, Overloaded, Unauthorized, refused
from ztunnel.kube.resources import GATEWAYS, NODES, PODS, SERVICE_ACCOUNTS


def test_paths_and_words() -> None:
    assert PODS.path() == "/api/v1/pods"
    assert PODS.path("shop", "a/../b") == "/api/v1/namespaces/shop/pods/a%2F..%2Fb"
    assert GATEWAYS.path("shop", "g", "status") == "/apis/gateway.networking.k8s.io/v1/namespaces/shop/gateways/g/status"
    assert NODES.path("ignored", "n") == "/api/v1/nodes/n"
    assert GATEWAYS.words("patch", "status") == "patch gateways/status.gateway.networking.k8s.io"
    assert SERVICE_ACCOUNTS.words("create", "token") == "create serviceaccounts/token"
    assert (str(Kind("", "Pod", ("v1",))), str(Kind("x.io", "Y", ("v1",)))) == ("Pod", "Y.x.io")


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (401, Unauthorized),
        (403, Forbidden),
        (404, NotFound),
        (409, Conflict),
        (410, Gone),
        (429, Overloaded),
        (503, Overloaded),
        (422, ApiRefused),
    ],
)
def test_each_refusal_has_its_own_error(status: int, kind: type[ApiRefused]) -> None:
    error = refused("list pods", status, "because\nof\t it", "Why", 2.0)
    assert type(error) is kind
    assert (error.status, error.reason, error.retry_after) == (status, "Why", 2.0)
    assert "list pods" in str(error)
    assert "because of it" in str(error)


def test_a_missing_right_is_called_one() -> None:
    assert str(refused("list pods", 403, "no")) == "the right to list pods is missing: no"


def test_waits_grow_jitter_and_begin_anew() -> None:
    backoff = Backoff(lambda: 1.0, 1.0, 8.0)
    assert [backoff.next() for _ in range(5)] == [1.0, 2.0, 4.0, 8.0, 8.0]
    assert backoff.next(at_least=30.0) == 38.0
    backoff.succeeded()
    assert backoff.next() == 1.0
    assert Backoff(lambda: 0.0, 1.0, 8.0).next() == 0.5
    backoff.failures = 10**6
    assert backoff.next() == 8.0


def test_retry_after_is_seconds_or_a_date_within_reason() -> None:
    assert (retry_after("7"), retry_after("99999999999")) == (7, 600)
    now = datetime.now(UTC)
    assert retry_after(format_datetime(now - timedelta(days=1), usegmt=True)) == 0
    later = retry_after(format_datetime(now + timedelta(seconds=500), usegmt=True))
    assert later is not None
    assert 100 < later <= 500


@pytest.mark.parametrize("text", [None, "", "soon", "-5", "1e999", "Fri, 99 Foo"])
def test_a_retry_after_that_says_nothing_is_none(text: str | None) -> None:
    assert retry_after(text) is None


@pytest.mark.parametrize("content", [b"", b"[]", b"17", b"{", b'{"a":' * 5000 + b"1" + b"}" * 5000, b'{"a": "\xff"}', b'{"a": NaN}'])
def test_what_is_no_json_object_is_refused(content: bytes) -> None:
    with pytest.raises(BadAnswer, match="cannot look"):
        decoded(content, "look")
