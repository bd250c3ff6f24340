"""Comparisons of texts, compiled: `TextMatch` values made ready to look at bytes."""

from __future__ import annotations

from ztunnel.mesh.l7.patterns import Pattern, compile_pattern
from ztunnel.mesh.l7.routes import TextKind, TextMatch


class TextTest:
    """Whether a text is meant. This one holds for every text that is there."""

    def holds(self, text: bytes) -> bool:
        """Of a header's, a parameter's or a method's value."""
        return True


class _Exact(TextTest):
    def __init__(self, value: bytes) -> None:
        self.value = value

    def holds(self, text: bytes) -> bool:
        return text == self.value


class _Prefix(TextTest):
    def __init__(self, value: bytes) -> None:
        self.value = value

    def holds(self, text: bytes) -> bool:
        return text.startswith(self.value)


class _Suffix(TextTest):
    def __init__(self, value: bytes) -> None:
        self.value = value

    def holds(self, text: bytes) -> bool:
        return text.endswith(self.value)


class _Regex(TextTest):
    def __init__(self, pattern: Pattern) -> None:
        self.pattern = pattern

    def holds(self, text: bytes) -> bool:
        return self.pattern.fullmatch(text) is not None


class _AnyCase(TextTest):
    """`inner` compares lower-case texts."""

    def __init__(self, inner: TextTest) -> None:
        self.inner = inner

    def holds(self, text: bytes) -> bool:
        return self.inner.holds(text.lower())


def compile_text(match: TextMatch) -> TextTest:
    """The comparison, ready. PRESENT holds for every text: asking only where there is one is the caller's part.

    Raises:
        BadPattern: its regular expression is none.
    """
    if match.kind is TextKind.PRESENT:
        return TextTest()
    if match.kind is TextKind.REGEX:
        return _Regex(compile_pattern(match.value))
    value = match.value.encode()
    if match.ignore_case:
        value = value.lower()
    test: TextTest
    if match.kind is TextKind.EXACT:
        test = _Exact(value)
    elif match.kind is TextKind.PREFIX:
        test = _Prefix(value)
    else:
        test = _Suffix(value)
    return _AnyCase(test) if match.ignore_case else test
