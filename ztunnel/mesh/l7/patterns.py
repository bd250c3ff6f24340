"""Regular expressions of routes and policies: RE2, as Envoy has them, so no pattern takes more than linear time.

The only place that knows the library. Whoever reads manifests refuses here what the proxy could not compile.
"""

from __future__ import annotations

from typing import Protocol

import re2

MAX_PROGRAM = 32768
"""Instructions of a compiled pattern; Istio's `re2.max_program_size.error_level`."""
MAX_MEMORY = 4 * 1024 * 1024


class BadPattern(ValueError):
    """Not a pattern of RE2, or one that is too large. The message says which, without the pattern's whole text."""


class Found(Protocol):
    """One match."""

    def span(self, group: int = 0) -> tuple[int, int]: ...


class Pattern(Protocol):
    """A compiled pattern over bytes (UTF-8)."""

    @property
    def groups(self) -> int: ...
    def possiblematchrange(self, maxlen: int) -> tuple[bytes, bytes]: ...
    def fullmatch(self, text: bytes) -> Found | None: ...
    def search(self, text: bytes, pos: int = 0) -> Found | None: ...


def compile_pattern(text: str) -> Pattern:
    """The pattern, compiled.

    Raises:
        BadPattern: see there.
    """
    options = re2.Options()
    options.log_errors = False
    options.max_mem = MAX_MEMORY
    try:
        pattern = re2.compile(text.encode(), options)
    except re2.error as error:
        said = error.args[0] if error.args else b""
        raise BadPattern(f"not a regular expression of RE2: {said.decode(errors='replace') if isinstance(said, bytes) else said}") from None
    if pattern.programsize > MAX_PROGRAM:
        raise BadPattern(f"a regular expression of {pattern.programsize} instructions; at most {MAX_PROGRAM}")
    compiled: Pattern = pattern
    return compiled


def literal_start(pattern: Pattern) -> bytes:
    """Bytes that every text begins with which the pattern matches as a whole; empty when nothing is known."""
    try:
        least, most = pattern.possiblematchrange(64)
    except re2.error:
        return b""
    length = 0
    for one, other in zip(least, most, strict=False):
        if one != other:
            break
        length += 1
    return least[:length]
