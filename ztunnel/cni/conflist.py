"""Network configuration lists with our plugin in them, and without. PURE: file contents in, file contents out.

The container runtime takes the first file by name that lists a plugin (containerd's go-cni, CRI-O's ocicni); ours goes to the end of that
list, and is in no other. A `.conf` is one plugin; it gives way to a list of that and ours, whose name comes where its own came.

Source: CNI specification 1.1.0, section 1; Istio cni/pkg/install/cniconfig.go (which file, chaining).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from ztunnel.mesh.errors import LocalError

TYPE = "ztunnel-cni"
"""The plugin's name, which is its program's."""
VERSIONS = ("0.3.1", "0.4.0", "1.0.0", "1.1.0")
SUFFIXES = (".conf", ".conflist", ".json")
"""Of the files that runtimes read."""
LIST = ".conflist"
Json = dict[str, object]


class BadConfiguration(LocalError):
    """A file that the runtime will read, and that we cannot; the text names it."""


@dataclass(frozen=True, slots=True)
class Edit:
    """What has to be done to the directory: all of `write`, then all of `remove`."""

    write: dict[str, bytes] = field(default_factory=dict)
    remove: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.write or self.remove)


def installed(files: Mapping[str, bytes], entry: Json) -> Edit:
    """What makes `entry` the last plugin of the list that the runtime takes, and of no other.

    Args:
        files: every file of the directory whose name ends in one of `SUFFIXES`.
        entry: our plugin's configuration; its `type` is TYPE.
    Raises: BadConfiguration for a file at which the runtime stops as well; nothing should be done then.
    """
    first = _first(files)
    edit = _without(files, keep=first)
    if first is None:
        return edit
    document = _parse(first, files[first])
    listed = _plugins(first, document)
    target = first if listed is not None else list_of(first)
    if listed is None:
        listed, document = [document], {"cniVersion": document.get("cniVersion"), "name": document.get("name")}
    if document.get("cniVersion") not in VERSIONS:
        raise BadConfiguration(f"{first}: cniVersion {document.get('cniVersion')!r}: one of {', '.join(VERSIONS)} is needed")
    plugins = [each for each in listed if each.get("type") != TYPE] + [entry]
    if target == first and plugins == listed:
        return edit
    content = _bytes({**document, "plugins": plugins})
    return Edit({**edit.write, target: content}, edit.remove if target == first else (*edit.remove, first))


def list_of(name: str) -> str:
    """The file that takes the place of one with a single plugin."""
    return f"{name}{LIST}"


def removed(files: Mapping[str, bytes]) -> Edit:
    """What takes our plugin out of every list. A list that we made of one plugin stays a list."""
    return _without(files, keep=None)


def _without(files: Mapping[str, bytes], keep: str | None) -> Edit:
    write = {}
    for name, content in files.items():
        if name == keep or TYPE.encode() not in content:
            continue
        try:
            document = _parse(name, content)
        except BadConfiguration:
            continue  # nobody's
        listed = _plugins(name, document) or []
        others = [each for each in listed if each.get("type") != TYPE]
        if others != listed:
            write[name] = _bytes({**document, "plugins": others})
    return Edit(write)


def _first(files: Mapping[str, bytes]) -> str | None:
    for name in sorted(files):
        document = _parse(name, files[name])
        listed = _plugins(name, document)
        if listed is None and not isinstance(document.get("type"), str):
            raise BadConfiguration(f"{name}: type: a plugin's name is expected")
        if listed is None or any(each.get("type") != TYPE for each in listed):
            return name
    return None


def _parse(name: str, content: bytes) -> Json:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        raise BadConfiguration(f"{name}: is not JSON") from None
    if not isinstance(found, dict):
        raise BadConfiguration(f"{name}: is not a JSON object")
    if name.endswith(LIST) and _plugins(name, found) is None:
        raise BadConfiguration(f"{name}: plugins: a list of objects is expected")
    return found


def _plugins(name: str, document: Json) -> list[Json] | None:
    listed = document.get("plugins")
    if not name.endswith(LIST) or not isinstance(listed, list) or not all(isinstance(each, dict) for each in listed):
        return None
    return listed


def _bytes(document: Json) -> bytes:
    return json.dumps(document, indent=2).encode() + b"\n"
