"""YAML and JSON as Kubernetes reads them, within bounds."""

from __future__ import annotations

import math
import sys

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ztunnel.runtime import documents as module
from ztunnel.runtime.documents import DocumentError, read_json, read_yaml


def one(text: str) -> object:
    (value,) = read_yaml(text.encode())
    return value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: x", {"a": "x"}),
        ("a: '80'", {"a": "80"}),
        ("a: 80", {"a": 80}),
        ("a: -0x1f", {"a": -31}),
        ("a: 0o17", {"a": 15}),
        ("a: 017", {"a": 15}),
        ("a: 0b101", {"a": 5}),
        ("a: 1_000", {"a": 1000}),
        ("a: 09", {"a": 9.0}),
        ("a: 1e3", {"a": 1000.0}),
        ("a: .5", {"a": 0.5}),
        ("a: 1.2.3", {"a": "1.2.3"}),
        ("a: 1:30", {"a": "1:30"}),
        ("a: 0x", {"a": "0x"}),
        ("a: 0b_", {"a": "0b_"}),
        ("a: " + "9" * 70, {"a": "9" * 70}),
        ("a: 2024-01-01T00:00:00Z", {"a": "2024-01-01T00:00:00Z"}),
        ("a: yes", {"a": True}),
        ("a: off", {"a": False}),
        ("a: ~", {"a": None}),
        ("a:", {"a": None}),
        ("a: !!str 80", {"a": "80"}),
        ("a: !!int '80'", {"a": 80}),
        ("a: ! 80", {"a": "80"}),
        ("8080: x", {8080: "x"}),
        ("[a, {b: c}, []]", ["a", {"b": "c"}, []]),
        ("a: &x {b: 1}\nc: *x", {"a": {"b": 1}, "c": {"b": 1}}),
        ("a: &x {b: 1, c: 2}\nd: {<<: *x, c: 3}", {"a": {"b": 1, "c": 2}, "d": {"c": 3, "b": 1}}),
        ("a: &x {b: 1}\nc: &y {d: 2}\ne: {<<: [*x, *y]}", {"a": {"b": 1}, "c": {"d": 2}, "e": {"b": 1, "d": 2}}),
        ("a: '<<'", {"a": "<<"}),
        ("|\n  text\n  more", "text\nmore"),
    ],
)
def test_values(text: str, value: object) -> None:
    assert one(text) == value


def test_a_stream_has_several_documents_and_empty_ones() -> None:
    assert list(read_yaml(b"a: 1\n---\n---\n# nothing\n---\nb: 2\n")) == [{"a": 1}, None, None, {"b": 2}]
    assert list(read_yaml(b"")) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [", "line 2: did not find expected node content"),
        ("a: 1\na: 2", "line 2: the key 'a' is given twice"),
        ("a: &x [*x]", "names nothing that is complete"),
        ("a: &x 1\nb: &x [*x]", "names nothing that is complete"),
        ("a: *nobody", "names nothing that is complete"),
        ("[" * 101, "nested more than 100 deep"),
        ("? [a]\n: b", "a collection cannot be a key"),
        ("x: &a [1]\n*a : b", "a collection cannot be a key"),
        ("<<: 5", "<< needs a mapping"),
        ("!!python/object/apply:os.system ['true']", "has no meaning in a manifest"),
        ("!!set {a}", "has no meaning in a manifest"),
        ("!!python/name:os.system x", "does not fit"),
        ("!!int x", "does not fit"),
        ("\x00", "control characters"),
        ("a: @b", "cannot start any token"),
    ],
)
def test_refused_with_the_line(text: str, expected: str) -> None:
    with pytest.raises(DocumentError) as caught:
        list(read_yaml(text.encode()))
    assert expected in str(caught.value)


def test_a_megabyte_of_brackets_is_an_error_not_a_crash() -> None:
    for text in (b"[" * 1_000_000, b"- " * 500_000, b"{a: " * 250_000):
        with pytest.raises(DocumentError, match="nested more than"):
            list(read_yaml(text))


def test_aliases_count_what_they_repeat() -> None:
    lines = ["a: &a [x,x,x,x,x,x,x,x,x]"]
    lines += [f"{new}: &{new} [{','.join(['*' + old] * 9)}]" for old, new in zip("abcdefgh", "bcdefghi", strict=True)]
    with pytest.raises(DocumentError, match=f"more than {module.MAX_NODES} values"):
        list(read_yaml("\n".join(lines).encode()))


def test_documents_before_an_error_have_been_given() -> None:
    documents = read_yaml(b"a: 1\n---\nb: [\n")
    assert next(documents) == {"a": 1}
    with pytest.raises(DocumentError):
        next(documents)


def test_json() -> None:
    assert list(read_json(b'{"a": [1, true, null, "x"]}')) == [{"a": [1, True, None, "x"]}]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", "Expecting value"),
        (b'{"a": 1, "a": 2}', "the key 'a' is given twice"),
        (b"[NaN]", "NaN is not JSON"),
        (b"[" * 100_000, "nested too deep"),
        (b"\xff\xfe\xff", "codec can't decode"),
        (b"1" * 5000, "Exceeds the limit"),
    ],
)
def test_json_refused(text: bytes, expected: str) -> None:
    with pytest.raises(DocumentError) as caught:
        list(read_json(text))
    assert expected in str(caught.value)


TEXT = st.text(st.characters(exclude_categories=("Cs", "Nd")), max_size=20)
"""Without digits: `09` is a number to Kubernetes (YAML 1.2) and text to PyYAML."""
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**15), 10**15) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=20,
)


@given(PLAIN)
def test_what_pyyaml_writes_is_read_back(value: object) -> None:
    assert list(read_yaml(yaml.safe_dump(value).encode())) == [value]


@given(st.binary(max_size=200))
def test_any_bytes_are_documents_or_a_refusal(content: bytes) -> None:
    for read in (read_yaml, read_json):
        try:
            list(read(content))
        except DocumentError:
            continue


@given(st.text(alphabet="0123456789+-._eExXobn~:aAfF", max_size=12))
def test_any_plain_scalar_is_a_value(text: str) -> None:
    value = module._plain(text)
    assert value is None or isinstance(value, (str, int, float, bool))
    assert not isinstance(value, float) or not math.isnan(value)


def test_a_key_given_twice_among_many_is_found_at_once() -> None:
    """Looking each key up among all would take hours."""
    members = ",".join(f'"{number}":1' for number in range(200_000))
    with pytest.raises(DocumentError, match="'199999' is given twice"):
        list(read_json(f'{{{members},"199999":1}}'.encode()))


def test_keys_that_share_a_hash_are_few() -> None:
    """Multiples of this number all have the hash 0; text's hashes nobody can foresee."""
    modulus = sys.hash_info.modulus
    with pytest.raises(DocumentError, match="keys of one mapping are not text"):
        one("".join(f"{number * modulus}: x\n" for number in range(1, module.MAX_ODD_KEYS + 2)))
    assert len(str(one("".join(f"{number}: x\n" for number in range(module.MAX_ODD_KEYS))))) > module.MAX_ODD_KEYS
