"""What the demo stands on: the terminal that it talks to, and the lab that it drives through the public command. No story here."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMMAND_SECONDS = 90.0
PATIENCE_SECONDS = 10.0
NO_CURL = """
import sys, urllib.request as web, urllib.error
headers = dict(header.split(": ", 1) for header in sys.argv[3:])
method = sys.argv[2]
try:
    answer = web.urlopen(web.Request(sys.argv[1], headers=headers, method=method or "GET"), timeout=9)
except urllib.error.HTTPError as error:
    answer = error
except OSError as error:
    print("000" if method else "", end="")
    raise SystemExit(f"request failed: {error}")
print(answer.read().decode() + (f"\\n{answer.status}" if method else ""))
"""
"""What stands in for curl on a machine that has none."""


class DemoError(Exception):
    """The story cannot go on; the text is for the person at the terminal."""


@dataclass(frozen=True, slots=True)
class Done:
    """A command that has ended."""

    code: int
    output: str


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod to run something in."""

    name: str
    namespace: str


class Terminal:
    """What the person sees, and what did not hold. Colour only for a person."""

    def __init__(self) -> None:
        self._colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        self._chapter = 0
        self.failed: list[str] = []

    def chapter(self, title: str) -> None:
        """A numbered heading."""
        self._chapter += 1
        self._print("1", f"\n{self._chapter}. {title}\n")

    def say(self, *lines: str) -> None:
        """Indented text."""
        for line in lines:
            self._print("", f"   {line}")

    def command(self, words: Sequence[str]) -> None:
        """A command as a person would type it."""
        self._print("36", f"   $ {shlex.join(words)}")

    def proof(self, claim: str, *, holds: bool) -> None:
        """A claim that was just tested. One that does not hold fails the demo, which still goes on to its end."""
        self._print("32" if holds else "31", f"   ✓ {claim}" if holds else f"   ✗ NOT TRUE: {claim}")
        if not holds:
            self.failed.append(claim)

    def _print(self, colour: str, text: str) -> None:
        print(f"\033[{colour}m{text}\033[0m" if colour and self._colour else text.rstrip(" "), flush=True)


class Lab:
    """One lab."""

    def __init__(self, name: str, terminal: Terminal) -> None:
        self.name = name
        self._terminal = terminal
        self._program = [sys.executable, "-m", "ztunnel"]
        self._curl = shutil.which("curl") is not None

    def run(self, *words: str, stdin: str = "") -> Done:
        """Run `ztunnel WORDS` unseen.

        Raises:
            DemoError: it did not end in time.
        """
        line = [*self._program, *words]
        try:
            done = subprocess.run(line, input=stdin, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False, cwd=ROOT)
        except subprocess.TimeoutExpired as error:
            raise DemoError(f"ztunnel {shlex.join(words)} did not end within {COMMAND_SECONDS:g} s") from error
        return Done(done.returncode, (done.stdout + done.stderr).rstrip())

    def show(self, *words: str) -> str:
        """Run it, and print the command and what it says.

        Raises:
            DemoError: it failed.
        """
        self._terminal.command(["ztunnel", *words])
        done = self.run(*words)
        self._terminal.say(*done.output.splitlines())
        if done.code != 0:
            raise DemoError(f"ztunnel {shlex.join(words)} ended with exit code {done.code}")
        return done.output

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Run it beside the story, its input and output as pipes."""
        return subprocess.Popen([*self._program, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    def fetch(self, pod: Pod, url: str, *headers: str) -> Done:
        """An HTTP request from inside a pod: the command as one would type it, and the answer, are printed."""
        typed = ["curl", "-sS", *(word for header in headers for word in ("-H", header)), url]
        self._terminal.command(["ztunnel", *self._inside(pod), *typed])
        done = self.run(*self.request(pod, url, *headers))
        self._terminal.say(*(done.output or f"(nothing was answered; exit code {done.code})").splitlines())
        return done

    def request(self, pod: Pod, url: str, *headers: str, method: str = "") -> list[str]:
        """The words after `ztunnel` for such a request.

        Args:
            method: with one, the answer ends with a line that has the status, 000 where there was none.
        """
        if self._curl:
            how = ["-X", method, "-w", "\n%{http_code}"] if method else []
            client = ["curl", "-sS", "-m", "9", *how, *(word for header in headers for word in ("-H", header)), url]
        else:
            client = [sys.executable, "-I", "-S", "-c", NO_CURL, url, method, *headers]
        return [*self._inside(pod), *client]

    def several(self, pod: Pod, url: str, count: int) -> list[str]:
        """The words after `ztunnel` for as many requests, one after the other."""
        words = shlex.join(self.request(pod, url)[len(self._inside(pod)) :])
        return [*self._inside(pod), "sh", "-c", f"for i in $(seq {count}); do {words}; echo; done"]

    def typed(self, pod: Pod, url: str, method: str) -> None:
        """Print a request as one would type it."""
        self._terminal.command(["ztunnel", *self._inside(pod), "curl", "-sS", *(["-X", method] if method != "GET" else []), url])

    def _inside(self, pod: Pod) -> list[str]:
        return ["lab", "exec", pod.name, "-n", pod.namespace, "--name", self.name, "--"]

    def addresses(self, namespace: str) -> dict[str, str]:
        """The pods of a namespace by name, to their first address.

        Raises:
            DemoError: the lab does not say.
        """
        done = self.run("lab", "get", "pods", "-n", namespace, "-o", "json", "--name", self.name)
        if done.code != 0:
            raise DemoError(done.output)
        return {pod["metadata"]["name"]: pod["status"]["podIP"] for pod in json.loads(done.output)["items"]}

    def flow(self, node: str, wanted: dict[str, str]) -> dict[str, str]:
        """The fields of the newest line in a node's log that tells of such a connection; empty if there is none in time.

        Args:
            wanted: what the fields' values must begin with.
        """
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            log = self.run("lab", "logs", node, "--tail", "200", "--name", self.name).output
            for line in reversed(log.splitlines()):
                found = fields(line)
                if all(found.get(name, "").startswith(value) for name, value in wanted.items()):
                    return found
            time.sleep(0.1)
        return {}


def fields(line: str) -> dict[str, str]:
    """The `key=value` fields of a log line; a value with spaces is quoted there."""
    found = re.findall(r'([\w.]+)=(?:"((?:[^"\\]|\\.)*)"|(\S+))', line)
    return {key: quoted or bare for key, quoted, bare in found}
