"""Patterns are RE2's, and bounded."""

from __future__ import annotations

import pytest

from ztunnel.mesh.l7.patterns import BadPattern, compile_pattern, literal_start


@pytest.mark.parametrize(
    ("text", "start"),
    [("/api/v[0-9]+", b"/api/v"), ("^/abc$", b"/abc"), ("/a|/b", b"/"), (".*", b""),
     ("(?i)/abc", b"/"), ("/x/.*", b"/x/"), ("", b""), ("a|b", b"")],
)  # fmt: skip
def test_what_every_match_begins_with(text: str, start: bytes) -> None:
    assert literal_start(compile_pattern(text)) == start


@pytest.mark.parametrize("text", ["(", "(?=a)", "\\1", "a{2000}", "((a{50}){50}){20}", "(?:\\pL{100}){10}"])
def test_what_is_refused(text: str) -> None:
    with pytest.raises(BadPattern, match="regular expression"):
        compile_pattern(text)


def test_no_pattern_takes_long() -> None:
    assert compile_pattern("(a*)*(a*)*b").fullmatch(b"a" * 10000) is None
