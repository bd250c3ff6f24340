"""Values that several kinds have: numbers in a range, words of a set, durations, patterns, header names and edits.

Every function raises ManifestError, which names the place, for what is not what it reads.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ztunnel.mesh.l7.patterns import BadPattern, compile_pattern
from ztunnel.mesh.l7.routes import HeaderEdits
from ztunnel.mesh.manifests.fields import Field

LONGEST_PATTERN = 1024
"""Characters of a regular expression, as Gateway API limits values."""
LONGEST_DURATION = 366 * 24 * 3600.0
_DURATION = re.compile(r"(?:[0-9]{1,12}(?:\.[0-9]{1,9})?(?:h|ms|m|us|ns|s)){1,6}")
_PART = re.compile(r"([0-9.]+)(h|ms|m|us|ns|s)")
_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
_HEADER = re.compile(r":?[A-Za-z0-9!#$%&'*+.^_`|~-]{1,256}")
_HOSTNAME = re.compile(r"(?:\*\.)?[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?)*")
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")


def integer(place: Field, least: int, most: int, default: int | None = None) -> int:
    """A whole number in a range."""
    value = place.value
    if value is None and default is not None:
        return default
    if value is None:
        raise place.error("required")
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise place.wrong(f"not a whole number from {least} to {most}")
    return value


def number(place: Field, least: float, most: float, default: float | None = None) -> float:
    """A number in a range."""
    value = place.value
    if value is None and default is not None:
        return default
    if value is None:
        raise place.error("required")
    if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
        raise place.wrong(f"not a number from {least:g} to {most:g}")
    return float(value)


def choice(place: Field, words: Iterable[str], default: str | None = None) -> str:
    """One of some words."""
    text = place.text(default)
    known = tuple(words)
    if text not in known:
        raise place.wrong(f"not one of {', '.join(known)}")
    return text


def boolean(place: Field, default: bool) -> bool:
    """True or false, for what is true unless told."""
    return default if place.absent else place.boolean()


def duration(place: Field, default: float | None = None) -> float:
    """Seconds, of `1h30m`, `1.5s`, `20ms`."""
    if place.absent and default is not None:
        return default
    text = place.text()
    if len(text) > 100 or not _DURATION.fullmatch(text):
        raise place.wrong("not a duration (like 1h30m, 1.5s, 20ms)")
    seconds = sum(float(amount) * _UNITS[unit] for amount, unit in _PART.findall(text))
    if seconds > LONGEST_DURATION:
        raise place.wrong("a duration of more than a year")
    return seconds


def positive_duration(place: Field, default: float | None = None) -> float:
    """As `duration`, but not nothing."""
    seconds = duration(place, default)
    if seconds <= 0:
        raise place.wrong("not more than nothing")
    return seconds


def hostname(place: Field) -> str:
    """A DNS name, `*.` allowed in front; lower-case."""
    text = place.text().lower()
    if len(text) > 253 or not _HOSTNAME.fullmatch(text):
        raise place.wrong("not a host name")
    return text


def header_name(place: Field) -> str:
    """A header's name, lower-case; `:authority` and its like too."""
    text = place.text()
    if not _HEADER.fullmatch(text):
        raise place.wrong("not a header name")
    return text.lower()


def header_value(place: Field) -> str:
    """A header's value; it may be empty."""
    text = "" if place.value == "" else place.text()
    if _UNPRINTABLE.search(text):
        raise place.wrong("not a header value")
    return text


def pattern(place: Field) -> str:
    """A regular expression (RE2)."""
    text = place.text()
    if len(text) > LONGEST_PATTERN:
        raise place.error(f"a pattern of more than {LONGEST_PATTERN} characters")
    try:
        compile_pattern(text)
    except BadPattern as error:
        raise place.wrong(str(error)) from None
    return text


def path(place: Field) -> str:
    """A path that a request may have."""
    text = place.text()
    if not text.startswith("/") or _UNPRINTABLE.search(text):
        raise place.wrong("not a path (it starts with /)")
    return text


def header_edits(place: Field) -> HeaderEdits:
    """Gateway API's header modifier: lists of names and values; of a name that comes twice, the first counts."""
    place.only(("set", "add", "remove"))
    removed = (header_name(item) for item in place.get("remove").items())
    return HeaderEdits(_named(place.get("set")), _named(place.get("add")), tuple(dict.fromkeys(removed)))


def _named(place: Field) -> tuple[tuple[str, str], ...]:
    found: dict[str, str] = {}
    for item in place.items():
        item.only(("name", "value"))
        found.setdefault(header_name(item.get("name")), header_value(item.get("value")))
    return tuple(found.items())
