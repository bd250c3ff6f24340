"""Reading values, and how refusals name places and show values."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date

import pytest

from ztunnel.mesh.errors import ManifestError
from ztunnel.mesh.manifests.fields import MAX_ITEMS, Field, show


def field(value: object) -> Field:
    return Field("Pod default/x", "spec", value)


def refusal(read: Callable[[], object]) -> str:
    with pytest.raises(ManifestError) as caught:
        read()
    return str(caught.value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("10.0.0.0/33", '"10.0.0.0/33"'),
        ("a\nb", '"a\\nb"'),
        ("x" * 100, '"' + "x" * 80 + '"…'),
        ({}, "a mapping"),
        ([], "a list"),
        (True, "true"),
        (False, "false"),
        (5, "5"),
        pytest.param(10**5000, "a very large number", id="large"),
        (float("nan"), "nan"),
        (None, "null"),
        (date(2026, 1, 1), "a date"),
    ],
)
def test_values_are_shown_short(value: object, expected: str) -> None:
    assert show(value) == expected


def test_an_error_names_object_place_and_reason() -> None:
    place = field({"rules": [{"from": [{"source": {"ipBlocks": ["a"]}}]}]})
    deep = place.get("rules").items()[0].get("from").items()[0].get("source").get("ipBlocks").items()[0]
    assert str(deep.wrong("not an address block")) == ('Pod default/x: spec.rules[0].from[0].source.ipBlocks[0]: not an address block: "a"')
    assert str(Field("f.yaml", "", 5).error("no")) == "f.yaml: document: no"
    assert Field("f.yaml", "", {}).get("kind").path == "kind"
    assert field({}).get("istio.io/x").path == 'spec["istio.io/x"]'


def test_members_of_what_is_absent_are_absent() -> None:
    assert field(None).get("a").get("b").absent
    assert not field({"a": 0}).get("a").absent
    assert [name for name, _ in field({"a": None, "b": 1}).entries()] == ["b"]


def test_unknown_and_emptied_members_are_refused() -> None:
    field({"principals": []}).only(("principals",))
    assert refusal(lambda: field({"prinicpals": []}).only(("principals", "ports"))) == (
        'Pod default/x: spec.prinicpals: unknown field (did you mean "principals"?)'
    )
    assert refusal(lambda: field({"zzz": 1}).only(("ports",))) == "Pod default/x: spec.zzz: unknown field"
    assert refusal(lambda: field({7: 1}).only(("ports",))) == "Pod default/x: spec[7]: unknown field"
    assert refusal(lambda: field({"ports": None}).only(("ports",))).endswith("spec.ports: no value: give one, or leave the field out")


def test_lists() -> None:
    assert field(None).items() == []
    assert [item.path for item in field([1, 2]).items()] == ["spec[0]", "spec[1]"]
    assert refusal(lambda: field({}).items()).endswith("spec: not a list: a mapping")
    assert refusal(lambda: field([0] * (MAX_ITEMS + 1)).items()).endswith("spec: more than 4096 items")


def test_mappings() -> None:
    assert refusal(lambda: field("x").get("a")).endswith('spec: not a mapping: "x"')
    assert refusal(lambda: field(dict.fromkeys(range(MAX_ITEMS + 1))).get("a")).endswith("spec: more than 4096 entries")


def test_text() -> None:
    assert field("x").text() == "x"
    assert field(None).text("y") == "y"
    assert refusal(field(None).text).endswith("spec: required")
    assert refusal(field("").text).endswith("spec: empty")
    assert refusal(field([]).text).endswith("spec: not text: a list")
    for scalar, shown in ((8080, "8080"), (True, "true"), (float("nan"), "nan")):
        assert refusal(field(scalar).text).endswith(f"spec: not text (quote it): {shown}")


def test_booleans() -> None:
    assert field(True).boolean()
    assert not field(False).boolean()
    assert not field(None).boolean()
    assert refusal(field("true").boolean).endswith('spec: not a boolean: "true"')


def test_ports() -> None:
    assert field(80).port() == 80
    for wrong in (0, 65536, -1, True, "80", 80.0, float("nan"), None, 10**5000):
        assert "not a port number (1-65535)" in refusal(field(wrong).port)


def test_ports_as_text() -> None:
    assert field("8080").port_text() == 8080
    assert field(8080).port_text() == 8080
    for wrong in ("0", "65536", "-1", "8080x", "", "٨٠", "1" * 6, True, 1.5):
        assert "not a port number (1-65535)" in refusal(field(wrong).port_text)


def test_addresses() -> None:
    assert field("FD00::1").address() == "fd00::1"
    assert refusal(field("10.0.0").address).endswith('spec: not an IP address: "10.0.0"')


def test_names() -> None:
    assert field("web-1.x").name() == "web-1.x"
    assert field(None).name("default") == "default"
    for wrong in ("Web", "-a", "a/b", "../x", "a" * 254, "a\n", "ä"):
        assert "not a name" in refusal(field(wrong).name)
    assert refusal(field(None).name).endswith("spec: required")


def test_namespaces() -> None:
    assert field("shop").namespace() == "shop"
    assert field(None).namespace("default") == "default"
    for wrong in ("a.b", "A", "a" * 64):
        assert "not a namespace" in refusal(field(wrong).namespace)


def test_labels() -> None:
    assert field({"app.kubernetes.io/name": "Web_1.x", "empty": "", "none": None}).labels() == {
        "app.kubernetes.io/name": "Web_1.x",
        "empty": "",
    }
    assert "not a label value" in refusal(field({"a": "x y"}).labels)
    assert "not a label value" in refusal(field({"a": "x" * 64}).labels)
    assert refusal(field({1: "x"}).labels).endswith("spec[1]: the key is not text: 1")
    assert refusal(field({"a": True}).labels).endswith("spec.a: not text (quote it): true")


def test_a_document_that_repeats_itself_is_bounded() -> None:
    inner = [0] * MAX_ITEMS
    place = field({"lists": [inner] * MAX_ITEMS})
    assert refusal(lambda: [item.items() for item in place.get("lists").items()]).endswith("the document has more than 100000 values")
    place = field({"maps": [dict.fromkeys(range(MAX_ITEMS), 0)] * MAX_ITEMS})
    assert "more than 100000 values" in refusal(lambda: [list(item.entries()) for item in place.get("maps").items()])


def test_another_value_at_the_same_place() -> None:
    assert str(field(5).instead("x").wrong("no")) == 'Pod default/x: spec: no: "x"'


@pytest.mark.parametrize(
    "read",
    [lambda: field("x\ud800").text(), lambda: list(field({"x\ud800": "y"}).texts())],
    ids=["value", "key"],
)
def test_half_a_surrogate_pair_is_no_text(read: Callable[[], object]) -> None:
    assert "text" in refusal(read)
    assert field("x\U00010000é").text() == "x\U00010000é"
