"""What is attached to pods is remembered by what they say of themselves, and only so much of it."""

from __future__ import annotations

import pytest

from tests.kit import builders
from tests.kit.builders import authorization, selecting
from ztunnel.mesh import attached
from ztunnel.mesh.attached import Attached
from ztunnel.mesh.manifests.core import Pod
from ztunnel.mesh.manifests.parse import parse


def pod(app: int) -> Pod:
    made = parse(builders.pod(f"p{app}", "10.0.0.1", labels={"app": f"a{app}"}), "test")
    assert isinstance(made, Pod)
    return made


def test_few_answers_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attached, "_MAX_ALIKE", 3)
    policies = [parse(authorization(f"only-{app}", selector=selecting(app=f"a{app}")), "test") for app in range(10)]
    held = Attached(policies, "istio-system", "cluster.local")
    for app in [*range(10), *range(10)]:
        assert held.to(pod(app)) == ((f"AuthorizationPolicy/default/only-{app}",), False)
    assert len(held._to) <= 3
