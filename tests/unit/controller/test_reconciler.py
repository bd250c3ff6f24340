"""When an object is as it is wanted."""

from __future__ import annotations

import pytest

from ztunnel.controller.reconciler import covers


@pytest.mark.parametrize(
    ("live", "wanted", "expected"),
    [
        ({"a": 1, "b": 2}, {"a": 1}, True),
        ({"a": 1}, {"a": 2}, False),
        ({}, {"a": {"b": 1}}, False),
        ({"ports": [{"port": 80, "protocol": "TCP"}]}, {"ports": [{"port": 80}]}, True),
        ({"ports": [{"port": 80}, {"port": 81}]}, {"ports": [{"port": 80}]}, False),
        ({"ports": "none"}, {"ports": []}, False),
        ({}, {"value": "", "labels": {}, "ports": []}, True),
        ({"value": "x"}, {"value": ""}, False),
        (None, {"a": 1}, False),
    ],
)
def test_what_others_add_does_not_matter(live: object, wanted: object, expected: bool) -> None:
    assert covers(live, wanted) is expected
