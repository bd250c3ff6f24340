"""Certificates that are renewed all the time, run out, or are nobody's: what connections see of it."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from tests.kit import apps
from tests.kit.mesh import DEFAULT_SETTINGS, TRUST_DOMAIN, Agent, Mesh
from tests.kit.netns import Pod
from tests.kit.polling import eventually
from ztunnel.ca.root import key_usage
from ztunnel.mesh.ports import INBOUND_HBONE

APP = 8080
LEAF_HOURS = 0.0015
"""5.4 seconds: renewed after 2.7, give or take."""
RENEWALS = 2
SHORT_IDLE = f"{DEFAULT_SETTINGS}tunnel: {{idle_seconds: 1}}\n"


def serials(agent: Agent) -> set[object]:
    return {row["serial"] for row in agent.rows("certificates") if row["state"] == "Valid"}


def test_certificates_are_renewed_under_traffic_without_one_failure() -> None:
    with Mesh(nodes=2, leaf_hours=LEAF_HOURS) as mesh:
        client = mesh.pod("client", node=0, ambient=True)
        server = mesh.pod("server", node=1, ambient=True)
        mesh.settle()
        seen: list[set[object]] = [serials(agent) for agent in mesh.agents]
        tunnels: set[object] = set()
        connections = 0
        with apps.Echo(server, APP), client.connect((server.v4, APP)) as old:
            until = time.monotonic() + 25
            while min(len(each) for each in seen) <= RENEWALS or len(tunnels) <= RENEWALS:
                assert time.monotonic() < until, f"not renewed {RENEWALS} times: {seen}, tunnels {tunnels}"
                for _ in range(20):
                    assert apps.call(client, (server.v4, APP)) == b"hello"
                    connections += 1
                assert apps.ping(old), "a connection outlives the certificates that it began with"
                seen = [each | serials(agent) for agent, each in zip(mesh.agents, seen, strict=True)]
                tunnels |= {row["id"] for row in mesh.agents[0].rows("tunnels")}
        assert connections > 100
        assert [agent.ask("status")["worker_restarts"] for agent in mesh.agents] == [0, 0]
        assert [agent.problems for agent in mesh.agents] == [[], []]


def test_a_certificate_that_runs_out_ends_new_connections_with_the_reason_and_is_a_problem() -> None:
    """The authority's own certificate runs out, so that nothing can be renewed."""
    with Mesh(nodes=2, start=False) as mesh:
        _write_root(mesh.root / "ca", seconds=12)
        client = mesh.pod("client", node=0, ambient=True)
        server = mesh.pod("server", node=1, ambient=True)
        mesh.start()
        mesh.settle()
        agent = mesh.agents[0]
        identity = str(mesh.identity("client"))
        with apps.Echo(server, APP):
            assert apps.outcome(client, (server.v4, APP)) == "echoed"
            eventually(lambda: apps.outcome(client, (server.v4, APP)) == "reset", within=20)
            reason = ("connection complete", f"no valid certificate for {identity}", "flag=IDENTITY_ERROR")
            # The first ones may end on the server's side, whose certificate runs out at the same second.
            eventually(lambda: apps.outcome(client, (server.v4, APP)) == "reset" and agent.said(*reason))
        eventually(lambda: {row["state"] for each in mesh.agents for row in each.rows("certificates")} == {"Unavailable"})
        assert any(identity in problem and "the root certificate expired" in problem for problem in agent.problems)
        assert agent.metric("ztunnel_certificates_expiry_seconds", identity=identity) < 0
        _refuses_a_peer(mesh, server)


def _refuses_a_peer(mesh: Mesh, server: Pod) -> None:
    """Without a certificate of its own a pod takes no tunnel either."""
    with apps.connected(server, (server.v4, INBOUND_HBONE)) as sock:
        assert apps.ending(sock) == "reset"
    eventually(lambda: mesh.agents[1].said("direction=inbound", "no valid certificate"))


def _write_root(directory: Path, seconds: float) -> None:
    """A root as the embedded authority makes it, but for a short life."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a root in its last seconds")])
    now = time.time()
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.fromtimestamp(now - 3600, UTC))
        .not_valid_after(datetime.fromtimestamp(now + seconds, UTC))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"spiffe://{TRUST_DOMAIN}")]), critical=False)
        .sign(key, SHA256())
    )
    directory.mkdir(mode=0o700)
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    for file, content in (("root-key.pem", secret), ("root-cert.pem", certificate.public_bytes(Encoding.PEM))):
        (directory / file).touch(mode=0o600)
        (directory / file).write_bytes(content)


def test_nodes_of_different_roots_do_not_talk() -> None:
    with Mesh(nodes=2, start=False) as mesh:
        other = mesh.agents[1].directory / "agent.yaml"
        other.write_text(other.read_text().replace(str(mesh.root / "ca"), str(mesh.root / "another-ca")))
        client = mesh.pod("client", node=0, ambient=True)
        server = mesh.pod("server", node=1, ambient=True)
        mesh.start()
        mesh.settle()
        with apps.Echo(server, APP) as echo:
            assert apps.outcome(client, (server.v4, APP)) == "reset"
            assert echo.peers == []
        eventually(lambda: mesh.agents[0].said("connection complete", "its issuer is not among our roots"))


def test_a_workload_with_the_wrong_identity_at_the_right_address_is_not_talked_to() -> None:
    """The client's node believes that the server runs as somebody else."""
    with Mesh(nodes=2, start=False) as mesh:
        lie = mesh.root / "lies"
        lie.mkdir()
        believer = mesh.agents[0].directory / "agent.yaml"
        believer.write_text(believer.read_text().replace(str(mesh.manifests), str(lie)))
        client = mesh.pod("client", node=0, ambient=True)
        server = mesh.pod("server", node=1, ambient=True)
        mesh.agents[1].start()
        mesh.agents[1].await_ready()
        eventually(lambda: _copied(mesh, lie))
        mesh.agents[0].start()
        mesh.agents[0].await_ready()
        with apps.Echo(server, APP) as echo:
            assert apps.outcome(client, (server.v4, APP)) == "reset"
            assert echo.peers == []
        wanted, found = "sa/impostor", "sa/server"
        eventually(lambda: mesh.agents[0].said("connection complete", "flag=IDENTITY_ERROR", wanted, found))


def _copied(mesh: Mesh, lie: Path) -> bool:
    """Copies the manifests once the server is annotated as captured; in the copy it has another service account."""
    mesh.annotate()
    if not mesh.agents[1].row(mesh.pods["server"]).get("captured"):
        return False
    text = {file.name: file.read_text() for file in mesh.manifests.glob("*.json")}
    if "enabled" not in text["Pod-default-server.json"]:
        return False
    text["Pod-default-server.json"] = text["Pod-default-server.json"].replace(
        '"serviceAccountName": "server"', '"serviceAccountName": "impostor"'
    )
    for name, content in text.items():
        (lie / name).write_text(content)
    return True


@pytest.mark.parametrize("life", ["0.0005", "10000"])
def test_lives_of_certificates_that_make_no_sense_are_refused(life: str) -> None:
    with Mesh(nodes=1, start=False) as mesh:
        agent = mesh.agents[0]
        config = agent.directory / "agent.yaml"
        config.write_text(config.read_text().replace("leaf_hours: 24", f"leaf_hours: {life}"))
        agent.start()
        assert agent.wait() == 2
        assert agent.said("ca.leaf_hours", "is expected")
