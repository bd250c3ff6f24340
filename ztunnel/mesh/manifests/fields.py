"""Reading one value of a document, knowing where it stands: every refusal names the object, the path of the field and the reason.

A document is whatever a YAML or JSON loader made of hostile text: any type anywhere, keys that are no text, values that contain
themselves. Only what is asked for is looked at, nothing is walked recursively, and what is shown of a bad value is bounded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import Final

from ztunnel.mesh.addresses import canonical
from ztunnel.mesh.errors import ManifestError

MAX_ITEMS: Final = 4096
"""Entries of one list or mapping; what people write has tens."""
MAX_VALUES: Final = 100_000
"""Entries of all lists and mappings of one document together. A YAML document may name one list many times, so that a small file
is a huge document."""
_SHOWN_CHARACTERS: Final = 80
_PLAIN_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_HALF_PAIR: Final = re.compile(r"[\ud800-\udfff]")
_SUBDOMAIN: Final = re.compile(r"[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?")
_LABEL: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_LABEL_VALUE: Final = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?")


def show(value: object) -> str:
    """A value as an error may show it: short, on one line, never a whole structure."""
    if isinstance(value, str):
        cut = value[:_SHOWN_CHARACTERS]
        return json.dumps(cut) + ("…" if len(cut) < len(value) else "")
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        # Text of an integer beyond 4300 digits is refused by Python itself.
        return str(value) if value.bit_length() <= 64 else "a very large number"
    if isinstance(value, float):
        return repr(value)
    return "null" if value is None else f"a {type(value).__name__}"


def _is_unicode(text: str) -> bool:
    """False with half of a surrogate pair, which JSON's escapes can say and nothing downstream can carry."""
    return text.isascii() or _HALF_PAIR.search(text) is None


class _Budget:
    __slots__ = ("left",)

    def __init__(self) -> None:
        self.left = MAX_VALUES


class Field:
    """One place in a document, present or not.

    Every method that reads it as something raises ManifestError, which names the place, where it is something else.
    """

    __slots__ = ("budget", "_parent", "_step", "subject", "value")

    def __init__(self, subject: str, step: object, value: object, parent: Field | None = None) -> None:
        """`step`: the key or index by which the parent has it; without a parent, the path to it."""
        self.subject = subject
        self.value = value
        self._step = step
        self._parent = parent
        self.budget: _Budget = _Budget() if parent is None else parent.budget
        """Shared by all fields of a document."""

    @property
    def path(self) -> str:
        """Where it stands. Put together when somebody asks: thousands of places are as they should be for one that is refused."""
        step = self._step
        if self._parent is None:
            return str(step)
        before = self._parent.path
        if isinstance(step, str) and _PLAIN_NAME.fullmatch(step):
            return f"{before}.{step}" if before else step
        return f"{before}[{show(step)}]"

    @property
    def absent(self) -> bool:
        """Missing and `null` are the same, as for the Kubernetes API."""
        return self.value is None

    def error(self, reason: str) -> ManifestError:
        """The refusal of this place."""
        return ManifestError(self.subject, self.path or "document", reason)

    def wrong(self, wanted: str) -> ManifestError:
        """The refusal of a value that is not what it should be."""
        return self.error(f"{wanted}: {show(self.value)}")

    def get(self, name: str) -> Field:
        """A member of a mapping; of an absent mapping, an absent member."""
        return Field(self.subject, name, None if self.value is None else self._mapping().get(name), self)

    def instead(self, value: object) -> Field:
        """Another value at the same place."""
        place = Field(self.subject, self._step, value, self._parent)
        place.budget = self.budget
        return place

    def entries(self) -> Iterator[tuple[object, Field]]:
        """The keys of a mapping, whatever type they have, and its members that are not null."""
        mapping = self._mapping()
        self._spend(len(mapping))
        for key, value in mapping.items():
            if value is not None:
                yield key, Field(self.subject, key, value, self)

    def only(self, names: Iterable[str]) -> None:
        """Refuses members that nobody knows, and members without a value: neither a misspelt nor an emptied restriction may vanish."""
        known = list(names)
        for key, value in self._mapping().items():
            member = Field(self.subject, key, value, self)
            if key not in known:
                close = get_close_matches(key[:64], known, 1) if isinstance(key, str) else []
                raise member.error(f'unknown field (did you mean "{close[0]}"?)' if close else "unknown field")
            if value is None:
                raise member.error("no value: give one, or leave the field out")

    def items(self, most: int = MAX_ITEMS) -> list[Field]:
        """The items of a list, not more than `most`; an absent list has none."""
        value = self.value
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.wrong("not a list")
        if len(value) > most:
            raise self.error(f"more than {most} items")
        self._spend(len(value))
        return [Field(self.subject, index, item, self) for index, item in enumerate(value)]

    def text(self, default: str | None = None) -> str:
        """Text that is not empty.

        Args:
            default: for an absent value; without it, absence is an error.
        """
        value = self.value
        if value is None:
            if default is None:
                raise self.error("required")
            return default
        if not isinstance(value, str):
            raise self.wrong("not text (quote it)" if isinstance(value, (bool, int, float)) else "not text")
        if not value:
            raise self.error("empty")
        if not _is_unicode(value):
            raise self.wrong("not text that can be encoded")
        return value

    def boolean(self) -> bool:
        """True or false; false when absent."""
        if self.value is None:
            return False
        if not isinstance(self.value, bool):
            raise self.wrong("not a boolean")
        return self.value

    def port(self) -> int:
        """A port number."""
        if not isinstance(self.value, int) or isinstance(self.value, bool) or not 1 <= self.value <= 65535:
            raise self.wrong("not a port number (1-65535)")
        return self.value

    def port_text(self) -> int:
        """A port number, also as text: where Istio's types have text and people write numbers."""
        value = self.value
        if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 5:
            return self.instead(int(value)).port()
        return self.port()

    def address(self) -> str:
        """An IP address, canonical."""
        address = canonical(self.text())
        if address is None:
            raise self.wrong("not an IP address")
        return address

    def name(self, default: str | None = None) -> str:
        """A name of an object (RFC 1123 subdomain)."""
        return self._matching(_SUBDOMAIN, "not a name (lower-case letters, digits, - and .)", default)

    def namespace(self, default: str | None = None) -> str:
        """A name of a namespace (RFC 1123 label)."""
        return self._matching(_LABEL, "not a namespace (lower-case letters, digits and -)", default)

    def labels(self) -> dict[str, str]:
        """A mapping of text to label values."""
        return {key: member.label_value() for key, member in self.texts()}

    def texts(self) -> Iterator[tuple[str, Field]]:
        """The entries of a mapping whose keys must be text."""
        for key, member in self.entries():
            if not isinstance(key, str) or not _is_unicode(key):
                raise member.error(f"the key is not text: {show(key)}")
            yield key, member

    def label_value(self) -> str:
        """A label's value. They end up in headers and log lines, so their alphabet is enforced."""
        if self.value == "":
            return ""
        return self._matching(_LABEL_VALUE, "not a label value (at most 63 letters, digits, -, _ and .)", None)

    def _spend(self, values: int) -> None:
        self.budget.left -= values
        if self.budget.left < 0:
            raise self.error(f"the document has more than {MAX_VALUES} values")

    def _matching(self, pattern: re.Pattern[str], wanted: str, default: str | None) -> str:
        if self.value is None and default is not None:
            return default
        text = self.text()
        if not pattern.fullmatch(text):
            raise self.wrong(wanted)
        return text

    def _mapping(self) -> dict[object, object]:
        value = self.value
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.wrong("not a mapping")
        if len(value) > MAX_ITEMS:
            raise self.error(f"more than {MAX_ITEMS} entries")
        return value
