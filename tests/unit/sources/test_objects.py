"""What is in force when documents are refused, doubled or gone."""

from __future__ import annotations

import pytest

from ztunnel.mesh.manifests.core import Namespace
from ztunnel.mesh.manifests.metadata import ObjectKey
from ztunnel.mesh.manifests.parse import KubeObject, RefusedPolicy
from ztunnel.mesh.manifests.selectors import TargetRef
from ztunnel.runtime.documents import DocumentError
from ztunnel.sources.objects import Judged, Refusal, changed, combine, judge

SHOP = ObjectKey("Namespace", "", "shop")
POLICY = ObjectKey("AuthorizationPolicy", "shop", "deny")


def namespace(name: str = "shop", **labels: str) -> dict[str, object]:
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": dict(labels)}}


def policy(action: str = "DENY", name: str = "deny", **spec: object) -> dict[str, object]:
    metadata = {"name": name, "namespace": "shop"}
    return {"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": metadata, "spec": {"action": action, **spec}}


def verdicts(body: object, file: str, number: int) -> tuple[list[Judged], list[Refusal]]:
    """All objects of one document, and all that is wrong with them."""
    pairs = list(judge(body, file, number))
    return [found for found, _ in pairs if found is not None], [refusal for _, refusal in pairs if refusal is not None]


def judged(body: object, file: str = "a.yaml") -> list[Judged]:
    return verdicts(body, file, 1)[0]


def in_force(*documents: list[Judged], before: dict[ObjectKey, KubeObject] | None = None) -> dict[ObjectKey, KubeObject]:
    return combine([each for document in documents for each in document], before or {}).objects


def test_good_documents_are_in_force_and_other_kinds_are_passed_over() -> None:
    configmap = {"apiVersion": "v1", "kind": "Endpoints", "metadata": {"name": "x", "namespace": "shop"}}
    assert verdicts(configmap, "a.yaml", 1) == ([], [])
    assert verdicts(None, "a.yaml", 1) == ([], [])
    objects = in_force(judged(namespace()))
    assert isinstance(objects[SHOP], Namespace)


def test_lists_are_unpacked_and_each_item_judged() -> None:
    body = {"apiVersion": "v1", "kind": "List", "items": [namespace(), {"kind": "Pod"}, namespace("other")]}
    objects, refusals = verdicts(body, "a.yaml", 3)
    assert [each.key.name for each in objects if each.item] == ["shop", "other"]
    assert len(refusals) == 1
    assert refusals[0].file == "a.yaml"


def test_a_list_that_is_none_makes_its_file_unreadable() -> None:
    with pytest.raises(DocumentError, match="document 2: items: not a list: 5"):
        verdicts({"apiVersion": "v1", "kind": "List", "items": 5}, "a.yaml", 2)


@pytest.mark.parametrize("body", ["oops", ["a", "list"], {"metadata": {"name": "deny"}}, {"apiVersion": "v1", "kind": 5}])
def test_what_is_no_object_is_refused_as_unknown(body: object) -> None:
    objects, (refusal,) = verdicts(body, "a.yaml", 2)
    assert objects == []
    assert (refusal.object, refusal.unknown) == ("a.yaml document 2", True)
    _, (refusal,) = verdicts({"apiVersion": "v1", "kind": "Pod"}, "a.yaml", 2)
    assert not refusal.unknown


def test_a_refusal_names_file_object_field_and_reason() -> None:
    _, (refusal,) = verdicts(policy("DENYY"), "a.yaml", 1)
    assert (refusal.file, refusal.object, refusal.field) == ("a.yaml", "AuthorizationPolicy shop/deny", "spec.action")
    assert "ALLOW" in refusal.reason


def test_a_refused_policy_keeps_its_last_good_version() -> None:
    good = in_force(judged(policy()))
    after = in_force(judged(policy("DENYY")), before=good)
    assert after == good


def test_a_refused_policy_without_a_good_version_denies() -> None:
    objects = in_force(judged(policy("DENYY", selector={"matchLabels": {"app": "cart"}})))
    stand_in = objects[POLICY]
    assert isinstance(stand_in, RefusedPolicy)
    assert stand_in.selector == {"app": "cart"}
    again = in_force(judged(policy("DENYYY")), before=objects)[POLICY]
    assert isinstance(again, RefusedPolicy)
    assert "DENYYY" in again.reason
    assert POLICY in in_force(judged(policy()), before=objects)
    assert not isinstance(in_force(judged(policy()), before=objects)[POLICY], RefusedPolicy)


def test_anything_else_that_is_refused_keeps_its_last_good_version_or_is_absent() -> None:
    broken = namespace()
    broken["metadata"] = {"name": "shop", "labels": 5}
    good = in_force(judged(namespace(a="1")))
    assert in_force(judged(broken)) == {}
    assert in_force(judged(broken), before=good) == good


def test_what_no_file_has_any_more_is_gone() -> None:
    assert in_force(before=in_force(judged(policy()))) == {}


def test_only_what_is_different_has_changed() -> None:
    former = in_force(judged(namespace("shop")), judged(namespace("bank")), judged(namespace("mill")))
    present = in_force(judged(namespace("shop")), judged(namespace("bank", colour="red")), judged(namespace("farm")))
    bank, farm, mill = (ObjectKey("Namespace", "", name) for name in ("bank", "farm", "mill"))
    assert dict(changed(former, present)) == {bank: present[bank], farm: present[farm], mill: None}


def test_two_files_that_define_one_object_are_refused_with_both_names() -> None:
    combined = combine([*judged(namespace(a="1"), "a.yaml"), *judged(namespace(a="2"), "b.yaml")], {})
    assert combined.refusals == (Refusal("b.yaml", "Namespace shop", "", "defined in a.yaml, b.yaml; keep one of them"),)
    assert combined.objects == in_force(judged(namespace(a="1")))
    last_good = in_force(judged(namespace(a="3")))
    assert in_force(judged(namespace(a="1")), judged(namespace(a="2"), "b.yaml"), before=last_good) == last_good


def test_one_file_that_defines_an_object_twice() -> None:
    combined = combine([*judged(namespace()), *judged(namespace())], {})
    assert [refusal.reason for refusal in combined.refusals] == ["defined 2 times in a.yaml"]


def test_a_policy_that_was_never_defined_only_once_denies_what_either_selects() -> None:
    cart, shop = {"matchLabels": {"app": "cart"}}, {"matchLabels": {"app": "shop"}}
    same = in_force(judged(policy(selector=cart)), judged(policy("ALLOW", selector=cart), "b.yaml"))[POLICY]
    other = in_force(judged(policy(selector=cart)), judged(policy("ALLOW", selector=shop), "b.yaml"))[POLICY]
    assert isinstance(same, RefusedPolicy)
    assert isinstance(other, RefusedPolicy)
    assert (same.selector, other.selector) == ({"app": "cart"}, None)
    waypoint = policy(targetRefs=[{"kind": "Service", "name": "x", "group": ""}])
    attached = in_force(judged(waypoint), judged(waypoint, "b.yaml"))[POLICY]
    assert isinstance(attached, RefusedPolicy)
    assert attached.targets == (TargetRef("Service", "x"),)


def test_refused_policies_without_names_stand_for_each_other() -> None:
    nameless = policy(name=5)  # type: ignore[arg-type]  # what a manifest may say
    combined = combine([*judged(nameless), *judged(nameless)], {})
    (stand_in,) = combined.objects.values()
    assert isinstance(stand_in, RefusedPolicy)
    assert combined.refusals == ()


def test_a_nameless_policy_that_denies_is_not_hidden_by_one_that_never_does() -> None:
    audit = policy(name=5)  # type: ignore[arg-type]  # what a manifest may say
    audit["spec"] = {"action": "AUDIT"}
    nameless = policy(name=5)  # type: ignore[arg-type]  # as above
    (stand_in,) = combine([*judged(audit), *judged(nameless)], {}).objects.values()
    assert isinstance(stand_in, RefusedPolicy)


def test_nonsense_is_refused_and_nothing_else() -> None:
    bodies: list[object] = [5, "x", [], {}, {"kind": 5}, {"kind": "Pod"}, {1: 2}]
    for body in bodies:
        objects, refusals = verdicts(body, "a.yaml", 1)
        assert [each for each in objects if each.item] == []
        assert len(refusals) == 1
