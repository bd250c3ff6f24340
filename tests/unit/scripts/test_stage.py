"""The demo's stage: what it reads out of a log line, and that a claim which does not hold is kept and said."""

from __future__ import annotations

import pytest

from scripts.stage import Terminal, fields


def test_fields_of_a_log_line() -> None:
    line = 'info\taccess\tconnection complete\tsrc.addr=10.0.0.1:1 src.identity=spiffe://a/b error="closed: \\"so\\" it is" flag=-'
    assert fields(line) == {"src.addr": "10.0.0.1:1", "src.identity": "spiffe://a/b", "error": 'closed: \\"so\\" it is', "flag": "-"}


def test_a_claim_that_does_not_hold_is_said_and_kept(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal()
    terminal.proof("the sky is blue", holds=True)
    terminal.proof("pigs fly", holds=False)
    assert terminal.failed == ["pigs fly"]
    assert capsys.readouterr().out == "   ✓ the sky is blue\n   ✗ NOT TRUE: pigs fly\n"


def test_chapters_are_numbered(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal()
    terminal.chapter("One")
    terminal.command(["ztunnel", "lab", "exec", "a b"])
    terminal.say("", "text")
    terminal.chapter("Two")
    assert capsys.readouterr().out == "\n1. One\n\n   $ ztunnel lab exec 'a b'\n\n   text\n\n2. Two\n\n"
