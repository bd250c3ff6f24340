"""The values that both record layers share."""

from __future__ import annotations

import pytest

from ztunnel.hbone.records import KEY_UPDATE_SIZE, MAX_FRAGMENT, OVERHEAD, AlertReceived, RecordError, alert_name, sealed_size
from ztunnel.mesh.errors import Flag, PeerError


@pytest.mark.parametrize(
    ("n", "records"), [(0, 0), (1, 1), (MAX_FRAGMENT, 1), (MAX_FRAGMENT + 1, 2), (2 * MAX_FRAGMENT, 2), (1 << 20, 64), ((1 << 20) + 1, 65)]
)
def test_sealed_size_counts_every_record_and_one_key_update(n: int, records: int) -> None:
    assert sealed_size(n) == n + records * OVERHEAD + KEY_UPDATE_SIZE


def test_alerts_have_names_and_strange_ones_numbers() -> None:
    assert alert_name(46) == "certificate_unknown"
    assert alert_name(200) == "alert 200"


def test_record_errors_are_the_peers_fault_and_tls_failures() -> None:
    error = AlertReceived(48)
    assert isinstance(error, RecordError)
    assert isinstance(error, PeerError)
    assert error.flag is Flag.TLS_FAILURE
    assert "unknown_ca" in str(error)
