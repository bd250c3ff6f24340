"""The suite's own trio hook."""

from __future__ import annotations

import time

import pytest
import trio
import trio.testing


async def test_an_async_test_runs_under_trio() -> None:
    assert trio.current_time() > 0


@pytest.mark.parametrize("seconds", [3600.0])
async def test_an_hour_passes_at_once_on_the_mock_clock(mock_clock: trio.testing.MockClock, seconds: float) -> None:
    began = time.monotonic()
    await trio.sleep(seconds)
    assert mock_clock.current_time() >= seconds
    assert time.monotonic() - began < 5
