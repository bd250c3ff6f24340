"""Tells whoever plays the API server which pods this node has captured: one small file per pod, renamed into place.

`enabled` once a pod's rules are in force and the data plane serves it, `pending` while that is being worked on, no file for pods that
are not wanted. Source: Istio's annotation `ambient.istio.io/redirection`, which is set from these.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import trio

from ztunnel.node.enrolment import PodStatus
from ztunnel.runtime.logs import fields

log = logging.getLogger(__name__)

_PERIOD_SECONDS = 0.1


class StatusFiles:
    """Keeps a directory in step with the enroller."""

    def __init__(self, directory: Path, status: Callable[[], Iterable[PodStatus]]) -> None:
        self._directory = directory
        self._status = status
        self._written: dict[str, str] = {}
        self._failing = False

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled. The files stay then: an agent that restarts has not let its pods go."""
        os.makedirs(self._directory, exist_ok=True)
        for name in os.listdir(self._directory):
            self._written[name] = ""
        task_status.started()
        while True:
            try:
                self._write()
                self._failing = False
            except OSError as error:
                if not self._failing:
                    log.error("cannot write redirection status", extra=fields(directory=self._directory, error=error))
                self._failing = True
            await trio.sleep(_PERIOD_SECONDS)

    def _write(self) -> None:
        wanted = {pod.uid: "enabled" if pod.enrolled else "pending" for pod in self._status() if pod.labelled}
        for uid, word in wanted.items():
            if self._written.get(uid) != word:
                temporary = self._directory / f".{uid}"
                temporary.write_text(f"{word}\n", encoding="utf-8")
                os.replace(temporary, self._directory / uid)
                self._written[uid] = word
        for uid in self._written.keys() - wanted.keys():
            (self._directory / uid).unlink(missing_ok=True)
            del self._written[uid]
