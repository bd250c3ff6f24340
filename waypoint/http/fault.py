"""Injected faults: what happens to this request, if anything. Source: Istio HTTPFaultInjection, Envoy `fault_filter.cc`."""

from __future__ import annotations

from collections.abc import Callable

from waypoint.http import replies
from waypoint.http.messages import LocalReply
from ztunnel.mesh.l7.routes import Fault

_HTTP_OF_GRPC = {
    0: 200, 1: 499, 2: 500, 3: 400, 4: 504, 5: 404, 6: 409, 7: 403, 8: 429, 9: 400,
    10: 409, 11: 400, 12: 501, 13: 500, 14: 503, 15: 500, 16: 401,
}  # fmt: skip
"""What a caller that speaks no gRPC is told. Source: google.rpc.Code, "HTTP Mapping"."""


def plan(fault: Fault, dice: Callable[[], float]) -> tuple[float, LocalReply | None]:
    """(seconds to wait first, the abort after it or None). Delay and abort each have dice of their own.

    Args:
        dice: uniform in [0, 1).
    """
    delay = fault.delay if fault.delay_share > 0 and dice() < fault.delay_share else 0.0
    if fault.abort_share <= 0 or not (fault.abort_status or fault.abort_grpc is not None) or dice() >= fault.abort_share:
        return delay, None
    if fault.abort_grpc is None:
        return delay, replies.fault_abort(fault.abort_status)
    return delay, replies.fault_abort(_HTTP_OF_GRPC.get(fault.abort_grpc, 500), fault.abort_grpc)
