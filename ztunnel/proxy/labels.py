"""What a workload says of itself to the other end of a tunnel, for its telemetry only: the `baggage` header."""

from __future__ import annotations

from typing import Final

from ztunnel.hbone import connect
from ztunnel.mesh.workloads import Workload

_REMEMBERED: Final = 1024


def baggage_of(workload: Workload) -> bytes:
    """The header's value."""
    return _labels_of(workload).baggage


def answer_of(workload: Workload) -> bytes:
    """The header block with which the workload accepts a connection: the same for each."""
    return _labels_of(workload).answer


class _Labels:
    __slots__ = ("answer", "baggage", "workload")

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.baggage = connect.build_baggage(_baggage(workload))
        self.answer = connect.response_block(self.baggage)


def _labels_of(workload: Workload) -> _Labels:
    """Made once for each workload as it is now."""
    known = _known.get(workload.uid)
    if known is not None and known.workload is workload:
        return known
    if len(_known) >= _REMEMBERED:
        _known.clear()
    made = _known[workload.uid] = _Labels(workload)
    return made


_known: Final[dict[str, _Labels]] = {}


def _baggage(workload: Workload) -> connect.Baggage:
    """Source: Istio ztunnel `baggage.rs`."""
    return connect.Baggage(
        cluster=workload.cluster,
        namespace=workload.namespace,
        workload_type=workload.workload_type,
        workload_name=workload.workload_name,
        service_name=workload.canonical_name,
        revision=workload.canonical_revision,
    )
