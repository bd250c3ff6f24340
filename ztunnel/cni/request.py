"""What the CNI plugin asks, and what it is told. PURE: bytes to values and back; `plugin.c` is the other side.

Source: CNI specification 1.1.0 (parameters, prevResult, GC), and 0.3.1 for the older shape of results; kubelet's CNI_ARGS.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from ipaddress import ip_interface

from ztunnel.mesh.errors import LocalError

GREETING = b"ztunnel-cni 1\n"
MAX_REQUEST_BYTES = (1 << 20) + (32 << 10)
"""Of the plugin's configuration, and its environment."""
MAX_ADDRESSES = 16
_VARIABLES = ("CNI_COMMAND", "CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_ARGS")
_MAX_REFUSAL = 1024


class BadRequest(LocalError):
    """It does not come from our plugin, or the runtime said something that it must not."""


class Command(Enum):
    """CNI's, as far as the agent hears of them."""

    ADD = "ADD"
    DEL = "DEL"
    CHECK = "CHECK"
    GC = "GC"
    STATUS = "STATUS"


class Code(Enum):
    """CNI's errors, as far as the agent answers with them."""

    BAD_CONFIGURATION = 7
    TRY_LATER = 11


@dataclass(frozen=True, slots=True)
class PodName:
    """What the runtime says of the pod; `uid` is empty where it does not say it."""

    namespace: str
    name: str
    uid: str


@dataclass(frozen=True, slots=True)
class Request:
    """One call of the plugin."""

    command: Command
    container: str
    """The sandbox's id; empty for GC and STATUS."""
    namespace_path: str
    """Of the pod's network namespace, as the host sees it."""
    pod: PodName | None
    addresses: tuple[str, ...]
    """That the plugins before ours gave to the sandbox, in canonical text."""
    attachments: frozenset[str] | None = None
    """Of GC: the ids of the sandboxes that still exist."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why the pod may not start; the text is shown in the pod's events."""

    code: Code
    text: str


def parse(message: bytes) -> Request:
    """The request that the plugin sent.

    Raises: BadRequest.
    """
    if not message.startswith(GREETING):
        raise BadRequest("this is not the greeting of our plugin")
    *fields, rest = message.removeprefix(GREETING).split(b"\0", len(_VARIABLES))
    variables = dict(_variable(field, name) for field, name in zip(fields, _VARIABLES, strict=False))
    if len(variables) != len(_VARIABLES):
        raise BadRequest("the request ends in its variables")
    command = _command(variables["CNI_COMMAND"])
    configuration = _configuration(rest)
    return Request(
        command=command,
        container=variables["CNI_CONTAINERID"],
        namespace_path=variables["CNI_NETNS"],
        pod=_pod(variables["CNI_ARGS"]),
        addresses=tuple(_addresses(configuration.get("prevResult"))),
        attachments=frozenset(_attachments(configuration.get("cni.dev/valid-attachments"))) if command is Command.GC else None,
    )


def answer(refusal: Refusal | None) -> bytes:
    """What the plugin is told."""
    if refusal is None:
        return b"ok\n"
    text = "".join(each if " " <= each <= "~" else "?" for each in refusal.text)[:_MAX_REFUSAL]
    return f"refused {refusal.code.value} {text}\n".encode()


def _variable(field: bytes, name: str) -> tuple[str, str]:
    found, _, value = field.partition(b"=")
    if found.decode("latin-1") != name:
        raise BadRequest(f"{name} is expected")
    try:
        return name, value.decode()
    except UnicodeDecodeError:
        raise BadRequest(f"{name} is not UTF-8") from None


def _command(word: str) -> Command:
    try:
        return Command(word)
    except ValueError:
        raise BadRequest(f"CNI_COMMAND: {word[:32]!r} is not for the agent") from None


def _configuration(content: bytes) -> Mapping[str, object]:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        raise BadRequest("the configuration is not JSON") from None
    if not isinstance(found, dict):
        raise BadRequest("the configuration is not an object")
    return found


def _pod(arguments: str) -> PodName | None:
    pairs = [part.partition("=") for part in arguments.split(";") if part]
    said = {key: value for key, _, value in pairs}
    if len(said) != len(pairs):
        raise BadRequest("CNI_ARGS names something twice")
    namespace, name = said.get("K8S_POD_NAMESPACE", ""), said.get("K8S_POD_NAME", "")
    return PodName(namespace, name, said.get("K8S_POD_UID", "")) if namespace and name else None


def _addresses(result: object) -> Iterator[str]:
    """Those of the sandbox: an interface of the result that says no sandbox is the host's."""
    if result is None:
        return
    interfaces, addresses = _list_in(result, "interfaces"), _list_in(result, "ips")
    if len(addresses) > MAX_ADDRESSES:
        raise BadRequest(f"prevResult.ips: more than {MAX_ADDRESSES} addresses")
    for number, each in enumerate(addresses):
        if not isinstance(each, dict) or not isinstance(text := each.get("address"), str):
            raise BadRequest(f"prevResult.ips[{number}].address: an address is expected")
        index = each.get("interface")
        holder = interfaces[index] if isinstance(index, int) and 0 <= index < len(interfaces) else None
        if isinstance(holder, dict) and not holder.get("sandbox"):
            continue
        try:
            yield str(ip_interface(text).ip)
        except ValueError:
            raise BadRequest(f"prevResult.ips[{number}].address: {text[:64]!r} is no address") from None


def _attachments(listed: object) -> Iterator[str]:
    if not isinstance(listed, list):
        raise BadRequest("cni.dev/valid-attachments: a list is expected")
    for each in listed:
        if not isinstance(each, dict) or not isinstance(container := each.get("containerID"), str):
            raise BadRequest("cni.dev/valid-attachments: containerID is expected in each")
        yield container


def _list_in(result: object, name: str) -> list[object]:
    if not isinstance(result, dict):
        raise BadRequest("prevResult: an object is expected")
    found = result.get(name)
    if found is None:
        return []
    if not isinstance(found, list):
        raise BadRequest(f"prevResult.{name}: a list is expected")
    return found
