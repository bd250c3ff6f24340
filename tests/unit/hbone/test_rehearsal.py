"""The rehearsal before privileges are given up."""

from __future__ import annotations

import pytest

from ztunnel.hbone.rehearsal import rehearse


@pytest.mark.parametrize("own_records", [True, False])
def test_it_speaks_to_itself(own_records: bool) -> None:
    rehearse(own_records)
