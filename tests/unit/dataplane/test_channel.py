"""The channel's framing: what goes in comes out, whatever the pieces; nonsense ends it."""

from __future__ import annotations

import struct
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ztunnel.dataplane import channel
from ztunnel.dataplane.channel import AddPod, Decoder, Flows, NeedSockets, PodAdded, Query, RemovePod, Sockets, Update, encode
from ztunnel.dataplane.flow import Direction, FlowEnd, FlowFailure, FlowNews, FlowPath
from ztunnel.mesh.delta import Delta
from ztunnel.mesh.errors import Flag
from ztunnel.mesh.identity import SpiffeId
from ztunnel.mesh.rules import Action, Clause, Match, Policy, Rule, Scope, StringKind, StringMatch
from ztunnel.mesh.workloads import Endpoint, Protocol, Service, ServicePort, Workload

IDENTITY = SpiffeId("cluster.local", "shop", "cart")
WORKLOAD = Workload("u1", "cart-1", "shop", IDENTITY, "n1", ("10.0.0.1", "fd00::1"), Protocol.HBONE)
SERVICE = Service("cart", "shop", "cart.shop.svc", ("10.96.0.1",), (ServicePort(80, 8080, "http"),), (Endpoint("u1", ((80, 8080),)),))
POLICY = Policy("p", "shop", Scope.NAMESPACE, Action.DENY, (Rule((Clause((Match(not_principals=(StringMatch(StringKind.PRESENCE),)),)),)),))


@pytest.mark.parametrize(
    "message",
    [
        Update(Delta((WORKLOAD,), (SERVICE,), (POLICY,), ("gone",), ("shop/x",), ("k/n/p",))),
        AddPod("u1", IDENTITY),
        RemovePod("u1", drain=True),
        Sockets("u1", ipv6=True),
        Query(7),
    ],
    ids=lambda message: type(message).__name__,
)
def test_messages_survive(message: channel.Message) -> None:
    (received,) = Decoder(to_worker=True).feed(encode(message), [])
    assert received.message == message


def test_flow_records_survive() -> None:
    path = FlowPath(Direction.INBOUND, "u1", ("10.0.0.1", 8080), "10.0.0.1:8080", mutual_tls=True)
    end, failure = FlowEnd(1, "10.0.0.9", 4000), FlowFailure(2, "10.0.0.9", 4001, flag=Flag.DENY, error="x")
    flows = Flows((FlowNews(path, 2, ends=(end,), failures=(failure,)),), 3)
    (received,) = Decoder(to_worker=False).feed(encode(flows), [])
    assert received.message == flows


@given(cuts=st.lists(st.integers(0, 400)), batches=st.lists(st.integers(0, 3), min_size=1, max_size=5))
def test_pieces_do_not_matter(cuts: list[int], batches: list[int]) -> None:
    messages = [(Sockets(f"u{number}", ipv6=False), count) for number, count in enumerate(batches)]
    stream = b"".join(encode(message, count) for message, count in messages)
    decoder = Decoder(to_worker=True)
    descriptors = list(range(100, 100 + sum(batches)))
    received = decoder.feed(b"", descriptors)
    edges = sorted({min(cut, len(stream)) for cut in cuts} | {0, len(stream)})
    for start, end in pairwise(edges):
        received += decoder.feed(stream[start:end], [])
    assert [each.message for each in received] == [message for message, _ in messages]
    assert [fd for each in received for fd in each.descriptors] == descriptors


def test_a_message_of_the_other_direction_is_refused() -> None:
    with pytest.raises(channel.ChannelError, match="not a message"):
        Decoder(to_worker=False).feed(encode(Query(1)), [])


@given(st.binary(max_size=64))
def test_nonsense_is_refused_or_waited_for(data: bytes) -> None:
    try:
        assert Decoder(to_worker=True).feed(data, []) == []
    except channel.ChannelError:
        pass


def test_bounds() -> None:
    with pytest.raises(channel.ChannelError, match="bound"):
        encode(PodAdded("u"), channel.MAX_DESCRIPTORS + 1)
    with pytest.raises(channel.ChannelError, match="bound"):
        Decoder(to_worker=True).feed(b"\xff" * 8, [])


def test_missing_descriptors_are_refused_and_unclaimed_ones_told() -> None:
    with pytest.raises(channel.ChannelError, match="announced 2"):
        Decoder(to_worker=True).feed(encode(Sockets("u", ipv6=False), 2), [5])
    decoder = Decoder(to_worker=False)
    decoder.feed(encode(NeedSockets("u", ipv6=False, count=3)), [8, 9])
    assert decoder.unclaimed() == [8, 9]
    assert decoder.unclaimed() == []


def test_descriptors_that_were_lost_on_the_way_are_missed_by_their_own_message_only() -> None:
    decoder = Decoder(to_worker=True)
    before, hit, after = (encode(Sockets(name, ipv6=False), count) for name, count in (("before", 1), ("hit", 3), ("after", 2)))
    # The end of the frame that lost some comes together with the next one's descriptors.
    received = decoder.feed(before, [1])
    received += decoder.feed(hit[:-1], [2, 3], short=True)
    received += decoder.feed(hit[-1:] + after, [4, 5])
    assert [each.descriptors for each in received] == [(1,), (2, 3), (4, 5)]
    decoder.feed(b"", [6], short=True)
    assert [each.descriptors for each in decoder.feed(encode(Query(1)) + hit, [])] == [(), (6,)]
    with pytest.raises(channel.ChannelError, match="announced 3"):
        decoder.feed(hit, [])


@pytest.mark.parametrize(
    "field",
    [b"\xa3uid\xa2\xff\xfe", b"\xa3any" + b"\x91" * 100_000 + b"\xc0"],
    ids=["text that is not UTF-8", "an unknown field that is nested deep"],
)
def test_bytes_that_the_decoder_stumbles_over_are_refused(field: bytes) -> None:
    body = b"\x82\xa4type\xa8PodAdded" + field
    with pytest.raises(channel.ChannelError, match="not a message"):
        Decoder(to_worker=False).feed(struct.pack("!II", len(body), 0) + body, [])
