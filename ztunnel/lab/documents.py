"""Manifests from files, directories and standard input, as documents that remember where they came from."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from ztunnel.lab.objects import LabError
from ztunnel.mesh.errors import ManifestError
from ztunnel.mesh.manifests.parse import unpack
from ztunnel.mesh.manifests.tree import Tree
from ztunnel.runtime.documents import DocumentError, read_yaml

SUFFIXES = (".yaml", ".yml", ".json")
MAX_FILE = 8 << 20
MAX_DOCUMENTS = 5000


def read(places: Iterable[str]) -> list[Tree]:
    """Every object in files, directories (not below them) and `-`, as `{"source": …, "body": …}` in the order of a listing.

    Raises:
        LabError: a place that is not there, too large, or not YAML.
        ManifestError: a document that is not an object.
    """
    found: list[Tree] = []
    places = list(places)
    for place in places:
        for name, content in _contents(place):
            found += _documents(name, content)
            if len(found) > MAX_DOCUMENTS:
                raise LabError("", f"more than {MAX_DOCUMENTS} objects")
    if not found:
        endings = ", ".join(f"*{suffix}" for suffix in SUFFIXES)
        raise LabError("", f"no objects passed: there are none in {', '.join(places)} (of a directory, files named {endings} are read)")
    return found


def parse_text(name: str, content: str) -> list[Tree]:
    """The objects in one YAML or JSON text; `name` is what errors call it."""
    return _documents(name, content)


def _contents(place: str) -> Iterator[tuple[str, str]]:
    if place == "-":
        yield "standard input", sys.stdin.read(MAX_FILE + 1)
        return
    path = Path(place)
    if path.is_dir():
        for entry in sorted(path.iterdir()):
            if entry.suffix in SUFFIXES and entry.is_file():
                yield str(entry), _content(entry)
        return
    yield place, _content(path)


def _content(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_FILE:
            raise LabError("", f"{path} is larger than {MAX_FILE} bytes")
        return path.read_text()
    except OSError as error:
        raise LabError("", f"the path {str(path)!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise LabError("", f"{path} is not UTF-8 text") from error


def _documents(name: str, content: str) -> list[Tree]:
    if len(content) > MAX_FILE:
        raise LabError("", f"{name} is larger than {MAX_FILE} bytes")
    try:
        documents = list(read_yaml(content.encode()))
    except DocumentError as error:
        raise LabError("", f"{name} is not YAML: {error}") from error
    found: list[Tree] = []
    for position, document in enumerate(documents, 1):
        source = name if len(documents) == 1 else f"{name} (document {position})"
        try:
            bodies = unpack(document)
        except ManifestError as error:
            raise LabError("", f"{source}: {error}") from error
        for body in bodies:
            if not isinstance(body, dict):
                raise LabError("", f"{source}: a Kubernetes object is expected, found {type(body).__name__}")
            found.append({"source": source, "body": body})
    return found
