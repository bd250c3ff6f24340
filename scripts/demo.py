"""The story that `scripts/demo` tells, each claim proven by what it shows; a proof that fails is the exit code.

Everything is done with the public command, `ztunnel lab` and `ztunnel`, and printed as a person would type it. The one private tool is
the wiretap (`scripts/wiretap.py`), which listens on the bridge between the nodes. Invariant: however the story ends, its cluster is taken
down, unless `--keep` was given.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from scripts import demo_waypoint, wire
from scripts.stage import PATIENCE_SECONDS, ROOT, DemoError, Lab, Pod, Terminal
from ztunnel.lab.paths import lab_state_dir

SAMPLES = "deploy/samples"
HBONE_PORT = 15008
LISTEN_SECONDS = 60
CLIENT, INTRUDER, VISITOR = Pod("client", "shop"), Pod("intruder", "shop"), Pod("visitor", "outside")
CLIENT_IDENTITY = "spiffe://cluster.local/ns/shop/sa/client"
INTRUDER_IDENTITY = "spiffe://cluster.local/ns/shop/sa/intruder"


def main() -> int:
    """Tell the story. Exit code: 0 every proof held, 1 one did not, 2 usage, 130, 141 and 143 interrupted."""
    parser = argparse.ArgumentParser(prog="scripts/demo", description="A cluster, real traffic, and the proof that the wire carries TLS.")
    parser.add_argument("--keep", action="store_true", help="leave the cluster up, to play with")
    parser.add_argument("--waypoint", action="store_true", help="another story: a bookstore, and a waypoint in front of it")
    options = parser.parse_args()
    keep, tell = options.keep, demo_waypoint.story if options.waypoint else story
    terminal = Terminal()
    lab = Lab(free_name(), terminal)
    began = time.monotonic()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)
    try:
        tell(lab, terminal)
    except DemoError as error:
        print(f"demo: it ends here: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        keep = False
        return 128 + signal.SIGINT
    except BrokenPipeError:  # a reader that has seen enough, such as `| head`
        keep = False
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except SystemExit:
        keep = False
        raise
    finally:
        close(lab, terminal, keep=keep)
    if not keep:
        farewell(terminal)
    for claim in terminal.failed:
        print(f"demo: failed: {claim}", file=sys.stderr)
    print(f"\n{'Some proofs failed' if terminal.failed else 'Every proof held'} ({time.monotonic() - began:.0f} s).")
    return 1 if terminal.failed else 0


def leave(number: int, _frame: FrameType | None) -> None:
    """End as the signal wants, by way of everything that must be cleaned up."""
    raise SystemExit(128 + number)


def free_name() -> str:
    """`demo`, or another name while a lab of that name is up."""
    return f"demo-{secrets.token_hex(2)}" if lab_state_dir("demo").exists() else "demo"


def story(lab: Lab, terminal: Terminal) -> None:
    """All chapters.

    Raises:
        DemoError: one cannot go on.
    """
    cluster(lab, terminal)
    between_the_nodes(lab, terminal)
    callers(lab, terminal)
    policy(lab, terminal)


def close(lab: Lab, terminal: Terminal, *, keep: bool) -> None:
    """Take the lab down, or say how to go on with it."""
    if keep:
        terminal.chapter("What to try next")
        terminal.say(
            f"The cluster stays up. Its name is {lab.name}, and `ztunnel` is .venv/bin/ztunnel; {SAMPLES}/README.md goes on from here.", ""
        )
        for words in (
            ["status", "--lab", lab.name],
            ["lab", "apply", "-f", f"{SAMPLES}/strict", "--name", lab.name],
            ["lab", "exec", "visitor", "-n", "outside", "--name", lab.name, "--", "curl", "-sS", "http://catalog.shop:8080/"],
            ["lab", "label", "ns", "outside", "istio.io/dataplane-mode=ambient", "--name", lab.name],
            ["lab", "logs", "node-2", "-f", "--name", lab.name],
            ["lab", "down", "--name", lab.name],
        ):
            terminal.command(["ztunnel", *words])
        return
    # A second ^C must not leave half of it behind.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    down = lab.run("lab", "down", "--name", lab.name)
    if lab_state_dir(lab.name).exists():
        terminal.failed.append(f"the lab is gone afterwards\n{down.output}")


def farewell(terminal: Terminal) -> None:
    """What to do after a demo that left nothing behind."""
    terminal.chapter("What to try next")
    for what, why in (
        ("./scripts/demo --keep", "the same, and the cluster stays up to play with"),
        ("./scripts/demo --waypoint", "another story: policies and routes for requests"),
        ("./scripts/test", "all tests"),
        (f"{SAMPLES}/README.md", "what else the samples show"),
        ("README.md", "how it works, and where to read on"),
    ):
        terminal.say(f"{what:<27}{why}")


def cluster(lab: Lab, terminal: Terminal) -> None:
    """Builds it and shows it.

    Raises:
        DemoError: it does not come up.
    """
    terminal.chapter("A cluster: nodes and pods are network namespaces of this machine")
    lab.show("lab", "up", "-f", SAMPLES, "--nodes", "2", "--name", lab.name)
    lab.show("lab", "get", "nodes", "-o", "wide", "--name", lab.name)
    lab.show("lab", "get", "pods", "-A", "-o", "wide", "--name", lab.name)
    terminal.say(
        "", "MESH enabled: what the pod sends and receives passes through the agent of its node. The visitor is outside of the mesh."
    )


def between_the_nodes(lab: Lab, terminal: Terminal) -> None:
    """The same request from inside and from outside of the mesh, as the wire between the nodes sees it.

    Raises:
        DemoError: there is nobody to call, or nothing to listen with.
    """
    terminal.chapter("The wire between the nodes")
    server = next((address for name, address in lab.addresses("shop").items() if name.startswith("catalog-")), None)
    if server is None:
        raise DemoError("the samples have no catalog pod")
    secret = f"secret-{secrets.token_hex(8)}"
    terminal.say("Every byte on the bridge between the nodes is recorded while two pods send the same request to the same server:", "")
    with listening(lab) as heard:
        inside = lab.fetch(CLIENT, f"http://{server}:8080/", f"x-secret: {secret}")
        outside = lab.fetch(VISITOR, f"http://{server}:8080/", f"x-secret: {secret}")
    terminal.proof("both were answered, and the server had received the secret", holds=secret in inside.output and secret in outside.output)
    client, visitor = caller_seen(inside.output), caller_seen(outside.output)
    sealed = [each for each in heard if client in (each.source, each.destination)]
    plain = [each for each in heard if visitor in (each.source, each.destination)]
    others = [each for each in heard if each not in plain]
    records = show_recording(terminal, sealed, plain)
    only = bool(sealed) and all(HBONE_PORT in (each.source_port, each.destination_port) for each in sealed)
    terminal.proof(f"of the client in the mesh, the wire saw port {HBONE_PORT} and nothing else", holds=only)
    terminal.proof("there it saw a TLS handshake and encrypted records", holds={"ClientHello", "ApplicationData"} <= records)
    terminal.proof(
        "the secret is nowhere in the recording but in the visitor's connection",
        holds=not any(secret.encode() in each.data for each in others),
    )
    terminal.proof(
        "and there it is: had the client's been readable, it would have been found",
        holds=any(secret.encode() in each.data for each in plain),
    )


def show_recording(terminal: Terminal, sealed: list[wire.Direction], plain: list[wire.Direction]) -> set[str]:
    """Print the beginnings of what was heard; the names of the TLS records that were sent into the tunnel."""
    tunnels = [each for each in sealed if each.destination_port == HBONE_PORT]
    records = [(each, record) for each in tunnels for record in wire.records(each.data)]
    for title in ("ClientHello", "ApplicationData"):
        for tunnel, record in [(tunnel, record) for tunnel, record in records if record.title == title][:1]:
            terminal.say("", f"in the mesh   {tunnel.title}   TLS {title}, {len(record.raw)} bytes", *wire.dump(record.raw))
    for direction in plain[:1]:
        terminal.say("", f"outside       {direction.title}   no TLS, {len(direction.data)} bytes", *wire.dump(direction.data, 160))
    terminal.say("")
    return {record.title for _, record in records}


@contextmanager
def listening(lab: Lab) -> Iterator[list[wire.Direction]]:
    """Listens on the bridge between the nodes; when the block has ended, the list holds what passed.

    Raises:
        DemoError: the tap cannot listen.
    """
    heard: list[wire.Direction] = []
    tool = [sys.executable, "-I", "-S", str(ROOT / "scripts" / "wiretap.py"), "br0", str(LISTEN_SECONDS)]
    tap = lab.start("lab", "exec", "-i", "fabric", "--name", lab.name, "--", *tool)
    assert tap.stdin is not None
    assert tap.stdout is not None
    try:
        if "listening" not in tap.stdout.readline():
            raise DemoError("the wiretap cannot listen on the bridge between the nodes")
        yield heard
        tap.stdin.close()
        heard += wire.directions(wire.segments(tap.stdout))
        tap.wait(PATIENCE_SECONDS)
    finally:
        tap.kill()
        tap.wait()


def caller_seen(answer: str) -> str:
    """The address that the echo server says it was called from; empty if this is no answer of it."""
    try:
        return str(json.loads(answer)["remote_address"])
    except (ValueError, KeyError, TypeError):
        return ""


def callers(lab: Lab, terminal: Terminal) -> None:
    """A service by its name, a headless one, and who the server's side knows the caller to be."""
    terminal.chapter("Requests, and who the server's side sees")
    by_name = lab.fetch(CLIENT, "http://orders/")
    headless = lab.fetch(CLIENT, "http://catalog:8080/")
    terminal.proof("a service answers by its name, at its virtual address", holds='"pod": "orders-' in by_name.output)
    terminal.proof("so does a headless one, whose name stands for the pods themselves", holds='"pod": "catalog-' in headless.output)
    own = caller_seen(by_name.output) == lab.addresses("shop")["client"]
    terminal.proof("the application sees the client's own address, not a proxy's", holds=own)
    terminal.say("", "The connections that the agent on the server's node carries, while one lives:")
    slow = lab.start(*lab.request(CLIENT, "http://orders/?delay=2"))
    listing = ["connections", "--lab", lab.name, "--node", "node-2", "-o", "wide"]
    try:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while CLIENT_IDENTITY not in lab.run(*listing).output and time.monotonic() < deadline:
            time.sleep(0.05)
        listed = lab.show(*listing)
    finally:
        finish(slow)
    terminal.proof(f"there the caller is {CLIENT_IDENTITY}, as its certificate proves", holds=CLIENT_IDENTITY in listed)


def finish(process: subprocess.Popen[str]) -> None:
    """Wait for a command's end, not for ever."""
    try:
        process.communicate(timeout=PATIENCE_SECONDS)
    finally:
        process.kill()


def policy(lab: Lab, terminal: Terminal) -> None:
    """One connection that the policies allow, two that they refuse, and which policy it was."""
    terminal.chapter("Who may call whom")
    terminal.say(f"{SAMPLES}/policies.yaml: orders is for the client only (ALLOW); catalog is not for the intruder (DENY).", "")
    allowed = lab.fetch(CLIENT, "http://orders/")
    terminal.proof("the client is let in", holds='"pod": "orders-' in allowed.output)
    show_flow(lab, terminal, {"src.identity": CLIENT_IDENTITY, "dst.workload": "orders-"})
    for url, workload, name in (
        ("http://orders/", "orders-", "orders-for-client"),
        ("http://catalog:8080/", "catalog-", "catalog-not-for-intruder"),
    ):
        terminal.say("")
        refused = lab.fetch(INTRUDER, url)
        terminal.proof("the intruder is refused", holds=refused.code != 0 and '"pod"' not in refused.output)
        flow = show_flow(lab, terminal, {"src.identity": INTRUDER_IDENTITY, "dst.workload": workload, "error": "connection closed"})
        told = name in flow.get("policy", "") or name in flow.get("error", "")
        terminal.proof(f"and the log names the policy, {name}", holds=told)


def show_flow(lab: Lab, terminal: Terminal, wanted: dict[str, str]) -> dict[str, str]:
    """Print what the server's agent logged of a connection, the telling fields only."""
    flow = lab.flow("node-2", {"direction": "inbound", **wanted})
    terminal.say("in the log of node-2:")
    for name in ("src.identity", "dst.workload", "dst.service", "bytes_sent", "policy", "error"):
        if name in flow:
            terminal.say(f"   {name:<13} {flow[name]}")
    return flow


if __name__ == "__main__":
    sys.exit(main())
