"""What of a pod's life can be decided without one."""

from __future__ import annotations

import pytest

from ztunnel.lab.pods import expanded


@pytest.mark.parametrize(
    ("value", "result"),
    [
        ("a/$(NAME)/b", "a/web/b"),
        ("$(NAME)$(NAME)", "webweb"),
        ("$(UNKNOWN)", "$(UNKNOWN)"),
        ("$$(NAME)", "$(NAME)"),
        ("$NAME $", "$NAME $"),
    ],
)
def test_variables_in_variables(value: str, result: str) -> None:
    assert expanded(value, {"NAME": "web"}) == result
