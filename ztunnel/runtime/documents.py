"""Bytes of a manifest file to plain values: dicts, lists, text, numbers, booleans, None. Pure, bounded, no recursion.

YAML is built here from libyaml's events, because PyYAML's C loader calls itself once per level of nesting and crashes the process
on a megabyte of `[`. In passing it takes a Kubernetes reader's view: times stay text, a key that is given twice is an error instead
of the last one winning, `<<` merges, and no tag can name a type of Python's.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator

import yaml

PAUSE = object()
"""No document: a moment at which the reader may do something else."""
EVENTS_PER_TURN = 1000
"""A few milliseconds."""
MAX_DEPTH = 100
"""Levels of nesting. Kubernetes' deepest kinds have about forty."""
MAX_ODD_KEYS = 256
"""Keys of one mapping that are not text. Numbers can be chosen so that all have one hash, and each look-up then passes all others."""
MAX_NODES = 2_000_000
"""Values in one document, counting what aliases repeat: ten thousand pods in one List are under a million."""

_INTEGER = re.compile(r"[-+]?(0b[01_]+|0x[0-9a-fA-F_]+|0o?[0-7_]+|0|[1-9][0-9_]*)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS: dict[str, object] = {
    "": None,
    "~": None,
    **dict.fromkeys(("null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE", "yes", "Yes", "YES", "on", "On", "ON"), True),
    **dict.fromkeys(("false", "False", "FALSE", "no", "No", "NO", "off", "Off", "OFF"), False),
}
_MAYBE_SPECIAL = frozenset("0123456789+-.~nNtTfFyYoO")
_LONGEST_NUMBER = 64
_TAG = "tag:yaml.org,2002:"


class DocumentError(ValueError):
    """Not a sequence of documents within bounds; the text says where and why."""


def read_yaml(content: bytes) -> Iterator[object]:
    """The documents of a YAML stream, one at a time; None for an empty one.

    Raises:
        DocumentError: while iterating, at the first place that is not YAML or passes a bound. Documents before it have been given.
    """
    for document in read_yaml_in_turns(content):
        if document is not PAUSE:
            yield document


def read_yaml_in_turns(content: bytes) -> Iterator[object]:
    """As `read_yaml`, with PAUSE in between as often as others should get a turn: one document may take many seconds.

    Raises:
        DocumentError: as `read_yaml`.
    """
    builder = _Builder()
    events = yaml.parse(content, Loader=yaml.CSafeLoader)
    try:
        for number, event in enumerate(events, 1):
            if number % EVENTS_PER_TURN == 0:
                yield PAUSE
            if isinstance(event, yaml.DocumentStartEvent):
                builder = _Builder()
            elif isinstance(event, yaml.DocumentEndEvent):
                yield builder.root
            else:
                builder.feed(event)
    except yaml.MarkedYAMLError as error:
        raise DocumentError(f"{_line(error.problem_mark)}{error.problem or 'not YAML'}") from error
    except yaml.YAMLError as error:
        raise DocumentError(" ".join(str(error).split())[:200]) from error


def read_json(content: bytes) -> Iterator[object]:
    """The one document of a JSON file.

    Raises:
        DocumentError: as `read_yaml`.
    """
    try:
        value: object = json.loads(content, object_pairs_hook=_unique_pairs, parse_constant=_no_constant)
    except RecursionError as error:
        raise DocumentError("nested too deep") from error
    except ValueError as error:
        raise DocumentError(str(error)[:200]) from error
    yield value


def _unique_pairs(pairs: list[tuple[str, object]]) -> dict[str, object]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        counted = Counter(name for name, _ in pairs)
        twice = next(name for name, count in counted.items() if count > 1)
        raise DocumentError(f"the key {twice[:100]!r} is given twice")
    return mapping


def _no_constant(name: str) -> object:
    raise DocumentError(f"{name} is not JSON")


class _Frame:
    """A collection that is still open."""

    __slots__ = ("anchor", "collection", "has_key", "key", "merges", "nodes_before", "odd_keys")

    def __init__(self, collection: dict[object, object] | list[object], anchor: str | None, nodes_before: int) -> None:
        self.collection = collection
        self.anchor = anchor
        self.nodes_before = nodes_before
        self.key: object = None
        self.has_key = False
        self.odd_keys = 0
        self.merges: list[object] = []
        """Values of `<<`."""


_MERGE = object()
"""Stands for the key `<<` while its value is read."""


class _Builder:
    """Puts one document together."""

    def __init__(self) -> None:
        self.root: object = None
        self._open: list[_Frame] = []
        self._anchors: dict[str, tuple[object, int]] = {}
        self._nodes = 0

    def feed(self, event: yaml.Event) -> None:
        if isinstance(event, yaml.ScalarEvent):
            self._count(1, event)
            value = _MERGE if event.value == "<<" and event.anchor is None and event.implicit[0] and self._expects_key() else _scalar(event)
            if event.anchor is not None:
                self._anchors[event.anchor] = (value, 1)
            self._place(value, event)
        elif isinstance(event, yaml.MappingStartEvent):
            self._begin({}, event, "map")
        elif isinstance(event, yaml.SequenceStartEvent):
            self._begin([], event, "seq")
        elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            self._end(event)
        elif isinstance(event, yaml.AliasEvent):
            self._alias(event)

    def _begin(self, collection: dict[object, object] | list[object], event: yaml.CollectionStartEvent, kind: str) -> None:
        if event.tag is not None and event.tag not in ("!", _TAG + kind):
            raise DocumentError(f"{_line(event.start_mark)}the tag {event.tag[:100]!r} has no meaning in a manifest")
        if len(self._open) == MAX_DEPTH:
            raise DocumentError(f"{_line(event.start_mark)}nested more than {MAX_DEPTH} deep")
        if self._expects_key():
            raise DocumentError(f"{_line(event.start_mark)}a collection cannot be a key")
        if event.anchor is not None:
            # An alias to it from inside it finds nothing, so that no value contains itself.
            self._anchors.pop(event.anchor, None)
        self._open.append(_Frame(collection, event.anchor, self._nodes))
        self._count(1, event)

    def _end(self, event: yaml.Event) -> None:
        frame = self._open.pop()
        for merged in frame.merges:
            _merge(frame.collection, merged, event)
        if frame.anchor is not None:
            self._anchors[frame.anchor] = (frame.collection, self._nodes - frame.nodes_before)
        self._place(frame.collection, event)

    def _alias(self, event: yaml.AliasEvent) -> None:
        if event.anchor not in self._anchors:
            raise DocumentError(f"{_line(event.start_mark)}the alias {str(event.anchor)[:100]!r} names nothing that is complete")
        value, nodes = self._anchors[event.anchor]
        self._count(nodes, event)
        self._place(value, event)

    def _count(self, nodes: int, event: yaml.Event) -> None:
        self._nodes += nodes
        if self._nodes > MAX_NODES:
            raise DocumentError(f"{_line(event.start_mark)}more than {MAX_NODES} values in one document")

    def _expects_key(self) -> bool:
        return bool(self._open) and isinstance(self._open[-1].collection, dict) and not self._open[-1].has_key

    def _place(self, value: object, event: yaml.Event) -> None:
        if not self._open:
            self.root = value
            return
        frame = self._open[-1]
        if isinstance(frame.collection, list):
            frame.collection.append(value)
        elif not frame.has_key:
            if isinstance(value, (dict, list)):
                raise DocumentError(f"{_line(event.start_mark)}a collection cannot be a key")
            if not isinstance(value, str):
                frame.odd_keys += 1
                if frame.odd_keys > MAX_ODD_KEYS:
                    raise DocumentError(f"{_line(event.start_mark)}more than {MAX_ODD_KEYS} keys of one mapping are not text")
            if value in frame.collection:
                raise DocumentError(f"{_line(event.start_mark)}the key {str(value)[:100]!r} is given twice")
            frame.key, frame.has_key = value, True
        else:
            frame.has_key = False
            if frame.key is _MERGE:
                frame.merges.append(value)
            else:
                frame.collection[frame.key] = value


def _merge(target: dict[object, object] | list[object], merged: object, event: yaml.Event) -> None:
    sources = merged if isinstance(merged, list) else [merged]
    for source in sources:
        if not isinstance(source, dict) or not isinstance(target, dict):
            raise DocumentError(f"{_line(event.start_mark)}<< needs a mapping")
        for key, value in source.items():
            target.setdefault(key, value)


def _scalar(event: yaml.ScalarEvent) -> object:
    text: str = event.value
    if event.tag is None or event.tag == "!":
        return _plain(text) if event.implicit[0] and event.tag is None else text
    name = event.tag.removeprefix(_TAG)
    if name == "str":
        return text
    wanted: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "null": (type(None),)}
    value = _plain(text)
    if name not in wanted or not isinstance(value, wanted[name]):
        raise DocumentError(f"{_line(event.start_mark)}{event.tag[:100]!r} does not fit {text[:100]!r}")
    return value


def _plain(text: str) -> object:
    """What an unquoted scalar means (YAML 1.1 as Kubernetes reads it, without times and base 60)."""
    if text and text[0] not in _MAYBE_SPECIAL:
        return text
    if text in _WORDS:
        return _WORDS[text]
    if len(text) > _LONGEST_NUMBER:
        return text
    if _INTEGER.fullmatch(text):
        return _integer(text)
    if _FLOAT.fullmatch(text):
        return float(text.replace("_", ""))
    return text


def _integer(text: str) -> object:
    digits = text.replace("_", "").lstrip("+-")
    base = {"b": 2, "x": 16}.get(digits[1:2], 8) if digits.startswith("0") else 10
    try:
        value = int(digits[2:] if digits[1:2] in ("b", "x", "o") else digits, base)
    except ValueError:
        return text
    return -value if text.startswith("-") else value


def _line(mark: yaml.error.Mark | yaml._yaml.Mark | None) -> str:
    return "" if mark is None else f"line {mark.line + 1}: "
