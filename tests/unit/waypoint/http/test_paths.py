"""Normalised paths: each option, and what is refused."""

from __future__ import annotations

import pytest

from waypoint.http.paths import Template, normalize
from ztunnel.mesh.l7.config import PathNormalization as How


@pytest.mark.parametrize(
    ("path", "base", "merged", "decoded"),
    [
        (b"/", b"/", b"/", b"/"),
        (b"/a/b?x=1", b"/a/b?x=1", b"/a/b?x=1", b"/a/b?x=1"),
        (b"/%61%2Db", b"/a-b", b"/a-b", b"/a-b"),
        (b"/a%2561", b"/a%2561", b"/a%2561", b"/a%2561"),
        (b"/a/./b/../c", b"/a/c", b"/a/c", b"/a/c"),
        (b"/a/%2e%2E/b", b"/b", b"/b", b"/b"),
        (b"/../../a", b"/a", b"/a", b"/a"),
        (b"/a/..", b"/", b"/", b"/"),
        (b"/a/.", b"/a/", b"/a/", b"/a/"),
        (b"/a/.hidden", b"/a/.hidden", b"/a/.hidden", b"/a/.hidden"),
        (b"\\a\\b", b"/a/b", b"/a/b", b"/a/b"),
        (b"//a///b", b"//a///b", b"/a/b", b"/a/b"),
        (b"/a//../b", b"/a/b", b"/a/b", b"/a/b"),
        (b"/a%2Fb%5cc", b"/a%2Fb%5cc", b"/a%2Fb%5cc", b"/a/b/c"),
        (b"/a%2F..%2Fb", b"/a%2F..%2Fb", b"/a%2F..%2Fb", b"/b"),
        (b"/a%2F%2fb", b"/a%2F%2fb", b"/a%2F%2fb", b"/a/b"),
        (b"/a|b^c", b"/a%7Cb%5Ec", b"/a%7Cb%5Ec", b"/a%7Cb%5Ec"),
        (b"/caf\xc3\xa9", None, None, None),
        (b'/a"b', b"/a%22b", b"/a%22b", b"/a%22b"),
        (b"/a%zz%4", b"/a%zz%4", b"/a%zz%4", b"/a%zz%4"),
        (b"/a?x=/../%2e//", b"/a?x=/../%2e//", b"/a?x=/../%2e//", b"/a?x=/../%2e//"),
        (b"*", b"*", b"*", b"*"),
        (b"/a%00b", None, None, None),
        (b"/a\x00", None, None, None),
        (b"/a#b", None, None, None),
        (b"/a?b#c", None, None, None),
        (b"a/b", None, None, None),
        (b"http://x/", None, None, None),
        (b"", None, None, None),
    ],
)
def test_each_option(path: bytes, base: bytes | None, merged: bytes | None, decoded: bytes | None) -> None:
    assert normalize(path, How.NONE) == path
    assert normalize(path, How.BASE) == base
    assert normalize(path, How.MERGE_SLASHES) == merged
    assert normalize(path, How.DECODE_AND_MERGE_SLASHES) == decoded


@pytest.mark.parametrize(
    ("template", "matching", "others"),
    [
        ("/foo/{*}", [b"/foo/bar"], [b"/foo", b"/foo/", b"/foo/bar/baz", b"/fox/bar"]),
        ("/foo/{**}", [b"/foo/", b"/foo/bar", b"/foo/bar/baz"], [b"/foo", b"/fo/bar"]),
        ("/foo/{**}/", [b"/foo/bar/", b"/foo//"], [b"/foo/bar", b"/foo/"]),
        ("/foo/{*}/bar/{**}", [b"/foo/x/bar/", b"/foo/x/bar/y/z"], [b"/foo//bar/y", b"/foo/x/y/bar/"]),
        ("/{*}/a", [b"/x/a"], [b"/a", b"//a", b"/x/a/"]),
        ("/{**}", [b"/", b"/a/b"], [b""]),
    ],
)
def test_templates(template: str, matching: list[bytes], others: list[bytes]) -> None:
    compiled = Template(template)
    assert [path for path in matching if not compiled.matches(path)] == []
    assert [path for path in others if compiled.matches(path)] == []
