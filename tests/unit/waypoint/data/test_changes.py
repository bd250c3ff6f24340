"""Workers are told what has changed of a configuration, and have it whole again."""

from __future__ import annotations

from dataclasses import replace

import msgspec

from tests.kit.pki import FakePki
from waypoint.data.changes import applied, difference
from waypoint.data.channel import ChangeConfig, ServeConfig, ToWorker
from ztunnel.dataplane.channel import Decoder, encode
from ztunnel.mesh.l7.clusters import Cluster, Endpoint
from ztunnel.mesh.l7.config import GatewayServer, ListenerProtocol, ProxyConfig, ProxyOptions, ServedService, ServedWorkload
from ztunnel.mesh.l7.security import L7Action, L7Policy

NOBODY = FakePki().identity("waypoint")


def cluster(name: str, *addresses: str) -> Cluster:
    return Cluster(name, name, "default", name, 80, endpoints=tuple(Endpoint(address, 80) for address in addresses))


def service(name: str, *vips: str) -> ServedService:
    return ServedService(name, "default", name, vips, ())


BEFORE = ProxyConfig(
    "w",
    "default",
    NOBODY,
    services=(service("a", "10.0.0.1"), service("b", "10.0.0.2"), service("c", "10.0.0.3")),
    workloads=(ServedWorkload("u", ("10.1.0.1",)),),
    clusters={name: cluster(name, "10.1.0.1") for name in ("a", "b", "c")},
    policies={"default/p": L7Policy("p", "default", L7Action.DENY)},
)
AFTER = replace(
    BEFORE,
    services=(service("a", "10.0.0.1"), service("b", "10.0.0.9"), service("d", "10.0.0.4")),
    workloads=(),
    servers=(GatewayServer("s", 80, ListenerProtocol.HTTP),),
    clusters={"a": BEFORE.clusters["a"], "b": cluster("b", "10.1.0.2"), "d": cluster("d")},
    policies={},
    options=ProxyOptions(http10=True),
)


def test_only_what_changed_travels_and_what_comes_of_it_is_whole() -> None:
    change = difference(BEFORE, AFTER)
    assert {each.name for each in change.config.services} == {"b", "d"}
    assert set(change.config.clusters) == {"b", "d"}
    assert change.gone == {"services": ("default/c",), "workloads": ("u",), "clusters": ("c",), "policies": ("default/p",)}
    assert applied(BEFORE, change) == AFTER
    assert difference(AFTER, AFTER) == ChangeConfig(replace(AFTER, services=(), clusters={}), {})


def test_it_survives_the_channel() -> None:
    wire = encode(ServeConfig(BEFORE)) + encode(difference(BEFORE, AFTER))
    first, second = (each.message for each in Decoder(to_worker=True, kinds=ToWorker).feed(wire, []))
    assert isinstance(first, ServeConfig)
    assert isinstance(second, ChangeConfig)
    assert applied(first.config, second) == AFTER
    assert msgspec.msgpack.encode(second) == msgspec.msgpack.encode(difference(BEFORE, AFTER))
