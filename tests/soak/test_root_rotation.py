"""A root is replaced under traffic: new tunnels all the time, and not one that fails."""

from __future__ import annotations

import time
from contextlib import ExitStack

import pytest
from cryptography import x509

from tests.kit import apps
from tests.kit.authorities import agents_as_pods, replica, tell
from tests.kit.mesh import DEFAULT_SETTINGS, Mesh
from tests.kit.polling import eventually

APP = 8080
LEAF_HOURS = 0.01
"""36 seconds, the least that the authority gives; renewed after 18. The next root signs after as long."""
SECONDS = 300.0


@pytest.mark.long
def test_a_new_root_costs_no_connection() -> None:
    with ExitStack() as stack:
        mesh = stack.enter_context(Mesh(nodes=2, start=False, settings=f"{DEFAULT_SETTINGS}tunnel: {{idle_seconds: 1}}\n"))
        agents_as_pods(mesh)
        short = {"leaf_hours": LEAF_HOURS, "root": {"spread_hours": LEAF_HOURS}}
        for number in range(2):
            replica(mesh, stack, number, **short)
        client = mesh.pod("client", node=0, ambient=True)
        server = mesh.pod("server", node=1, ambient=True)
        tell(mesh)
        bundle = mesh.root / "roots.pem"
        eventually(bundle.exists, within=SECONDS)
        mesh.start()
        mesh.settle()
        (old,) = x509.load_pem_x509_certificates(bundle.read_bytes())
        (mesh.root / "authority" / "rotate").write_text("please")
        before = {row["serial"] for agent in mesh.agents for row in agent.rows("certificates")}
        tunnels: set[object] = set()
        calls, since = 0, None
        until = time.monotonic() + SECONDS
        with apps.Echo(server, APP), client.connect((server.v4, APP)) as lasting:
            # On until both sides have had certificates of the new root for a while.
            while since is None or time.monotonic() - since < 2 * LEAF_HOURS * 3600:
                assert time.monotonic() < until, "the new root never signed"
                assert apps.call(client, (server.v4, APP)) == b"hello", f"after {calls} calls\n{mesh.agents[0].log[-2000:]}"
                calls += 1
                tunnels |= {row["id"] for row in mesh.agents[0].rows("tunnels")}
                # Long enough for the tunnel to be closed, so that the next call makes another.
                time.sleep(1.3)
                signing = x509.load_pem_x509_certificates(bundle.read_bytes())[0]
                if since is None and signing != old:
                    since = time.monotonic()
            assert apps.ping(lasting)
        after = {row["serial"] for agent in mesh.agents for row in agent.rows("certificates")}
        assert not before & after
        assert len(tunnels) > 20
        assert [agent.problems for agent in mesh.agents] == [[], []]
