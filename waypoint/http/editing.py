"""What a route changes of messages: header edits and rewrites of requests, compiled.

Order of one set of edits: remove, overwrite, append (Envoy's `HeaderParser`). Rewrites keep the query and leave the path as it was in
`x-envoy-original-path`. Source: Envoy `RouteEntryImplBase::finalizeRequestHeaders`, Gateway API `HTTPURLRewriteFilter`.
"""

from __future__ import annotations

from waypoint.http.messages import Headers, Request
from waypoint.http.variables import Template, Variables, compile_value
from ztunnel.mesh.l7.patterns import Pattern, compile_pattern
from ztunnel.mesh.l7.routes import HeaderEdits, PathKind, PathMatch, Rewrite

_ORIGINAL_PATH = b"x-envoy-original-path"


class CompiledEdits:
    """Header edits, ready. `dynamic`: `apply` needs the exchange's variables."""

    __slots__ = ("_added", "_gone", "_set", "dynamic", "empty")

    def __init__(self, edits: HeaderEdits) -> None:
        self._set = [(name.encode(), compile_value(value)) for name, value in edits.set if _editable(name)]
        self._added = [(name.encode(), compile_value(value)) for name, value in edits.add if _editable(name)]
        removed = {name.encode() for name in edits.remove if _editable(name)}
        self._gone = frozenset(removed | {name for name, _ in self._set})
        """Of the message as it comes: what is removed, and what is overwritten."""
        self.empty = not (self._gone or self._added)
        self.dynamic = any(isinstance(value, Template) for _, value in self._set + self._added)

    def apply(self, headers: Headers, variables: Variables | None = None) -> None:
        """Edits in place.

        Args:
            variables: of this exchange; None only where `dynamic` is False.
        """
        if self.empty:
            return
        # variables speak of the message as it came, so values are said before anything is gone
        made = self._made(self._set, variables)
        made += self._made(self._added, variables)
        if self._gone:
            headers[:] = [line for line in headers if line[0] not in self._gone]
        headers += made

    def _made(self, lines: list[tuple[bytes, bytes | Template]], variables: Variables | None) -> Headers:
        made: Headers = []
        for name, value in lines:
            if isinstance(value, bytes):
                made.append((name, value))
            elif variables is not None:
                said = value.text(variables)
                if said:
                    made.append((name, said))
        return made


def _editable(name: str) -> bool:
    """Pseudo-headers and Host are no headers here: `derive` makes rewrites of them."""
    return not name.startswith(":") and name != "host"


class CompiledRewrite:
    """A rewrite of requests that one match of a route matched."""

    __slots__ = ("_authority", "_path", "_pattern", "_prefix", "_segments", "_skip", "_substitution", "_whole")

    def __init__(self, rewrite: Rewrite, match: PathMatch | None) -> None:
        """
        Raises:
            BadPattern: its regular expression is none.
        """
        self._authority = None if rewrite.authority is None else rewrite.authority.encode()
        self._path = None if rewrite.path is None else rewrite.path.encode()
        self._prefix = None if rewrite.prefix is None else rewrite.prefix.encode()
        self._pattern: Pattern | None = None
        self._substitution: list[bytes | int] = []
        if rewrite.regex is not None:
            self._pattern = compile_pattern(rewrite.regex[0])
            self._substitution = compile_substitution(rewrite.regex[1], self._pattern.groups)
        self._skip, self._whole, self._segments = matched_length(match)

    def apply(self, request: Request) -> bool:
        """Edits the request: authority, path and `x-envoy-original-path`.

        False: the client's bytes would become a dot segment (`/api../x` behind a prefix `/api` that becomes `/v1/`) and lead out of
        where the route goes: the request is to be refused.
        """
        if self._authority is not None:
            request.authority = self._authority
        path, mark, query = request.path.partition(b"?")
        if self._path is not None:
            new = self._path
        elif self._prefix is not None:
            new = replace_prefix(path, self._prefix, self._skip, whole=self._whole, segments=self._segments)
        elif self._pattern is not None:
            new = substitute(self._pattern, self._substitution, path)
        else:
            return True
        if self._path is None and b"/." in new and _climbs(new) and not _climbs(path):
            return False
        request.headers = [line for line in request.headers if line[0] != _ORIGINAL_PATH]
        request.headers.append((_ORIGINAL_PATH, request.path))
        # a path that had a query in its configuration keeps that one
        request.path = new + mark + query if b"?" not in new else new
        return True


def _climbs(path: bytes) -> bool:
    return b".." in path.partition(b"?")[0].split(b"/")


def matched_length(match: PathMatch | None) -> tuple[int, bool, bool]:
    """What a path match matches: (length of it, is that the whole path, are whole elements meant). None is VirtualService's prefix `/`."""
    if match is None:
        return 1, False, False
    if match.kind is PathKind.PREFIX:
        return len(match.value.encode()), False, False
    if match.kind is PathKind.SEGMENTS:
        return len(match.value.rstrip("/").encode()), False, True
    return 0, True, False


def replace_prefix(path: bytes, prefix: bytes, length: int, *, whole: bool, segments: bool) -> bytes:
    """The path with its first `length` bytes replaced.

    With `segments` elements are counted, not bytes: no `//` comes about, and never an empty path (Gateway API, ReplacePrefixMatch).
    """
    if whole:
        return prefix or b"/"
    rest = path[length:]
    if segments:
        return prefix.rstrip(b"/") + rest or b"/"
    return prefix + rest or b"/"


def compile_substitution(text: str, groups: int) -> list[bytes | int]:
    """RE2's substitution: `\\0` to `\\9` are groups, `\\\\` is a backslash. A group that the pattern lacks is empty."""
    parts: list[bytes | int] = []
    literal = bytearray()
    source = text.encode()
    at = 0
    while at < len(source):
        byte = source[at]
        following = source[at + 1] if at + 1 < len(source) else -1
        if byte == 0x5C and 0x30 <= following <= 0x39:
            if literal:
                parts.append(bytes(literal))
                literal.clear()
            if following - 0x30 <= groups:
                parts.append(following - 0x30)
            at += 2
        elif byte == 0x5C and following == 0x5C:
            literal.append(byte)
            at += 2
        else:
            literal.append(byte)
            at += 1
    if literal:
        parts.append(bytes(literal))
    return parts


def substitute(pattern: Pattern, substitution: list[bytes | int], text: bytes) -> bytes:
    """Every match replaced, as RE2's GlobalReplace does."""
    made: list[bytes] = []
    at = 0
    while at <= len(text):
        found = pattern.search(text, at)
        if found is None:
            break
        start, end = found.span()
        made.append(text[at:start])
        for part in substitution:
            if isinstance(part, bytes):
                made.append(part)
            else:
                first, last = found.span(part)
                if first >= 0:
                    made.append(text[first:last])
        if end == start:
            made.append(text[end : end + 1])
            end += 1
        at = end
    made.append(text[at:])
    return b"".join(made)
