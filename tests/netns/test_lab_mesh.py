"""The lab with node agents: what the samples' README promises, capture at run time, and agents that are stopped, killed and come back."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from tests.kit import labs
from tests.kit.labs import SAMPLES, Lab
from tests.kit.mesh import children_of
from tests.kit.polling import eventually
from tests.kit.workers import worker_count
from ztunnel.lab.objects import REDIRECTION
from ztunnel.mesh.manifests.tree import branches, flag, integer, text

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """The samples, meshed."""
    with labs.up(SAMPLES) as found:
        yield found


def test_the_pods_that_ask_for_it_are_captured(lab: Lab) -> None:
    captured = {
        text(pod, "metadata", "name")
        for pod in lab.list("pods", "")
        if lab.annotation(text(pod, "metadata", "name"), REDIRECTION, text(pod, "metadata", "namespace"))
    }
    assert captured == {text(pod, "metadata", "name") for pod in lab.list("pods", "shop")}


def test_the_environment_says_how_many_workers_the_agents_have(lab: Lab) -> None:
    assert len(children_of(lab.agent_pid("node-1"))) == worker_count()


def test_the_readme_of_the_samples_is_true(lab: Lab) -> None:
    told = lab.curl("client", "http://orders/", namespace="shop").json()
    assert told["remote_address"] == lab.address("client", "shop")
    assert lab.curl("intruder", "http://orders/", namespace="shop").code != 0
    assert lab.curl("client", "http://catalog:8080/", namespace="shop").code == 0
    assert lab.curl("intruder", "http://catalog:8080/", namespace="shop").code != 0
    assert lab.curl("visitor", "http://catalog.shop:8080/", namespace="outside").code == 0
    assert lab.curl("visitor", "http://orders.shop/", namespace="outside").code != 0
    lab.apply(SAMPLES / "strict")
    eventually(lambda: lab.curl("visitor", "http://catalog.shop:8080/", namespace="outside").code != 0)
    lab.label("namespace", "outside", {"istio.io/dataplane-mode": "ambient"})
    lab.settle()
    assert lab.annotation("visitor", REDIRECTION, "outside") == "enabled"
    eventually(lambda: lab.curl("visitor", "http://catalog.shop:8080/", namespace="outside").code == 0)
    lab.label("namespace", "outside", {"istio.io/dataplane-mode": None})
    lab.settle()
    assert lab.annotation("visitor", REDIRECTION, "outside") == ""
    lab.delete("peerauthentication", "default", "shop")


def test_a_stopped_agent_stays_stopped_and_a_killed_process_comes_back(lab: Lab) -> None:
    lab.agent("kill", "node-1")
    stopped = next(agent for agent in branches(lab.status(), "agents") if text(agent, "node") == "node-1")
    assert not flag(stopped, "running")
    assert lab.curl("client", "http://orders/", namespace="shop").code != 0
    lab.agent("start", "node-1")
    lab.settle()
    eventually(lambda: lab.curl("client", "http://orders/", namespace="shop").code == 0)
    before = lab.agent_pid("node-2")
    os.kill(before, signal.SIGKILL)
    eventually(lambda: lab.agent_pid("node-2") not in (0, before))
    lab.settle()
    starts = next(integer(agent, "starts") for agent in branches(lab.status(), "agents") if text(agent, "node") == "node-2")
    assert starts == 2
    eventually(lambda: lab.curl("client", "http://orders/", namespace="shop").code == 0)


def test_logs_of_agents_and_commands_on_the_fabric(lab: Lab) -> None:
    assert "ready" in lab.run("logs", "node-1").stdout
    assert lab.run("logs", "node/node-1").stdout == lab.run("logs", "node-1").stdout
    assert "br0" in lab.exec("fabric", "ip", "link").stdout
    for name in ("node-1", "node/node-1"):
        assert lab.exec(name, "printenv", "NODE_NAME").stdout == "node-1\n"
    assert lab.run("exec", "node/node-9", "--", "true").stderr == 'Error from server (NotFound): nodes "node-9" not found\n'
    assert lab.run("status").code == 0
