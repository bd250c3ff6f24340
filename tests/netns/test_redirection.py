"""Which connections of a captured pod come to us, which do not, and what they look like: real namespaces, rules and sockets."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from tests.kit.netns import Pod, Topology
from tests.kit.traffic import accept, nobody_waits, original_destination, source_of, talk
from ztunnel.mesh.ports import ILLEGAL_TARGETS, INBOUND_HBONE, INBOUND_PLAINTEXT, OUTBOUND
from ztunnel.node.foothold import TCP_LOOSE, Foothold
from ztunnel.node.nft import Ownership, probe_ownership
from ztunnel.node.redirect import PROBE_ADDRESSES, Stage
from ztunnel.node.sockets import make_sockets

APP = 8080
BOTH = pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["ipv4", "ipv6"])


@contextmanager
def captured(pod: Pod, stage: Stage = Stage.FULL) -> Iterator[Foothold]:
    foothold = Foothold.open(os.dup(pod.fd), f"test/{pod.name}", probe_ownership())
    try:
        foothold.load(stage)
        yield foothold
    finally:
        foothold.close()


def upstream(pod: Pod, family: int, source: tuple[str, int]) -> socket.socket:
    """The proxy's connection to the application, with the client's address."""
    (dialled,) = make_sockets(pod.fd, family, 1)
    dialled.settimeout(5)
    dialled.bind(source)
    dialled.connect((pod.address(family), APP))
    return dialled


@BOTH
def test_what_a_pod_sends_is_captured_with_its_original_destination(client: Pod, server: Pod, family: int) -> None:
    target = (server.address(family), APP)
    with captured(client) as foothold, server.listener(APP) as app, client.connect(target) as connection:
        with accept(foothold.listeners.outbound) as accepted:
            assert original_destination(accepted) == target
            talk(connection, accepted)
        assert nobody_waits(app)


@BOTH
def test_what_reaches_a_pod_is_captured_and_its_source_is_kept(client: Pod, server: Pod, family: int) -> None:
    target = (server.address(family), APP)
    with ExitStack() as stack:
        foothold = stack.enter_context(captured(server))
        app = stack.enter_context(server.listener(APP))
        connection = stack.enter_context(client.connect(target))
        accepted = stack.enter_context(accept(foothold.listeners.plaintext))
        assert original_destination(accepted) == target
        assert source_of(accepted) == client.address(family)
        dialled = stack.enter_context(upstream(server, family, (client.address(family), 0)))
        served = stack.enter_context(accept(app))
        assert source_of(served) == client.address(family)
        talk(dialled, served)
        talk(connection, accepted)


@BOTH
def test_tunnels_are_not_redirected(client: Pod, server: Pod, family: int) -> None:
    with captured(server) as foothold, client.connect((server.address(family), INBOUND_HBONE)) as connection:
        with accept(foothold.listeners.hbone) as accepted:
            talk(connection, accepted)
        assert nobody_waits(foothold.listeners.plaintext)


@BOTH
def test_the_proxys_own_sockets_are_not_captured(client: Pod, server: Pod, family: int) -> None:
    with captured(client) as foothold, server.listener(APP) as app:
        (dialled,) = make_sockets(client.fd, family, 1)
        with dialled:
            dialled.settimeout(5)
            dialled.connect((server.address(family), APP))
            with accept(app) as served:
                assert source_of(served) == client.address(family)
        assert nobody_waits(foothold.listeners.outbound)


@BOTH
def test_a_pods_own_address_and_loopback_are_not_captured(client: Pod, family: int) -> None:
    loopback = "127.0.0.1" if family == socket.AF_INET else "::1"
    with captured(client) as foothold, client.listener(APP) as app:
        for address in (client.address(family), loopback):
            with client.connect((address, APP)) as connection, accept(app) as served:
                talk(connection, served)
        assert nobody_waits(foothold.listeners.outbound)
        assert nobody_waits(foothold.listeners.plaintext)


@pytest.mark.parametrize("probe", PROBE_ADDRESSES, ids=["ipv4", "ipv6"])
def test_the_nodes_probes_reach_the_application_untouched(net: Topology, probe: str) -> None:
    node = net.node()
    pod = node.pod("probed")
    node.command("ip", "address", "add", probe, "dev", "lo")
    family = socket.AF_INET6 if ":" in probe else socket.AF_INET
    with captured(pod) as foothold, pod.listener(APP) as app:
        with node.connect((pod.address(family), APP), source=(probe, 0)) as connection, accept(app) as served:
            assert source_of(served) == probe
            talk(connection, served)
        with node.listener(APP, probe) as answering, pod.connect((probe, APP)) as connection, accept(answering) as served:
            talk(connection, served)
        assert nobody_waits(foothold.listeners.plaintext)
        assert nobody_waits(foothold.listeners.outbound)


@BOTH
@pytest.mark.parametrize("port", [OUTBOUND, INBOUND_PLAINTEXT])
def test_direct_hits_from_outside_carry_a_destination_that_the_proxy_refuses(client: Pod, server: Pod, family: int, port: int) -> None:
    with captured(server) as foothold, client.connect((server.address(family), port)):
        with accept(foothold.listeners.plaintext) as accepted:
            assert original_destination(accepted)[1] in ILLEGAL_TARGETS
        assert nobody_waits(foothold.listeners.outbound)


@BOTH
def test_direct_hits_from_inside_carry_a_destination_that_the_proxy_refuses(client: Pod, family: int) -> None:
    loopback = "127.0.0.1" if family == socket.AF_INET else "::1"
    with captured(client) as foothold, client.connect((loopback, OUTBOUND)), accept(foothold.listeners.outbound) as accepted:
        assert original_destination(accepted)[1] in ILLEGAL_TARGETS


@BOTH
def test_enrolment_in_two_phases_leaves_live_connections_alone(client: Pod, server: Pod, family: int) -> None:
    target = (server.address(family), APP)
    with server.listener(APP) as app, client.connect(target) as older, accept(app) as served:
        talk(older, served)
        with captured(client, Stage.GUARDED) as near, captured(server, Stage.GUARDED) as far:
            talk(older, served)
            with client.connect(target) as newer, accept(near.listeners.outbound) as accepted:
                talk(newer, accepted)
                near.load(Stage.FULL)
                far.load(Stage.FULL)
                talk(newer, accepted)
            talk(older, served)
            with client.connect(target), accept(near.listeners.outbound):
                pass


@BOTH
def test_without_the_first_phase_live_connections_are_reset(client: Pod, server: Pod, family: int) -> None:
    """Why there are two: the kernel takes a mid-stream packet that it does not know for the first of a connection."""
    with server.listener(APP) as app, client.connect((server.address(family), APP)) as older, accept(app) as served:
        talk(older, served)
        with captured(client, Stage.FULL):
            older.sendall(b"hello")
            with pytest.raises(ConnectionResetError):
                older.recv(16)


@BOTH
def test_a_lost_conntrack_entry_does_not_let_captured_traffic_out(client: Pod, server: Pod, family: int) -> None:
    target = (server.address(family), APP)
    with captured(client) as foothold, server.listener(APP) as app, client.connect(target) as connection:
        with accept(foothold.listeners.outbound) as accepted:
            talk(connection, accepted)
            client.command("conntrack", "-F")
            talk(connection, accepted)
        assert nobody_waits(app)


@BOTH
def test_a_lost_conntrack_entry_does_not_end_a_tunnel_in_which_the_server_speaks(client: Pod, server: Pod, family: int) -> None:
    with ExitStack() as stack:
        foothold = stack.enter_context(captured(server))
        connection = stack.enter_context(client.connect((server.address(family), INBOUND_HBONE)))
        accepted = stack.enter_context(accept(foothold.listeners.hbone))
        talk(connection, accepted)
        server.command("conntrack", "-F")
        talk(accepted, connection)


@BOTH
def test_the_proxy_can_tunnel_to_the_pod_that_it_speaks_for(client: Pod, family: int) -> None:
    """A pod that calls a service of which it is an endpoint itself."""
    with captured(client) as foothold:
        (dialled,) = make_sockets(client.fd, family, 1)
        with dialled:
            dialled.settimeout(5)
            dialled.connect((client.address(family), INBOUND_HBONE))
            with accept(foothold.listeners.hbone) as accepted:
                talk(dialled, accepted)


@BOTH
def test_draining_keeps_captured_connections_and_captures_no_new_ones(client: Pod, server: Pod, family: int) -> None:
    target = (server.address(family), APP)
    with ExitStack() as stack:
        near, far = stack.enter_context(captured(client)), stack.enter_context(captured(server))
        app = stack.enter_context(server.listener(APP))
        sent = stack.enter_context(client.connect(target))
        taken = stack.enter_context(accept(near.listeners.outbound))
        near.load(Stage.DRAIN)
        far.load(Stage.DRAIN)
        talk(sent, taken)
        direct = stack.enter_context(client.connect(target))
        served = stack.enter_context(accept(app))
        talk(direct, served)
        assert nobody_waits(near.listeners.outbound)
        assert nobody_waits(far.listeners.plaintext)


@BOTH
def test_draining_keeps_the_proxys_connections_to_the_application(client: Pod, server: Pod, family: int) -> None:
    with ExitStack() as stack:
        foothold = stack.enter_context(captured(server))
        app = stack.enter_context(server.listener(APP))
        sent = stack.enter_context(client.connect((server.address(family), APP)))
        taken = stack.enter_context(accept(foothold.listeners.plaintext))
        dialled = stack.enter_context(upstream(server, family, (client.address(family), 0)))
        served = stack.enter_context(accept(app))
        foothold.load(Stage.DRAIN)
        talk(sent, taken)
        talk(dialled, served)


@BOTH
def test_a_forced_source_port_does_not_evict_the_clients_connection(client: Pod, server: Pod, family: int) -> None:
    with ExitStack() as stack:
        foothold = stack.enter_context(captured(server))
        app = stack.enter_context(server.listener(APP))
        sent = stack.enter_context(client.connect((server.address(family), APP)))
        taken = stack.enter_context(accept(foothold.listeners.plaintext))
        same = (client.address(family), sent.getsockname()[1])
        dialled = stack.enter_context(upstream(server, family, same))
        served = stack.enter_context(accept(app))
        assert (source_of(served), served.getpeername()[1]) == same
        talk(sent, taken)
        talk(dialled, served)
        talk(sent, taken)


def test_removal_leaves_nothing(client: Pod, server: Pod) -> None:
    with captured(client) as foothold, server.listener(APP) as app:
        foothold.unload()
        foothold.unload()
        assert client.command("nft", "list", "ruleset") == ""
        for version in ("-4", "-6"):
            assert "fwmark" not in client.command("ip", version, "rule")
            assert client.command("ip", version, "route", "show", "table", "100") == ""
        with client.connect((server.v4, APP)), accept(app):
            pass


def test_nobody_else_can_remove_owned_rules(client: Pod) -> None:
    if probe_ownership() is not Ownership.OWNED:
        pytest.skip("this kernel cannot own tables")
    with captured(client) as foothold:
        client.command("nft", "flush", "ruleset")
        client.command("nft", "delete", "table", "inet", "ztunnel-nat", check=False)
        client.command("nft", "flush", "chain", "inet", "ztunnel-nat", "output", check=False)
        assert foothold.check() is None
        assert foothold.found_stage() is Stage.FULL


@pytest.mark.parametrize(
    ("damaging", "said"),
    [
        (("nft", "flush", "ruleset"), "table ztunnel-nat is missing"),
        (("nft", "flush", "chain", "inet", "ztunnel-nat", "output"), "rules of ztunnel-nat/output differ"),
        (("nft", "insert", "rule", "inet", "ztunnel-nat", "output", "accept"), "rules of ztunnel-nat/output differ"),
        (
            ("nft", "add", "chain", "inet", "ztunnel-raw", "more", "{ type filter hook input priority 0 ; }"),
            "ztunnel-raw holds other chains",
        ),
        (("nft", "add", "chain", "inet", "ztunnel-nat", "output", "{ policy drop ; }"), "chain ztunnel-nat/output differs"),
        (("ip", "-4", "rule", "del", "priority", "32764"), "IPv4 rule or route of table 100 is missing"),
        (("ip", "-6", "rule", "del", "priority", "32764"), "IPv6 rule or route of table 100 is missing"),
        (("ip", "-4", "route", "flush", "table", "100"), "IPv4 rule or route of table 100 is missing"),
        (("ip", "-6", "route", "flush", "table", "100"), "IPv6 rule or route of table 100 is missing"),
        (("sh", "-c", f"echo 0 > {TCP_LOOSE}"), "nf_conntrack_tcp_loose is not 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_drift_is_found_and_healed(client: Pod, damaging: tuple[str, ...], said: str) -> None:
    """With tables that everybody may change, as on kernels that cannot own them."""
    foothold = Foothold.open(os.dup(client.fd), "test/client", Ownership.SHARED)
    try:
        foothold.load(Stage.FULL)
        assert foothold.check() is None
        client.command(*damaging)
        assert said in str(foothold.check())
        foothold.heal()
        assert foothold.check() is None
    finally:
        foothold.close()


def test_a_flood_of_foreign_rules_is_drift_too(client: Pod) -> None:
    foothold = Foothold.open(os.dup(client.fd), "test/client", Ownership.SHARED)
    try:
        foothold.load(Stage.FULL)
        for _ in range(10):  # one transaction must fit into what an ordinary user's socket may send
            client.command("nft", "-f", "-", stdin="add rule inet ztunnel-nat output counter\n" * 500)
        assert foothold.check() == "table ztunnel-nat holds far too many rules"
        assert foothold.found_stage() is None
        foothold.heal()
        assert foothold.check() is None
    finally:
        foothold.close()


def test_what_others_do_in_their_own_tables_is_not_drift(client: Pod) -> None:
    with captured(client) as foothold:
        client.command("nft", "add", "table", "inet", "of-the-application")
        assert foothold.check() is None


def test_a_pod_without_ipv6_is_captured_on_ipv4(net: Topology) -> None:
    client, server = net.node().pod("client", ipv6=False), net.node().pod("server")
    with captured(client) as foothold, client.connect((server.v4, APP)) as connection:
        with accept(foothold.listeners.outbound) as accepted:
            assert original_destination(accepted) == (server.v4, APP)
            talk(connection, accepted)
        assert foothold.check() is None
        foothold.unload()
        assert client.command("ip", "-4", "route", "show", "table", "100") == ""
