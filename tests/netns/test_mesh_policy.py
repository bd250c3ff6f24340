"""Authorization and peer authentication, from the manifest to the connection: who gets through, and what an operator is told."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import pytest

from tests.kit import apps
from tests.kit.mesh import Json, Mesh
from tests.kit.polling import eventually
from tests.kit.traffic import accept, talk

APP, OTHER = 8080, 8081
FAMILIES = pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["ipv4", "ipv6"])


@pytest.fixture(scope="module")
def shared() -> Iterator[Mesh]:
    with Mesh(nodes=2) as mesh:
        mesh.namespace("elsewhere")
        mesh.pod("client", node=0, ambient=True)
        mesh.pod("friend", node=0, ambient=True)
        mesh.pod("foreigner", node=0, ambient=True, namespace="elsewhere")
        mesh.pod("outsider", node=0)
        mesh.pod("server", node=1, ambient=True)
        mesh.pod("other", node=1, ambient=True)
        mesh.settle()
        with apps.Echo(mesh.pods["server"], APP), apps.Echo(mesh.pods["server"], OTHER), apps.Echo(mesh.pods["other"], APP):
            yield mesh


@pytest.fixture
def mesh(shared: Mesh) -> Iterator[Mesh]:
    yield shared
    shared.clear("AuthorizationPolicy", "PeerAuthentication")
    (shared.manifests / "bad.yaml").unlink(missing_ok=True)
    shared.settle()
    eventually(lambda: not any(agent.rows("policies") for agent in shared.agents))
    shared.check()


def result(mesh: Mesh, client: str, server: str = "server", port: int = APP, family: int = socket.AF_INET) -> str:
    return apps.outcome(mesh.pods[client], (mesh.pods[server].address(family), port))


def allow(mesh: Mesh, source: Json, name: str = "allow", **scope: object) -> None:
    mesh.policy(name, {"action": "ALLOW", "rules": [{"from": [{"source": source}]}], **scope})
    mesh.settle()


# ALLOW and DENY


@pytest.mark.parametrize(
    "source",
    [
        {"principals": ["cluster.local/ns/default/sa/client"]},
        {"principals": ["*/sa/client"]},
        {"serviceAccounts": ["client"]},
        {"serviceAccounts": ["default/client"]},
        {"namespaces": ["default"], "notPrincipals": ["cluster.local/ns/default/sa/friend"]},
    ],
    ids=["principal", "principal-suffix", "account", "account-with-namespace", "namespace-but-not"],
)
def test_allow_lets_in_whom_it_names_and_nobody_else(mesh: Mesh, source: Json) -> None:
    allow(mesh, source)
    assert result(mesh, "client") == "echoed"
    for each in ("friend", "foreigner", "outsider"):
        assert result(mesh, each) == "reset", each


def test_allow_by_namespace(mesh: Mesh) -> None:
    allow(mesh, {"namespaces": ["else*"]})
    assert result(mesh, "foreigner") == "echoed"
    assert result(mesh, "client") == "reset"


@FAMILIES
def test_deny_by_address_block(mesh: Mesh, family: int) -> None:
    client = mesh.pods["client"].address(family)
    mesh.policy("no-client", {"action": "DENY", "rules": [{"from": [{"source": {"ipBlocks": [client]}}]}]})
    mesh.settle()
    assert result(mesh, "client", family=family) == "reset"
    assert result(mesh, "friend", family=family) == "echoed"


def test_deny_by_port(mesh: Mesh) -> None:
    mesh.policy("no-8081", {"action": "DENY", "rules": [{"to": [{"operation": {"ports": [str(OTHER)]}}]}]})
    mesh.settle()
    assert result(mesh, "client", port=OTHER) == "reset"
    assert result(mesh, "outsider", port=OTHER) == "reset"
    assert result(mesh, "client") == "echoed"
    assert result(mesh, "outsider") == "echoed"


def test_deny_wins_over_allow(mesh: Mesh) -> None:
    mesh.policy("no-client", {"action": "DENY", "rules": [{"from": [{"source": {"serviceAccounts": ["client"]}}]}]})
    allow(mesh, {"namespaces": ["default"]})
    assert result(mesh, "client") == "reset"
    assert result(mesh, "friend") == "echoed"


def test_a_policy_without_rules_lets_nobody_in(mesh: Mesh) -> None:
    mesh.policy("nobody", {})
    mesh.settle()
    assert {result(mesh, each) for each in ("client", "friend", "outsider")} == {"reset"}


def test_a_denied_peer_sees_a_reset_and_the_operator_the_policys_name(mesh: Mesh) -> None:
    mesh.policy("keep-out", {"action": "DENY", "rules": [{"from": [{"source": {"serviceAccounts": ["client"]}}]}]})
    mesh.settle()
    assert result(mesh, "client") == "reset"
    eventually(lambda: mesh.agents[1].said("direction=inbound", "flag=DENY", "AuthorizationPolicy default/keep-out"))
    eventually(lambda: mesh.agents[0].said("direction=outbound", "http status 401"))
    assert not mesh.agents[0].said("keep-out"), "peers do not learn policies' names"
    assert mesh.agents[1].metric("istio_tcp_connections_failed_total", response_flags="DENY") >= 1


# Scopes


def test_a_policy_of_the_root_namespace_is_the_whole_meshs(mesh: Mesh) -> None:
    mesh.policy(
        "no-client",
        {"action": "DENY", "rules": [{"from": [{"source": {"serviceAccounts": ["default/client"]}}]}]},
        namespace="istio-system",
    )
    mesh.settle()
    assert result(mesh, "client") == "reset"
    assert result(mesh, "client", "other") == "reset"
    assert result(mesh, "friend") == "echoed"


def test_a_policy_of_a_namespace_stays_there(mesh: Mesh) -> None:
    mesh.policy("nobody", {}, namespace="elsewhere")
    mesh.settle()
    assert result(mesh, "client") == "echoed"
    with apps.Echo(mesh.pods["foreigner"], APP):
        assert result(mesh, "client", "foreigner") == "reset"


def test_a_selector_picks_pods(mesh: Mesh) -> None:
    mesh.policy("nobody", {"selector": {"matchLabels": {"app": "server"}}})
    mesh.settle()
    assert result(mesh, "client") == "reset"
    assert result(mesh, "client", "other") == "echoed"


def test_a_label_brings_a_pod_under_a_selector_and_ends_its_connections(mesh: Mesh) -> None:
    mesh.policy("nobody", {"selector": {"matchLabels": {"tier": "closed"}}})
    mesh.settle()
    client, other = mesh.pods["client"], mesh.pods["other"]
    with client.connect((other.v4, APP)) as live:
        assert apps.ping(live)
        mesh.relabel("other", "tier", "closed")
        eventually(lambda: result(mesh, "client", "other") == "reset")
        assert apps.ending(live) == "reset"
    mesh.relabel("other", "tier", None)
    eventually(lambda: result(mesh, "client", "other") == "echoed")


# Change


@FAMILIES
def test_a_change_ends_the_live_connections_that_are_now_denied_and_no_other(mesh: Mesh, family: int) -> None:
    server, other = mesh.pods["server"], mesh.pods["other"]
    client, friend, outsider = (mesh.pods[each] for each in ("client", "friend", "outsider"))
    to, elsewhere = (server.address(family), APP), (other.address(family), APP)
    with (
        client.connect(to) as denied,
        friend.connect(to) as allowed,
        outsider.connect(to) as plain,
        client.connect(elsewhere) as untouched,
        client.connect((server.address(family), OTHER)) as same_tunnel,
    ):
        assert all(apps.ping(each) for each in (denied, allowed, plain, untouched, same_tunnel))
        rule = {
            "from": [{"source": {"serviceAccounts": ["client"]}}],
            "to": [{"operation": {"ports": [str(APP)]}}],
        }
        mesh.policy("turn-out", {"action": "DENY", "selector": {"matchLabels": {"app": "server"}}, "rules": [rule]})
        assert apps.ending(denied) == "reset"
        mesh.settle()
        assert all(apps.ping(each) for each in (allowed, plain, untouched, same_tunnel))
    eventually(lambda: mesh.agents[1].said("closed due to policy change", "flag=DENY", "default/turn-out"))


def test_plaintext_connections_are_judged_again_as_well(mesh: Mesh) -> None:
    with mesh.pods["outsider"].connect((mesh.pods["server"].v4, APP)) as live:
        assert apps.ping(live)
        allow(mesh, {"namespaces": ["default"]})
        assert apps.ending(live) == "reset"


def test_a_policy_that_goes_away_opens_the_door_again(mesh: Mesh) -> None:
    mesh.policy("nobody", {})
    mesh.settle()
    assert result(mesh, "client") == "reset"
    mesh.clear("AuthorizationPolicy")
    mesh.settle()
    assert result(mesh, "client") == "echoed"


# Peer authentication


def authenticate(mesh: Mesh, spec: Json, name: str = "default", namespace: str = "default") -> None:
    mesh.policy(name, spec, "PeerAuthentication", namespace)


@FAMILIES
def test_strict_refuses_plaintext_and_says_so(mesh: Mesh, family: int) -> None:
    authenticate(mesh, {"mtls": {"mode": "STRICT"}})
    eventually(lambda: result(mesh, "outsider", family=family) == "reset")
    assert result(mesh, "client", family=family) == "echoed"
    eventually(lambda: mesh.agents[1].said("direction=inbound", "flag=DENY", mesh.pods["outsider"].address(family)))


def test_strict_ends_a_live_plaintext_connection(mesh: Mesh) -> None:
    with (
        mesh.pods["outsider"].connect((mesh.pods["server"].v4, APP)) as plain,
        mesh.pods["client"].connect((mesh.pods["server"].v4, APP)) as good,
    ):
        assert apps.ping(plain)
        assert apps.ping(good)
        authenticate(mesh, {"mtls": {"mode": "STRICT"}})
        assert apps.ending(plain) == "reset"
        assert apps.ping(good)


def test_permissive_for_a_pod_under_a_strict_mesh(mesh: Mesh) -> None:
    authenticate(mesh, {"mtls": {"mode": "STRICT"}}, namespace="istio-system")
    authenticate(mesh, {"selector": {"matchLabels": {"app": "other"}}, "mtls": {"mode": "PERMISSIVE"}}, "other")
    eventually(lambda: result(mesh, "outsider") == "reset")
    assert result(mesh, "outsider", "other") == "echoed"


def test_one_port_may_be_an_exception(mesh: Mesh) -> None:
    authenticate(
        mesh,
        {
            "selector": {"matchLabels": {"app": "server"}},
            "mtls": {"mode": "STRICT"},
            "portLevelMtls": {str(OTHER): {"mode": "PERMISSIVE"}},
        },
        "server",
    )
    eventually(lambda: result(mesh, "outsider") == "reset")
    assert result(mesh, "outsider", port=OTHER) == "echoed"
    assert result(mesh, "outsider", "other") == "echoed"


def test_one_port_may_be_strict(mesh: Mesh) -> None:
    authenticate(
        mesh,
        {
            "selector": {"matchLabels": {"app": "server"}},
            "mtls": {"mode": "PERMISSIVE"},
            "portLevelMtls": {str(OTHER): {"mode": "STRICT"}},
        },
        "server",
    )
    eventually(lambda: result(mesh, "outsider", port=OTHER) == "reset")
    assert result(mesh, "outsider") == "echoed"
    assert result(mesh, "client", port=OTHER) == "echoed"


# Documents that cannot be used


def spoil(mesh: Mesh, spec: object, name: str = "bad") -> None:
    """Writes a policy past the kit, which would wait for it to come into force as written."""
    metadata = {"name": name, "namespace": "default"}
    document = {"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": metadata, "spec": spec}
    (mesh.manifests / "bad.yaml").write_text(json.dumps(document))


def test_a_bad_policy_without_an_earlier_version_denies_and_says_why(mesh: Mesh) -> None:
    spoil(
        mesh,
        {
            "selector": {"matchLabels": {"app": "server"}},
            "action": "ALLOW",
            "rules": [{"from": [{"source": {"ipBlocks": ["10.0.0.300"]}}]}],
        },
    )
    eventually(lambda: all(any("bad" in each and "10.0.0.300" in each for each in agent.problems) for agent in mesh.agents))
    for agent in mesh.agents:
        assert agent.metric("ztunnel_refused_manifests") == 1
    eventually(lambda: result(mesh, "client") == "reset")
    assert result(mesh, "client", "other") == "echoed"
    assert any(row["name"] == "bad" and row["reason"] for row in mesh.agents[1].rows("policies"))
    eventually(lambda: mesh.agents[1].said("flag=DENY", "default/bad"))


def test_a_policy_that_turns_bad_stays_as_it_was(mesh: Mesh) -> None:
    good = {
        "selector": {"matchLabels": {"app": "server"}},
        "action": "ALLOW",
        "rules": [{"from": [{"source": {"serviceAccounts": ["client"]}}]}],
    }
    spoil(mesh, good)
    eventually(lambda: result(mesh, "friend") == "reset")
    assert result(mesh, "client") == "echoed"
    with mesh.pods["client"].connect((mesh.pods["server"].v4, APP)) as live:
        assert apps.ping(live)
        spoil(mesh, {**good, "action": "AUDIENCE"})
        eventually(lambda: any("AUDIENCE" in problem for problem in mesh.agents[1].problems))
        assert result(mesh, "client") == "echoed"
        assert result(mesh, "friend") == "reset"
        assert apps.ping(live)
    spoil(mesh, {**good, "rules": [{"from": [{"source": {"serviceAccounts": ["friend"]}}]}]})
    eventually(lambda: result(mesh, "friend") == "echoed")
    assert result(mesh, "client") == "reset"
    eventually(lambda: not mesh.agents[1].problems)


def test_a_file_that_is_no_yaml_changes_nothing(mesh: Mesh) -> None:
    with mesh.pods["client"].connect((mesh.pods["server"].v4, APP)) as live:
        assert apps.ping(live)
        (mesh.manifests / "bad.yaml").write_text("kind: [unfinished")
        eventually(lambda: any("bad.yaml" in problem for problem in mesh.agents[1].problems))
        assert apps.ping(live)
    assert result(mesh, "client") == "echoed"


def test_talk_goes_on_while_policies_churn(mesh: Mesh) -> None:
    client, server = mesh.pods["client"], mesh.pods["server"]
    with server.listener(9000) as listening, client.connect((server.v4, 9000)) as near, accept(listening) as far:
        for number in range(5):
            mesh.policy(f"churn-{number}", {"action": "DENY", "rules": [{"to": [{"operation": {"ports": [str(7000 + number)]}}]}]})
            talk(near, far)
        mesh.settle()
        talk(near, far)
