"""How a waypoint is put together."""

from __future__ import annotations

from waypoint.app import _remote_authority
from waypoint.settings import parse


def test_a_waypoint_asks_an_authority_for_itself_as_only_agents_may_ask_for_others() -> None:
    told = {"name": "gate", "namespace": "shop", "sources": {"files": "/m"}}
    assert _remote_authority(parse(told, {})) is None
    asked = _remote_authority(parse({**told, "ca": {"address": "ca.example:15012"}}, {}))
    assert asked is not None
    assert asked.impersonates is False
    assert (asked.target.host, asked.target.port) == ("ca.example", 15012)
