"""Who we are to the API server, at this moment: tokens and certificates change while we run.

A token file of a pod is written anew by the kubelet at four fifths of its life, a certificate by whoever rotates it, and an exec
plugin's answer has an end. So nothing here is read once: `login` looks again when what it has may have aged, and at once after
the server refused it.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Protocol

import trio

from ztunnel.kube.errors import KubeError

REREAD_SECONDS = 10.0
"""Between two looks at a file: far less than a fifth of the ten minutes that the shortest-lived token has."""
PLUGIN_SECONDS = 60.0
PLUGIN_BYTES = 1 << 20
FILE_BYTES = 1 << 20
_LEEWAY_SECONDS = 10.0
"""A plugin's answer is asked for anew this long before its end."""


class BadCredentials(KubeError):
    """No credentials can be had; the text says why."""


@dataclass(frozen=True, slots=True)
class Login:
    """What proves who we are: the value of the Authorization header, a client certificate, both or neither."""

    authorization: str = field(default="", repr=False)
    certificate_pem: bytes = b""
    key_pem: bytes = field(default=b"", repr=False)


class Credentials(Protocol):
    """Somebody's credentials."""

    async def login(self) -> Login:
        """The present ones.

        Raises:
            BadCredentials: there are none to be had now.
        """
        ...

    def refused(self) -> None:
        """The server did not take the last ones: do not give them again without looking."""
        ...


@dataclass(slots=True)
class Files:
    """Credentials that are fixed or stand in files, which are read again while they are used.

    Args:
        fixed: what needs no file; a file's content wins.
    """

    fixed: Login = Login()
    token: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    _read: Login | None = None
    _read_at: float = 0.0

    async def login(self) -> Login:
        """See `Credentials`. A file that cannot be read any more leaves what it said before in use."""
        now = trio.current_time()
        if self._read is None or now - self._read_at >= REREAD_SECONDS:
            try:
                self._read = self._look()
            except BadCredentials:
                if self._read is None:
                    raise
            self._read_at = now
        return self._read

    def refused(self) -> None:
        """See `Credentials`."""
        self._read_at = float("-inf")

    def _look(self) -> Login:
        authorization = self.fixed.authorization
        if self.token is not None:
            authorization = bearer(_content(self.token).decode("ascii", "replace").strip(), str(self.token))
        certificate = self.fixed.certificate_pem if self.certificate is None else _content(self.certificate)
        key = self.fixed.key_pem if self.key is None else _content(self.key)
        return Login(authorization, certificate, key)


@dataclass(slots=True)
class Plugin:
    """Credentials that a program prints (`client.authentication.k8s.io`), asked again before they end.

    Args:
        fixed: what the kubeconfig gives beside it.
        cluster: what the program is told of the cluster, if it wants to be told.
        hint: for the operator when the program is not there.
    """

    command: str
    arguments: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    api_version: str = "client.authentication.k8s.io/v1"
    cluster: Mapping[str, object] | None = None
    hint: str = ""
    fixed: Login = Login()
    seconds: float = PLUGIN_SECONDS
    _given: Login | None = None
    _until: float | None = None
    """On trio's clock; None: without end."""
    _asking: trio.Lock = field(default_factory=trio.Lock)

    async def login(self) -> Login:
        """See `Credentials`."""
        async with self._asking:
            if self._given is None or (self._until is not None and trio.current_time() >= self._until):
                self._given, self._until = self._understood(await self._run())
            return self._given

    def refused(self) -> None:
        """See `Credentials`."""
        self._given = None

    async def _run(self) -> bytes:
        spec: dict[str, object] = {"interactive": False}
        if self.cluster is not None:
            spec["cluster"] = dict(self.cluster)
        told = json.dumps({"apiVersion": self.api_version, "kind": "ExecCredential", "spec": spec})
        environment = {**os.environ, **self.environment, "KUBERNETES_EXEC_INFO": told}
        try:
            with trio.fail_after(self.seconds):
                done = await trio.run_process(
                    [self.command, *self.arguments], stdin=b"", capture_stdout=True, capture_stderr=True, check=False, env=environment
                )
        except trio.TooSlowError as error:
            raise BadCredentials(f"{self.command}: no answer within {self.seconds:g} s") from error
        except OSError as error:
            raise BadCredentials(f"{self.command}: {error.strerror}{'; ' + self.hint if self.hint else ''}") from error
        if done.returncode != 0:
            raise BadCredentials(f"{self.command}: exit status {done.returncode}: {_end(done)}")
        return bytes(done.stdout)

    def _understood(self, output: bytes) -> tuple[Login, float | None]:
        """What the program printed, and until when it holds."""
        if len(output) > PLUGIN_BYTES:
            raise BadCredentials(f"{self.command}: more than {PLUGIN_BYTES} bytes of output")
        try:
            answer = json.loads(output)
        except (ValueError, RecursionError) as error:
            raise BadCredentials(f"{self.command}: its output is no JSON") from error
        if not isinstance(answer, dict) or answer.get("kind") != "ExecCredential" or not isinstance(answer.get("status"), dict):
            raise BadCredentials(f"{self.command}: its output is no ExecCredential with a status")
        if answer.get("apiVersion") != self.api_version:
            raise BadCredentials(f"{self.command}: it answers in another version than {self.api_version}")
        status = answer["status"]
        token, certificate, key, end = (
            status.get(name) for name in ("token", "clientCertificateData", "clientKeyData", "expirationTimestamp")
        )
        if not all(each is None or isinstance(each, str) for each in (token, certificate, key, end)):
            raise BadCredentials(f"{self.command}: a field of its ExecCredential is not text")
        if not token and not (certificate and key):
            raise BadCredentials(f"{self.command}: its ExecCredential has neither a token nor a certificate with its key")
        login = Login(
            bearer(token, self.command) if token else self.fixed.authorization,
            certificate.encode() if certificate else self.fixed.certificate_pem,
            key.encode() if key else self.fixed.key_pem,
        )
        return login, None if not end else self._ending(end)

    def _ending(self, stamp: str) -> float:
        try:
            end = datetime.fromisoformat(stamp)
            left = (end - datetime.now(end.tzinfo)).total_seconds()
        except (ValueError, TypeError) as error:
            raise BadCredentials(f"{self.command}: expirationTimestamp {stamp[:40]!r} is no RFC 3339 time") from error
        return trio.current_time() + left - _LEEWAY_SECONDS


def bearer(token: str, source: str) -> str:
    """The header's value for a token.

    Raises:
        BadCredentials: it is empty, or a header cannot carry it; `source` is named.
    """
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise BadCredentials(f"{source}: no token (an empty file, or characters that a token cannot have)")
    return f"Bearer {token}"


def basic(user: str, password: str) -> str:
    """The header's value for a name and a password."""
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def decoded(text: str, place: str) -> bytes:
    """The bytes of base64 in a kubeconfig.

    Raises:
        BadCredentials: naming the place.
    """
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadCredentials(f"{place}: not base64") from error


def _content(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(FILE_BYTES + 1)
    except OSError as error:
        raise BadCredentials(f"{path}: {error.strerror}") from error
    if not content.strip() or len(content) > FILE_BYTES:
        raise BadCredentials(f"{path}: {'larger than a megabyte' if content.strip() else 'empty'}")
    return content


def _end(done: subprocess.CompletedProcess[bytes]) -> str:
    return " ".join(bytes(done.stderr).decode(errors="replace").split())[-300:]
