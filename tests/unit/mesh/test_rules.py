"""Policies as values."""

from __future__ import annotations

from tests.kit.builders import allow


def test_a_policy_is_named_by_kind_namespace_and_name() -> None:
    assert allow("web").key == "AuthorizationPolicy/default/web"
