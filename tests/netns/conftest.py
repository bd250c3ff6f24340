"""Fixtures of the namespace tests. That nothing here can touch the machine's own network is tests/conftest.py's affair."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kit.netns import Pod, Topology


@pytest.fixture
def net() -> Iterator[Topology]:
    """An empty topology."""
    with Topology() as topology:
        yield topology


@pytest.fixture
def client(net: Topology) -> Pod:
    """A pod on a node of its own."""
    return net.node().pod("client")


@pytest.fixture
def server(net: Topology) -> Pod:
    """Another one, on another node."""
    return net.node().pod("server")
