"""Reading, writing and merging JSON trees."""

from __future__ import annotations

from ztunnel.mesh.manifests.tree import Tree, at, branch, branches, drop, flag, integer, merge, put, strings, text, texts

BODY: Tree = {"a": {"b": [{"c": "x"}, 3, {"c": 4}], "n": 5, "yes": True, "words": ["x", 1, None]}, "labels": {"k": "v", "bad": 1}}


def test_readers_give_the_asked_type_or_a_default() -> None:
    assert at(BODY, "a", "b", "c") is None
    assert branches(BODY, "a", "b") == [{"c": "x"}, {"c": 4}]
    assert branch(BODY, "a", "n") == {}
    assert (integer(BODY, "a", "n"), integer(BODY, "a", "yes", default=7)) == (5, 7)
    assert (flag(BODY, "a", "yes"), flag(BODY, "a", "n")) == (True, False)
    assert text(BODY, "a", "n", default="?") == "?"
    assert texts(BODY, "a", "words") == ["x", "1"]
    assert strings(BODY, "labels") == {"k": "v"}
    assert text("no mapping", "a") == ""


def test_put_makes_the_way_and_drop_ignores_what_is_not_there() -> None:
    body: Tree = {"a": 1}
    put(body, "x", "a", "b", "c")
    assert body == {"a": {"b": {"c": "x"}}}
    drop(body, "a", "b", "c")
    drop(body, "q", "r")
    assert body == {"a": {"b": {}}}


def test_a_three_way_merge_changes_what_the_manifest_changed_and_keeps_the_rest() -> None:
    last = {"spec": {"replicas": 1, "old": 1, "list": [1]}, "metadata": {"labels": {"a": "1", "b": "2"}}}
    new = {"spec": {"replicas": 2, "list": [2, 3]}, "metadata": {"labels": {"a": "9"}}}
    live = {
        "spec": {"replicas": 1, "old": 1, "default": 7, "list": [1]},
        "metadata": {"labels": {"a": "1", "b": "2", "mine": "x"}},
        "status": 1,
    }
    assert merge(last, new, live) == {
        "spec": {"replicas": 2, "default": 7, "list": [2, 3]},
        "metadata": {"labels": {"a": "9", "mine": "x"}},
        "status": 1,
    }
