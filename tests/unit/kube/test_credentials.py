"""Programs that give credentials, and what they print."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trio
import trio.testing

from ztunnel.kube import credentials
from ztunnel.kube.credentials import BadCredentials, Files, Login, Plugin

VERSION = "client.authentication.k8s.io/v1"
MakePlugin = Callable[[str], Plugin]


@pytest.fixture
def plugin(tmp_path: Path) -> MakePlugin:
    """One that runs a shell script."""

    def make(script: str) -> Plugin:
        file = tmp_path / "plugin"
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)
        return Plugin(str(file), environment={"GREETING": "hello"}, cluster={"server": "https://x"}, hint="get it at X")

    return make


def printed(**status: object) -> str:
    return f"cat <<'EOF'\n{json.dumps({'apiVersion': VERSION, 'kind': 'ExecCredential', 'status': status})}\nEOF"


def test_its_token_is_kept_until_it_ends_or_is_refused(plugin: MakePlugin, tmp_path: Path) -> None:
    later = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    made = plugin(f'echo "$KUBERNETES_EXEC_INFO $GREETING" >>{tmp_path}/asked\n{printed(token="t", expirationTimestamp=later)}')

    async def run() -> None:
        for _ in range(3):
            assert await made.login() == Login("Bearer t")
        made.refused()
        await made.login()

    trio.run(run)
    lines = (tmp_path / "asked").read_text().splitlines()
    assert len(lines) == 2
    told, _, greeting = lines[0].rpartition(" ")
    assert json.loads(told)["spec"] == {"interactive": False, "cluster": {"server": "https://x"}}
    assert greeting == "hello"


def test_an_answer_that_has_ended_is_asked_for_again(plugin: MakePlugin, tmp_path: Path) -> None:
    past = (datetime.now(UTC) - timedelta(hours=1)).isoformat()
    made = plugin(f"echo x >>{tmp_path}/asked\n{printed(clientCertificateData='c', clientKeyData='k', expirationTimestamp=past)}")

    async def run() -> None:
        for _ in range(2):
            assert await made.login() == Login("", b"c", b"k")

    trio.run(run)
    assert (tmp_path / "asked").read_text() == "x\nx\n"


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo no; echo broken >&2; exit 3", "exit status 3: broken"),
        ("echo not json", "no JSON"),
        ("echo []", "no ExecCredential"),
        ('echo \'{"kind": "ExecCredential"}\'', "no ExecCredential"),
        ('echo \'{"kind": "ExecCredential", "apiVersion": "v2", "status": {}}\'', "another version"),
        (printed(), "neither a token nor a certificate"),
        (printed(token=5), "not text"),
        (printed(token="a\nb"), "no token"),
        (printed(token="t", expirationTimestamp="soon"), "no RFC 3339 time"),
        ("head -c 2000000 /dev/zero", "more than"),
    ],
)
def test_what_it_does_wrong_is_said(plugin: MakePlugin, script: str, said: str) -> None:
    with pytest.raises(BadCredentials) as refused:
        trio.run(plugin(script).login)
    assert said in str(refused.value)


def test_one_that_is_not_there_comes_with_its_hint(tmp_path: Path) -> None:
    with pytest.raises(BadCredentials, match="No such file or directory; get it at X"):
        trio.run(Plugin(str(tmp_path / "nowhere"), hint="get it at X").login)


def test_one_that_never_answers_is_ended(plugin: MakePlugin) -> None:
    made = plugin("exec sleep 60")
    made.seconds = 0.05
    with pytest.raises(BadCredentials, match=r"no answer within 0\.05 s"):
        trio.run(made.login)


async def test_a_token_file_is_read_again_in_time(tmp_path: Path, mock_clock: trio.testing.MockClock) -> None:
    token = tmp_path / "token"
    token.write_text("one")
    files = Files(token=token)
    assert (await files.login()).authorization == "Bearer one"
    token.write_text("two")
    await trio.sleep(credentials.REREAD_SECONDS)
    assert (await files.login()).authorization == "Bearer two"


@pytest.mark.parametrize("content", [b"", b"\n", b"a b", b"\xff\xfe", b"x" * (2 << 20)])
async def test_a_token_file_without_a_token_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "token").write_bytes(content)
    with pytest.raises(BadCredentials, match="token"):
        await Files(token=tmp_path / "token").login()
