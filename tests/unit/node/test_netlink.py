"""Cutting a datagram into messages."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ztunnel.mesh.errors import NetlinkError
from ztunnel.node.netlink import KernelRefused, _messages


def message(body: bytes, kind: int = 16, sequence: int = 7) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, 0, sequence, 0) + body + bytes(-len(body) % 4)


def test_messages_are_padded_to_four_bytes() -> None:
    first, second = message(b"abcde", sequence=1), message(b"", kind=3, sequence=2)
    assert [(sequence, kind, len(data)) for sequence, kind, _, data in _messages(first + second)] == [(1, 16, 21), (2, 3, 16)]


@pytest.mark.parametrize("data", [struct.pack("=IHHII", 15, 16, 0, 1, 0), struct.pack("=IHHII", 17, 16, 0, 1, 0)])
def test_a_message_that_is_cut_short_is_an_error(data: bytes) -> None:
    with pytest.raises(NetlinkError, match="cut short"):
        list(_messages(data))


@given(st.binary(max_size=200))
def test_any_bytes_are_messages_or_an_error(data: bytes) -> None:
    try:
        assert sum(len(body) for *_, body in _messages(data)) <= len(data)
    except NetlinkError:
        return


def test_a_refusal_names_the_operation() -> None:
    error = KernelRefused("add table ztunnel-nat", 1)
    assert (str(error), error.errno) == ("add table ztunnel-nat: Operation not permitted", 1)
