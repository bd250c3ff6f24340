"""What the settings of any program have in common, with settings made for the purpose."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from tests.kit.settings import undocumented
from ztunnel.configuration import Reader, between, matching
from ztunnel.mesh.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    size: int = field(default=1, metadata=between(0, 10))
    """Documented."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Some:
    names: tuple[str, ...] = field(default=(), metadata=matching(r"[a-z]+", "a word"))
    inner: Inner = Inner()


def contradictions(settings: Some) -> Iterator[str]:
    if len(settings.names) > settings.inner.size:
        yield "names: too many for inner.size"


READER = Reader(Some, "SOME_", contradictions)


def test_lists_of_texts_from_a_file_and_from_the_environment() -> None:
    assert READER.parse({"names": ["a"]}, {}).names == ("a",)
    assert READER.parse({"names": ["x"]}, {"SOME_NAMES": "a, b", "SOME_INNER_SIZE": "2"}).names == ("a", "b")
    assert READER.parse({}, {"SOME_NAMES": ""}).names == ()


@pytest.mark.parametrize(
    ("config", "environ", "problem"),
    [
        ({"names": "a"}, {}, "names: a list of at most 1000 texts is expected, found 'a'"),
        ({"names": ["a", "B", 1]}, {}, "names: a word is expected, found 'B'; names: text is expected, found 1"),
        ({"names": ["a", "b"]}, {}, "names: too many for inner.size"),
        ({}, {"SOME_INER_SIZE": "1"}, "SOME_INER_SIZE: no such variable; did you mean SOME_INNER_SIZE?"),
        ({"inner": {"sise": 1}}, {"OTHER_X": "1"}, "inner.sise: no such setting; did you mean inner.size?"),
    ],
)
def test_what_cannot_be_is_refused(config: dict[str, object], environ: dict[str, str], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        READER.parse(config, environ)
    assert str(caught.value) == problem


def test_a_setting_without_docstring_is_found() -> None:
    assert undocumented(Some) == ["Some.names"]
