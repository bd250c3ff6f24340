"""A waypoint in one loop for each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kit.waypoint import App, LoopbackWaypoint


@pytest.fixture(name="waypoint")
def fixture_waypoint() -> Iterator[LoopbackWaypoint]:
    waypoint = LoopbackWaypoint()
    yield waypoint
    waypoint.close()


@pytest.fixture(name="app")
def fixture_app(waypoint: LoopbackWaypoint) -> App:
    """The endpoint of the service that the waypoint serves."""
    app = waypoint.app()
    waypoint.cluster(waypoint.endpoint(app))
    waypoint.serve()
    return app
