"""Which requests get a fault, and which one."""

from __future__ import annotations

import pytest

from waypoint.http.fault import plan
from ztunnel.mesh.l7.routes import Fault


@pytest.mark.parametrize(
    ("fault", "dice", "delay", "abort"),
    [
        (Fault(), [], 0.0, None),
        (Fault(delay=7.0, delay_share=1.0), [0.999], 7.0, None),
        (Fault(delay=7.0, delay_share=0.1), [0.0999], 7.0, None),
        (Fault(delay=7.0, delay_share=0.1), [0.1], 0.0, None),
        (Fault(delay=7.0), [], 0.0, None),  # no percentage: nobody
        (Fault(abort_status=500), [], 0.0, None),
        (Fault(abort_share=1.0), [], 0.0, None),
        (Fault(abort_status=503, abort_share=0.000001), [0.0000009], 0.0, (503, None)),
        (Fault(abort_status=503, abort_share=0.000001), [0.000001], 0.0, None),
        (Fault(abort_grpc=14, abort_share=1.0), [0.5], 0.0, (503, 14)),
        (Fault(abort_grpc=0, abort_share=1.0), [0.5], 0.0, (200, 0)),
        (Fault(abort_grpc=99, abort_share=1.0), [0.5], 0.0, (500, 99)),
        # dice of their own
        (Fault(delay=1.0, delay_share=0.5, abort_status=400, abort_share=0.5), [0.4, 0.6], 1.0, None),
        (Fault(delay=1.0, delay_share=0.5, abort_status=400, abort_share=0.5), [0.6, 0.4], 0.0, (400, None)),
        (Fault(delay=1.0, delay_share=0.5, abort_status=400, abort_share=0.5), [0.4, 0.4], 1.0, (400, None)),
    ],
)
def test_plan(fault: Fault, dice: list[float], delay: float, abort: tuple[int, int | None] | None) -> None:
    rolled = iter(dice)
    waits, reply = plan(fault, lambda: next(rolled))
    assert waits == delay
    assert (None if reply is None else (reply.status, reply.grpc_status)) == abort
    if reply is not None:
        assert (reply.body, reply.flag, reply.details) == (b"fault filter abort", "FI", "fault_filter_abort")
