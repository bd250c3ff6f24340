"""Comparisons of a request's path (without its query), compiled. Source: Envoy's route matchers, Gateway API `PathMatchType`."""

from __future__ import annotations

from ztunnel.mesh.l7.patterns import Pattern, compile_pattern, literal_start
from ztunnel.mesh.l7.routes import PathKind, PathMatch


class PathTest:
    """Whether a path is meant. This one holds for every path.

    `exact` not None: only for this one. `start`: every path it holds for begins so. Both in lower case where `any_case`.
    """

    def __init__(self, start: bytes = b"", *, any_case: bool = False) -> None:
        self.start = start
        self.exact: bytes | None = None
        self.any_case = any_case

    def holds(self, path: bytes) -> bool:
        """Of a path as it came; of one in lower case where `any_case`."""
        return True


class _Exact(PathTest):
    def __init__(self, value: bytes, *, any_case: bool) -> None:
        super().__init__(value, any_case=any_case)
        self.exact = value

    def holds(self, path: bytes) -> bool:
        return path == self.exact


class _Prefix(PathTest):
    def holds(self, path: bytes) -> bool:
        return path.startswith(self.start)


class _Segments(PathTest):
    """`start` has no slash at its end."""

    def holds(self, path: bytes) -> bool:
        length = len(self.start)
        return path.startswith(self.start) and (len(path) == length or path[length] == 0x2F)


class _Regex(PathTest):
    def __init__(self, pattern: Pattern) -> None:
        super().__init__(literal_start(pattern))
        self.pattern = pattern

    def holds(self, path: bytes) -> bool:
        return self.pattern.fullmatch(path) is not None


class _Template(PathTest):
    """`{*}` one element that is not empty, `{**}` the rest, which may be."""

    def __init__(self, value: bytes, *, any_case: bool) -> None:
        super().__init__(value.partition(b"{")[0], any_case=any_case)
        self.elements = value.split(b"/")

    def holds(self, path: bytes) -> bool:
        given = path.split(b"/")
        elements = self.elements
        for at in range(len(elements)):
            element = elements[at]
            if at >= len(given):
                return False
            if element == b"{**}":
                rest = elements[at + 1 :]
                if not rest:
                    return True
                # elements after `{**}` stand at the path's end
                tail = given[at:]
                return len(tail) >= len(rest) and _elements_hold(rest, tail[len(tail) - len(rest) :])
            if element == b"{*}":
                if not given[at]:
                    return False
            elif element != given[at]:
                return False
        return len(given) == len(elements)


def _elements_hold(elements: list[bytes], given: list[bytes]) -> bool:
    return all(text if element == b"{*}" else element == text for element, text in zip(elements, given, strict=True))


def compile_path(match: PathMatch | None) -> PathTest:
    """The comparison, ready.

    Raises:
        BadPattern: its regular expression is none.
    """
    if match is None:
        return PathTest()
    if match.kind is PathKind.REGEX:
        return _Regex(compile_pattern(match.value))
    any_case = match.ignore_case
    value = (match.value.lower() if any_case else match.value).encode()
    if match.kind is PathKind.EXACT:
        return _Exact(value, any_case=any_case)
    if match.kind is PathKind.PREFIX:
        return _Prefix(value, any_case=any_case)
    if match.kind is PathKind.SEGMENTS:
        return _Segments(value.rstrip(b"/"), any_case=any_case)
    return _Template(value, any_case=any_case)
