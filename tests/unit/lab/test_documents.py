"""Manifests as people write them, and as they should not."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from ztunnel.lab.documents import parse_text, read
from ztunnel.lab.objects import LabError
from ztunnel.mesh.manifests.tree import at


def test_documents_remember_where_they_came_from(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text("kind: A\n---\n---\nkind: B\n")
    (tmp_path / "a.json").write_text('{"kind": "C"}')
    (tmp_path / "ignored.txt").write_text("kind: D")
    (tmp_path / "below").mkdir()
    found = read([str(tmp_path)])
    assert [at(entry, "body", "kind") for entry in found] == ["C", "A", "B"]
    assert [str(entry["source"]).removeprefix(f"{tmp_path}/") for entry in found] == [
        "a.json",
        "b.yaml (document 1)",
        "b.yaml (document 3)",
    ]


def test_lists_are_unpacked_and_standard_input_is_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("apiVersion: v1\nkind: List\nitems: [{kind: A}, {kind: B}]"))
    assert [at(entry, "body", "kind") for entry in read(["-"])] == ["A", "B"]


def test_a_date_is_text() -> None:
    assert at(parse_text("f", "when: 2030-01-01")[0], "body", "when") == "2030-01-01"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("a: &a [*a]", "names nothing that is complete"),
        ("a: !!binary aGk=", "is not YAML"),
        ("a: 1\na: 2", "the key 'a' is given twice"),
        ("[" * 1_000_000, "nested more than"),
        (
            "a: &a [x]\n" + "".join(f"{c}: &{c} [{', '.join(['*' + p] * 99)}]\n" for p, c in zip("abcd", "bcde", strict=True)),
            "values in one document",
        ),
        ("? [1, 2]\n: x", "is not"),
        ("a: [", "is not YAML"),
        ("- 1", "a Kubernetes object is expected, found list"),
        ("text", "found str"),
        ("apiVersion: v1\nkind: List\nitems: 5", "items"),
        ("!!python/object/apply:os.system ['true']", "is not YAML"),
        ("a: \x07", "is not YAML"),
    ],
)
def test_what_is_no_manifest_is_refused(content: str, why: str) -> None:
    with pytest.raises(LabError, match=why):
        parse_text("f", content)


def test_places_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(LabError, match=r"cannot be read: No such file"):
        read([str(tmp_path / "none.yaml")])
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(LabError, match="is not UTF-8"):
        read([str(tmp_path / "binary.yaml")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(LabError, match=r"no objects passed: there are none in .*files named \*\.yaml, \*\.yml, \*\.json are read"):
        read([str(tmp_path / "empty")])
