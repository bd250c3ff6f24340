"""The list as text; that the plugin reads it so is shown in tests/netns/test_cni_plugin.py."""

from __future__ import annotations

from ztunnel.cni.known import Known, text


def test_pods_come_before_namespaces_and_the_last_line_says_that_it_is_whole() -> None:
    known = Known(frozenset(("kube-system", "default")), (("b", False), ("a", True)))
    assert text(known).splitlines() == [
        "ztunnel-cni-known 1",
        "allow pod b",
        "refuse pod a",
        "allow namespace default",
        "allow namespace kube-system",
        "end",
    ]


def test_an_empty_list_lets_nobody_start() -> None:
    assert text(Known(frozenset(), ())) == "ztunnel-cni-known 1\nend\n"


def test_names_that_would_be_lines_of_their_own_are_left_out() -> None:
    known = Known(frozenset(("x\nallow namespace y", "a b", "z\r")), (("u\nallow pod v", False), ("w\x00", True)))
    assert text(known) == "ztunnel-cni-known 1\nend\n"
