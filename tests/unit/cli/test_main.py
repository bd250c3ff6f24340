"""The command as a user types it, against a real control socket; and how fast it starts."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import click
import pytest
import trio
from click.testing import CliRunner, Result

from tests.kit.views import CERTIFICATE, FAILING, LOST_POD, POD, PROBLEM, CannedView
from ztunnel.admin.api import ControlApi
from ztunnel.admin.listen import control_socket
from ztunnel.admin.views import Status, WorkloadRow
from ztunnel.cli.main import COMMANDS, LazyGroup, main
from ztunnel.lab import lifecycle
from ztunnel.lab.paths import agent_socket, lab_state_dir
from ztunnel.mesh.errors import ConfigError, LocalError
from ztunnel.runtime.documents import read_yaml
from ztunnel.runtime.http import HttpServer

HEAVY = ("trio", "pyroute2", "cryptography", "yaml", "prometheus_client", "OpenSSL", "msgspec", "dnslib", "hpack")


@contextmanager
def agent(path: Path, view: CannedView | None = None) -> Iterator[Callable[[], None]]:
    """A control API on its socket in a thread; gives the function that ends it."""
    shown = view or CannedView()
    started = threading.Event()
    stop: list[Callable[[], None]] = []

    async def serve() -> None:
        with control_socket(path) as listener, trio.CancelScope() as scope:
            token = trio.lowlevel.current_trio_token()
            stop.append(lambda: token.run_sync_soon(scope.cancel))
            async with trio.open_nursery() as nursery:
                await nursery.start(HttpServer(ControlApi(shown, shown.node).handle).run, [listener])
                started.set()

    thread = threading.Thread(target=trio.run, args=(serve,))
    thread.start()
    assert started.wait(10)
    try:
        yield stop[0]
    finally:
        # A test may have ended it: then its run is over, perhaps before its thread is.
        with suppress(trio.RunFinishedError):
            stop[0]()
        thread.join(10)


def yaml_of(text: str) -> object:
    return next(read_yaml(text.encode()))


def invoke(*arguments: str, environ: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(
        main, arguments, env={"ZTUNNEL_SOCKET": None, "ZTUNNEL_LAB": None, "ZTUNNEL_LAB_DIR": None, **(environ or {})}
    )


@pytest.fixture
def socket_path(tmp_path: Path) -> Iterator[str]:
    path = tmp_path / "agent.sock"
    with agent(path):
        yield str(path)


TABLES = {
    "connections": """
        POD DIRECTION PROTOCOL SOURCE DESTINATION TARGET SERVICE SENT RECEIVED AGE
        shop/cart-1 outbound HBONE 10.1.0.2:4000 10.96.0.1:80 10.1.1.2:8080 cart.shop.svc.cluster.local 5B 1.5KiB 3s
    """,
    "tunnels": """
        POD DIRECTION PEER PEER IDENTITY STREAMS SENT RECEIVED AGE
        shop/cart-1 outbound 10.1.1.2:15008 spiffe://cluster.local/ns/web/sa/web 2 10B 2.0KiB 1h6m
    """,
    "workloads": """
        NAMESPACE NAME ADDRESSES NODE PROTOCOL READY
        shop cart-1 10.1.0.2 node-1 HBONE yes
        web web-1 10.1.0.3 node-2 TCP no
    """,
    "services": """
        NAMESPACE NAME VIPS PORTS ENDPOINTS WAYPOINT
        shop cart 10.96.0.1 80→8080 1/2 none
    """,
    "policies": """
        NAMESPACE NAME KIND ACTION SCOPE RULES REASON
        shop deny AuthorizationPolicy DENY NAMESPACE 1 <none>
    """,
    "certificates": """
        IDENTITY STATE LEFT NOT AFTER SERIAL ERROR
        spiffe://cluster.local/ns/shop/sa/cart Valid 11h 2026-01-02T00:00:00Z 1f <none>
    """,
}


@pytest.mark.parametrize("command", TABLES)
def test_tables(socket_path: str, command: str) -> None:
    result = invoke(command, "--socket", socket_path)
    assert result.exit_code == 0, result.output
    assert [line.split() for line in result.stdout.splitlines()] == [line.split() for line in TABLES[command].strip().splitlines()]


def test_status_of_a_healthy_agent(socket_path: str) -> None:
    result = invoke("status", environ={"ZTUNNEL_SOCKET": socket_path})
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "NODE     READY   PODS   CONNECTIONS   TUNNELS   CERTIFICATES          WORKER    RESTARTS   AGE",
        "node-1   yes     1/1    1             1         1/1 valid, 11h left   running   0          1m1s",
        "",
        "NAMESPACE   POD      LABELLED   ENROLLED   CAPTURED   FLOWING   PROBLEM",
        "shop        cart-1   yes        yes        yes        yes       <none>",
        "",
        "1 node, 1 pod: all well",
    ]


def test_status_of_an_agent_with_problems(tmp_path: Path) -> None:
    view = CannedView(pods=(POD, LOST_POD), certificate_rows=(CERTIFICATE, FAILING), problems=(PROBLEM,), pending=("proxy",))
    with agent(tmp_path / "s", view):
        result = invoke("status", "--socket", str(tmp_path / "s"))
        assert result.exit_code == 1
        assert result.stdout.splitlines()[-5:] == [
            "4 problems:",
            "  node-1: not ready: waiting for proxy",
            "  node-1: manifest policy.yaml: AuthorizationPolicy shop/deny: spec.action: not one of ALLOW, DENY",
            "  node-1: certificate spiffe://cluster.local/ns/web/sa/web: unavailable: the authority is away",
            "  node-1: pod web/web-1: its rules are gone",
        ]
        assert invoke("status", "--socket", str(tmp_path / "s"), "-o", "json").exit_code == 1
        assert invoke("certificates", "--socket", str(tmp_path / "s")).exit_code == 1


def test_json_yaml_and_names(socket_path: str) -> None:
    answer = json.loads(invoke("services", "--socket", socket_path, "-o", "json").stdout)
    assert (answer["version"], answer["nodes"], answer["items"][0]["name"]) == (1, ["node-1"], "cart")
    assert yaml_of(invoke("services", "--socket", socket_path, "-o", "yaml").stdout) == answer
    assert invoke("services", "--socket", socket_path, "-o", "name").stdout == "service/shop/cart\n"
    status = json.loads(invoke("status", "--socket", socket_path, "-o", "json").stdout)
    assert status["items"][0]["items"][0]["captured"] is True
    assert yaml_of(invoke("status", "--socket", socket_path, "-o", "yaml").stdout) == status
    assert invoke("status", "--socket", socket_path, "-o", "name").stdout == "node/node-1\n"


def test_namespaces_and_headers(socket_path: str) -> None:
    assert invoke("workloads", "--socket", socket_path, "-n", "web", "--no-headers").stdout.split()[:2] == ["web", "web-1"]
    assert len(invoke("workloads", "--socket", socket_path, "-A").stdout.splitlines()) == 3
    nothing = invoke("connections", "--socket", socket_path, "-n", "none")
    assert (nothing.exit_code, nothing.stdout, nothing.stderr) == (0, "", "No connections in namespace none.\n")
    assert "IDENTITY" in invoke("workloads", "--socket", socket_path, "-o", "wide").stdout


def test_the_nodes_of_a_lab_are_laid_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "is_up", lambda state: True)
    environ = {"ZTUNNEL_LAB_DIR": str(tmp_path)}
    paths = [agent_socket(lab_state_dir("lab", environ), node) for node in ("node-1", "node-2")]
    with agent(paths[0]), agent(paths[1], CannedView(node="node-2")):
        tunnels = invoke("tunnels", "--lab", "lab", environ=environ).stdout.splitlines()
        assert [line.split()[0] for line in tunnels] == ["NODE", "node-1", "node-2"]
        services = invoke("services", "--lab", "lab", environ=environ).stdout.splitlines()
        assert len(services) == 2
        assert invoke("status", "--lab", "lab", environ=environ).stdout.endswith("2 nodes, 2 pods: all well\n")
        assert len(invoke("tunnels", "--lab", "lab", "--node", "node-2", environ=environ).stdout.splitlines()) == 2
        levels = invoke("log-level", "--lab", "lab", environ=environ).stdout
        assert [line.split(":")[0] for line in levels.splitlines()] == ["node-1", "node-2"]
    paths[1].touch()
    with agent(paths[0]):
        partly = invoke("tunnels", "--lab", "lab", environ=environ)
        assert partly.exit_code == 3
        assert "shop/cart-1" in partly.stdout
        assert "cannot reach the agent" in partly.stderr
        assert "start it again with `ztunnel lab agent start node-2 --name lab`" in partly.stderr
        status = invoke("status", "--lab", "lab", environ=environ)
        assert (status.exit_code, status.stdout.splitlines()[-1]) == (3, "1 node did not answer; 1 node, 1 pod without a problem")


def test_of_a_lab_that_was_killed_no_agent_can_be_started(tmp_path: Path) -> None:
    environ = {"ZTUNNEL_LAB_DIR": str(tmp_path)}
    path = agent_socket(lab_state_dir("big", environ), "node-1")
    path.parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    result = invoke("status", "--lab", "big", environ=environ)
    assert result.exit_code == 3
    assert "the lab big has ended, and its agents with it: `ztunnel lab down --name big` cleans up after it" in result.stderr


def test_the_labs_variable_names_a_lab_here_too_and_gives_way_to_what_is_typed(tmp_path: Path, socket_path: str) -> None:
    environ = {"ZTUNNEL_LAB_DIR": str(tmp_path), "ZTUNNEL_LAB": "big"}
    with agent(agent_socket(lab_state_dir("big", environ), "node-1"), CannedView(node="node-7")):
        assert invoke("log-level", environ=environ).stdout.startswith("node-7: ")
        assert invoke("log-level", "--socket", socket_path, environ=environ).stdout.startswith("node-1: ")
    assert "the lab big has no running agents" in invoke("log-level", environ=environ).stderr


def test_a_reader_that_has_seen_enough_is_no_problem_found(socket_path: str) -> None:
    command = [sys.executable, "-m", "ztunnel", "status", "--socket", socket_path]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, timeout=60, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


def test_a_watch_prints_changes_until_the_agent_ends(tmp_path: Path) -> None:
    class Changing(CannedView):
        asked = 0
        stop: Callable[[], None]

        def workloads(self) -> tuple[WorkloadRow, ...]:
            self.asked += 1
            if self.asked == 4:
                self.stop()
            first, second = super().workloads()
            return (first, replace(second, ready=self.asked > 2))

    view = Changing()
    with agent(tmp_path / "s", view) as stop:
        view.stop = stop
        result = invoke("workloads", "--socket", str(tmp_path / "s"), "-w", "--interval", "0.05")
    assert result.exit_code == 3
    assert [line.split()[1] for line in result.stdout.splitlines()] == ["NAME", "cart-1", "web-1", "web-1"]


def test_a_watched_status_is_printed_when_it_differs(tmp_path: Path) -> None:
    class Changing(CannedView):
        asked = 0
        stop: Callable[[], None]

        def status(self) -> Status:
            self.asked += 1
            if self.asked == 4:
                self.stop()
            return replace(super().status(), ready=self.asked > 2)

    view = Changing()
    with agent(tmp_path / "s", view) as stop:
        view.stop = stop
        result = invoke("status", "--socket", str(tmp_path / "s"), "-w", "--interval", "0.05")
    assert result.exit_code == 3
    assert result.stdout.count("NODE ") == 2


def test_usage_errors_are_exit_code_2(socket_path: str) -> None:
    for arguments in (
        ("status", "-o", "xml"),
        ("status", "-A", "-n", "x", "--socket", socket_path),
        ("status", "--socket", socket_path, "--lab", "lab"),
        ("completion", "tcsh"),
        ("run",),
    ):
        assert invoke(*arguments).exit_code == 2
    mistake = invoke("statsu")
    assert mistake.exit_code == 2
    assert "Did you mean 'status'?" in mistake.stderr
    assert "Did you mean" not in invoke("qqqq").stderr


def test_an_agent_that_is_not_there_is_exit_code_3(tmp_path: Path) -> None:
    result = invoke("status", "--socket", str(tmp_path / "none"))
    assert result.exit_code == 3
    assert "there is no such socket" in result.stderr
    assert "Traceback" not in result.output


def test_an_explicit_lab_wins_over_a_socket_in_the_environment(socket_path: str, tmp_path: Path) -> None:
    result = invoke("status", "--lab", "none", environ={"ZTUNNEL_SOCKET": socket_path, "ZTUNNEL_LAB_DIR": str(tmp_path)})
    assert result.exit_code == 3
    assert "the lab none" in result.stderr


def test_colours_only_on_a_terminal_and_never_with_no_color(socket_path: str) -> None:
    def output(**environ: str) -> str:
        return CliRunner().invoke(main, ["status", "--socket", socket_path], env=environ, color=True).stdout

    assert "\x1b[" in output()
    assert "\x1b[" not in output(NO_COLOR="1")
    assert "\x1b[" not in invoke("status", "--socket", socket_path).stdout


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "lab"])
def test_every_command_has_help_with_examples(name: str) -> None:
    result = invoke(name, "--help")
    assert result.exit_code == 0
    assert "Examples:" in result.stdout
    assert f"ztunnel {name}" in result.stdout


def test_the_list_of_commands_imports_none_of_them() -> None:
    result = invoke("--help")
    assert all(f"  {name} " in result.stdout for name in COMMANDS)
    assert invoke("-h").stdout == result.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    result = invoke("completion", shell)
    assert result.exit_code == 0
    assert "_ZTUNNEL_COMPLETE" in result.stdout


def test_completion_offers_commands() -> None:
    environ = {"_ZTUNNEL_COMPLETE": "bash_complete", "COMP_WORDS": "ztunnel cert", "COMP_CWORD": "1"}
    command = [sys.executable, "-m", "ztunnel"]
    ended = subprocess.run(command, check=False, env={**os.environ, **environ}, capture_output=True, text=True, timeout=60)
    assert ended.stdout.strip() == "plain,certificates"


def test_version() -> None:
    assert invoke("version").stdout.startswith("ztunnel 0")


def test_run_takes_its_node_from_where_a_pod_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "agent.yaml"
    file.write_text("sources: {kubernetes: true}\n")
    monkeypatch.setenv("NODE_NAME", "node-7")
    assert "for node node-7" in invoke("run", "--config", str(file), "--check").stdout
    assert "for node node-8" in invoke("run", "--config", str(file), "--check", "--node-name", "node-8").stdout
    file.write_text("node: node-9\nsources: {kubernetes: true}\n")
    assert "for node node-9" in invoke("run", "--config", str(file), "--check").stdout


def test_run_checks_its_settings(tmp_path: Path) -> None:
    file = tmp_path / "agent.yaml"
    file.write_text("node: node-1\nsources: {files: /etc/mesh}\n")
    result = invoke("run", "--config", str(file), "--check", "--ca-dir", "/ca", "--log-level", "debug")
    assert (result.exit_code, result.stdout) == (0, f"{file}: fine, for node node-1\n")
    for content, expected in {
        b"nod: x\n": "Error: nod: no such setting; did you mean node?\nError: node: required\n",
        b"node: x\n": "Error: sources: files or kubernetes: true is required\n",
        b"node: x\nsources: {kubernetes: true, files: /x}\n": "required, not both",
        b"node: x\nsources: {kubeconfig: /x, files: /x}\n": "sources.kubeconfig: wants sources.kubernetes: true",
        b"- x\n": "a mapping of settings is expected",
        b"a: [\n": "line 2:",
        b"a: 1\n---\nb: 1\n": "2 documents; one is expected",
        b"": "node: required",
        b"---\n": "node: required",
        b"#" * (1 << 21): "larger than",
    }.items():
        file.write_bytes(content)
        result = invoke("run", "--config", str(file))
        assert result.exit_code == 2
        assert expected in result.stderr
    assert "No such file" in invoke("run", "--config", str(tmp_path / "none")).stderr


@pytest.mark.parametrize(
    ("raised", "exit_code", "stderr"),
    [
        (LocalError("the port is taken"), 1, "Error: the port is taken\n"),
        (ExceptionGroup("tasks", [ExceptionGroup("x", [LocalError("a")]), LocalError("b")]), 1, "Error: a\nError: b\n"),
        (ExceptionGroup("tasks", [ConfigError(["a: wrong", "b: wrong"])]), 2, "Error: a: wrong; b: wrong\n"),
    ],
)
def test_errors_of_ours_are_sentences(raised: Exception, exit_code: int, stderr: str) -> None:
    result = CliRunner().invoke(failing(raised), ["status"])
    assert (result.exit_code, result.stderr) == (exit_code, stderr)


def test_bugs_keep_their_traceback() -> None:
    group = ExceptionGroup("tasks", [LocalError("a"), KeyError("b")])
    assert CliRunner().invoke(failing(group), ["status"]).exception is group


def failing(error: Exception) -> LazyGroup:
    class Group(LazyGroup):
        def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
            def fail() -> None:
                raise error

            return click.Command(cmd_name, callback=fail)

    return Group("ztunnel")


@pytest.mark.parametrize("arguments", [["--help"], ["status", "--socket", "/nonexistent"], ["version"]])
def test_the_command_starts_without_the_heavy_libraries(arguments: list[str]) -> None:
    script = (
        "import sys, atexit; sys.argv = ['ztunnel', *sys.argv[1:]]\n"
        f"atexit.register(lambda: print('heavy:', [name for name in {HEAVY!r} if name in sys.modules]))\n"
        "from ztunnel.cli.main import main; main(prog_name='ztunnel')"
    )
    ended = subprocess.run([sys.executable, "-c", script, *arguments], check=False, capture_output=True, text=True, timeout=60)
    assert ended.stdout.rstrip().endswith("heavy: []"), ended
