"""The batch for the node's rules, as far as bytes can be judged without a kernel (tests/netns/test_probes.py has one, and nft)."""

from __future__ import annotations

import struct

import pytest

from ztunnel.node.netlink import Request
from ztunnel.node.probe_rules import Owner, removal, replacement


def elements(batch: tuple[Request, ...], name: str) -> int:
    return sum(each.data.count(struct.pack("=HH", 8 if name == "pods4" else 20, 1)) for each in batch if each.what == f"fill set {name}")


@pytest.mark.parametrize("batch", [removal(), replacement(Owner(0, 7, 2), ["10.0.0.1", "fd00::1"])], ids=["removal", "replacement"])
def test_every_message_is_as_long_as_it_says(batch: tuple[Request, ...]) -> None:
    for each in batch:
        (length,) = struct.unpack_from("=I", each.data)
        assert length == len(each.data)
        assert length % 4 == 0
    assert [struct.unpack_from("=IH", each.data)[1] for each in (batch[0], batch[-1])] == [0x10, 0x11]


def test_many_pods_are_more_than_one_message() -> None:
    pods = [f"10.{number >> 8}.{number & 255}.1" for number in range(1200)] + [f"fd00::{number:x}" for number in range(600)]
    batch = replacement(Owner(0, None), pods)
    assert sum(each.what == "fill set pods4" for each in batch) == 3
    assert elements(batch, "pods4") == 1200
    assert elements(batch, "pods6") == 600
    assert all(len(each.data) < 1 << 16 for each in batch)


def test_no_pods_are_an_empty_set() -> None:
    assert not [each for each in replacement(Owner(0, None), []) if each.what.startswith("fill")]


def test_a_group_is_part_of_the_rule_only_where_there_is_one() -> None:
    assert not any(b"socket\0" in each.data for each in replacement(Owner(0, None), []))
    rules = [each.data for each in replacement(Owner(0, 0x1122334455667788, 2), []) if each.what == "add rule to output"]
    assert len(rules) == 2
    assert all(struct.pack("=Q", 0x1122334455667788) in rule for rule in rules)
