"""Services as values."""

from __future__ import annotations

from tests.kit.builders import service


def test_a_service_is_named_by_namespace_and_hostname() -> None:
    assert service("web").key == "default/web.default.svc.cluster.local"
