"""Callers and pods of an authority without a cluster, from files that are read again when they change: nodes without Kubernetes, and labs.

Callers are a YAML list; tokens are known by their SHA-256, so that the file gives nobody anything:

    - token_sha256: 2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae
      namespace: istio-system
      serviceAccount: ztunnel
      pod: ztunnel-1
      uid: 0b6cf1b2-…

Pods are manifests in a directory, as the agents of `sources.files` read them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import trio

from ztunnel.ca.files import RootError
from ztunnel.ca.issuance import Caller, Reason, Refusal
from ztunnel.ca.pods import PodPlace, PodTable
from ztunnel.mesh.errors import LocalError, ManifestError
from ztunnel.mesh.manifests.core import Pod
from ztunnel.mesh.manifests.fields import Field
from ztunnel.mesh.manifests.parse import parse, unpack
from ztunnel.runtime.documents import DocumentError, read_yaml
from ztunnel.runtime.logs import fields

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5
MAX_FILE_BYTES = 16 << 20
MAX_FILES = 10_000
SUFFIXES = frozenset((".yaml", ".yml", ".json"))  # JSON is YAML


@dataclass(slots=True)
class FileTokens:
    """Satisfies `service.TokenReviewer`."""

    file: Path
    _read: tuple[int, int] = field(default=(0, 0), init=False)
    _callers: dict[str, Caller] = field(default_factory=dict, init=False)

    async def review(self, token: str) -> Caller:
        """See `service.TokenReviewer`."""
        try:
            status = self.file.stat()
            if self._read != (status.st_mtime_ns, status.st_size):
                self._callers = dict(_callers(self.file))
                self._read = status.st_mtime_ns, status.st_size
        except OSError as error:
            raise RootError(f"{self.file}: {error.strerror}") from error
        caller = self._callers.get(sha256(token.encode("latin-1", "replace")).hexdigest())
        if caller is None:
            raise Refusal(Reason.TOKEN_REFUSED, f"{self.file} does not have this token")
        return caller


@dataclass(slots=True)
class FilePods:
    """Keeps a table of pods from a directory. A file that cannot be read makes them all unknown: nothing is signed until it can."""

    directory: Path
    table: PodTable
    _seen: tuple[tuple[str, int, int], ...] | None = field(default=None, init=False)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Follow the directory, for ever."""
        self._look()
        task_status.started()
        while True:
            await trio.sleep(POLL_SECONDS)
            self._look()

    def _look(self) -> None:
        try:
            files = sorted(path for path in self.directory.iterdir() if path.suffix in SUFFIXES and not path.name.startswith("."))
            seen = tuple((path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in files[:MAX_FILES])
            if seen == self._seen:
                return
            self._seen = seen
            self.table.replace(place for path in files[:MAX_FILES] for place in _pods(path))
        except (OSError, DocumentError, ManifestError) as error:
            self.table.synced = False
            log.error("pods cannot be read", extra=fields(directory=self.directory, error=error))


def _callers(file: Path) -> Iterator[tuple[str, Caller]]:
    try:
        for document in read_yaml(_content(file)):
            for item in Field(str(file), "", document).items():
                digest = item.get("token_sha256").text().lower()
                if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
                    raise item.get("token_sha256").wrong("not a SHA-256 in hexadecimal")
                names = item.get("namespace").namespace(), item.get("serviceAccount").name(), item.get("pod").name("")
                yield digest, Caller(*names, item.get("uid").text(""))
    except (DocumentError, ManifestError) as error:
        raise LocalError(f"{file}: {error}") from error


def _pods(file: Path) -> Iterator[PodPlace]:
    for number, document in enumerate(read_yaml(_content(file)), 1):
        if document is None:
            continue
        for body in unpack(document):
            if not isinstance(body, dict) or body.get("kind") != "Pod":
                continue
            pod = parse(body, f"{file} document {number}")
            if isinstance(pod, Pod) and not pod.terminal:
                metadata = pod.metadata
                yield PodPlace(metadata.namespace, metadata.name, metadata.uid, pod.node, pod.service_account)


def _content(file: Path) -> bytes:
    with file.open("rb") as opened:
        content = opened.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise DocumentError(f"{file}: larger than {MAX_FILE_BYTES} bytes")
    return content
