"""What every Kubernetes object has: its key and its metadata."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from typing import Final, NamedTuple

from ztunnel.mesh.manifests.fields import Field

_UID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class ObjectKey(NamedTuple):
    """Which object. Cluster-scoped kinds have no namespace; kinds that we do not read are `Kind.group`."""

    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}" if self.namespace else f"{self.kind} {self.name}"


@dataclass(frozen=True, slots=True)
class Metadata:
    """The parts of `metadata` that mean something to the mesh."""

    name: str
    namespace: str = ""
    uid: str = ""
    """As given, or `namespace.name` (a namespace has no dot). Safe as a file name."""
    labels: dict[str, str] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)
    created: str = ""
    """UTC, ISO 8601, so that text order is time order; empty (the oldest) when not said."""
    deleting: bool = False
    owner: tuple[str, str] | None = None
    """Kind and name of the controlling owner."""


def read_metadata(document: Field, *, namespaced: bool = True) -> Metadata:
    """The metadata of a document.

    Raises:
        ManifestError: a name, namespace, UID, label, annotation, timestamp or owner of the wrong type or form.
    """
    metadata = document.get("metadata")
    name = metadata.get("name").name() if namespaced else metadata.get("name").namespace()
    namespace = metadata.get("namespace").namespace("default") if namespaced else ""
    return Metadata(
        name=name,
        namespace=namespace,
        uid=_uid(metadata.get("uid"), f"{namespace}.{name}" if namespaced else name),
        labels=metadata.get("labels").labels(),
        annotations={key: _annotation(member) for key, member in metadata.get("annotations").texts()},
        created=_time(metadata.get("creationTimestamp")),
        deleting=not metadata.get("deletionTimestamp").absent,
        owner=_owner(metadata.get("ownerReferences")),
    )


def _uid(place: Field, default: str) -> str:
    # It names files and network namespaces, and must not be able to name their parents.
    text = place.text(default)
    if not _UID.fullmatch(text) and not place.absent:
        raise place.wrong("not a UID")
    return text


def _annotation(place: Field) -> str:
    return "" if place.value == "" else place.text()


def _time(place: Field) -> str:
    value = place.value
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            raise place.wrong("not a time") from None
    if isinstance(value, datetime):
        # A YAML loader turns an unquoted time into one without a zone that is meant as UTC.
        aware = value if value.tzinfo else value.replace(tzinfo=UTC)
        try:
            return aware.astimezone(UTC).isoformat()
        except OverflowError:
            raise place.error("not a time: out of range") from None
    if isinstance(value, date):
        return value.isoformat()
    if value is None:
        return ""
    raise place.wrong("not a time")


def _owner(place: Field) -> tuple[str, str] | None:
    for reference in place.items():
        if reference.get("controller").boolean():
            return reference.get("kind").text(), reference.get("name").name()
    return None
