"""A delta knows whether it changes anything."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.kit.builders import deny, service, workload
from ztunnel.mesh.delta import Delta


def test_an_empty_delta_is_false() -> None:
    assert not Delta()


@pytest.mark.parametrize(
    "change",
    [
        {"workloads": (workload("a"),)},
        {"services": (service("a"),)},
        {"policies": (deny("a"),)},
        {"removed_workloads": ("uid-a",)},
        {"removed_services": ("default/a",)},
        {"removed_policies": ("AuthorizationPolicy/default/a",)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_any_change_is_true(change: dict[str, tuple[object, ...]]) -> None:
    assert replace(Delta(), **change)  # type: ignore[arg-type]  # one field by name
