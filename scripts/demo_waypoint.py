"""The story of `scripts/demo --waypoint`: a bookstore, its policies and routes, and a waypoint in front of it. Each outcome is shown.

The steps are those of Istio's walk through ambient mode with its bookstore; the manifests stand in `deploy/samples/bookinfo`.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterable

from scripts.stage import DemoError, Done, Lab, Pod, Terminal

SAMPLES = "deploy/samples/bookinfo"
PAGE = "http://productpage:9080/productpage"
ENTRANCE = "http://bookinfo-gateway-istio.default/productpage"
TITLE = "<title>Simple Bookstore App</title>"
DENIED = "RBAC: access denied"
CURL, BROWSER = Pod("curl", "default"), Pod("browser", "outside")
SERVICES = 4
"""Of the bookstore itself; those of single versions of reviews come on top."""
REQUESTS = 100
IN_FORCE_SECONDS = 60.0
"""How long what was applied may take until every process has it, on a machine that is busy with other things."""


def story(lab: Lab, terminal: Terminal) -> None:
    """All chapters.

    Raises:
        DemoError: one cannot go on.
    """
    bookstore(lab, terminal)
    into_the_mesh(lab, terminal)
    first_policy(lab, terminal)
    waypoint(lab, terminal)
    requests(lab, terminal)
    split(lab, terminal)
    away(lab, terminal)


def bookstore(lab: Lab, terminal: Terminal) -> None:
    """Builds it."""
    terminal.chapter("A bookstore: productpage asks details and reviews, reviews asks ratings")
    lab.show("lab", "up", "-f", f"{SAMPLES}/bookinfo.yaml", "--nodes", "2", "--name", lab.name)
    lab.show("lab", "get", "pods", "--name", lab.name)
    terminal.say("")
    change(lab, "lab", "apply", "-f", f"{SAMPLES}/gateway.yaml", "--name", lab.name)
    page = until(lab, BROWSER, ENTRANCE, [TITLE, "200"])
    show(terminal, page, [TITLE, "Reviews served by"])
    terminal.proof("a browser outside of the mesh gets the page, by way of the ingress gateway", holds=TITLE in page.output)


def into_the_mesh(lab: Lab, terminal: Terminal) -> None:
    """The pods join while they run."""
    terminal.chapter("Into the mesh, by a label")
    before = lab.addresses("default")
    change(lab, "lab", "label", "ns", "default", "istio.io/dataplane-mode=ambient", "--name", lab.name)
    page = until(lab, CURL, PAGE, [TITLE, "200"])
    terminal.proof("the page is there as before", holds=TITLE in page.output)
    terminal.proof("and no pod was restarted", holds=before == lab.addresses("default"))
    flow = lab.flow(node_of(lab, "productpage-"), {"direction": "inbound", "src.workload": "curl", "dst.workload": "productpage-"})
    for name in ("src.identity", "dst.identity"):
        terminal.say(f"   {name:<13} {flow.get(name, '')}")
    terminal.proof("the connection has two identities now", holds=flow.get("src.identity", "").endswith("/sa/curl"))


def first_policy(lab: Lab, terminal: Terminal) -> None:
    """By identity, at the pod's node."""
    terminal.chapter("A policy for connections: productpage is for the gateway only")
    change(lab, "lab", "apply", "-f", f"{SAMPLES}/l4-policy.yaml", "--name", lab.name)
    refused = until(lab, CURL, PAGE, ["000"])
    show(terminal, refused, ["curl:", "request failed"])
    terminal.proof("the connection of pod curl is reset, without any HTTP", holds=refused.code != 0)
    page = until(lab, BROWSER, ENTRANCE, [TITLE, "200"])
    terminal.proof("the browser still gets the page: it comes by way of the gateway", holds=TITLE in page.output)
    others = until(lab, CURL, "http://details:9080/details/0", ["author", "200"])
    terminal.proof("other services are not concerned", holds="author" in others.output)


def waypoint(lab: Lab, terminal: Terminal) -> None:
    """It comes, and everybody knows."""
    terminal.chapter("A waypoint for the whole namespace")
    change(lab, "waypoint", "apply", "--enroll-namespace", "--wait", "--lab", lab.name)
    listed = lab.show("lab", "get", "gateways", "--name", lab.name)
    terminal.proof("it is programmed", holds=re.search(r"istio-waypoint +\S+ +True", listed) is not None)
    status = lab.show("waypoint", "status", "--lab", lab.name)
    bound = [line for line in status.splitlines() if "WaypointBound" in line and " True " in line]
    terminal.proof("every service of the bookstore is bound to it", holds=len(bound) >= SERVICES)


def requests(lab: Lab, terminal: Terminal) -> None:
    """Policies that know methods."""
    terminal.chapter("A policy for requests: only the account curl, and only GET")
    change(lab, "lab", "apply", "-f", f"{SAMPLES}/l7-policy.yaml", "--name", lab.name)
    terminal.say(
        "", "The waypoint lets the request pass, and the pod's node sees the waypoint now, which the first policy does not name:", ""
    )
    blocked = until(lab, CURL, PAGE, ["503"])
    show(terminal, blocked, ["upstream connect error"])
    terminal.proof("503: it failed behind the waypoint", holds=blocked.output.endswith("503"))
    change(lab, "lab", "apply", "-f", f"{SAMPLES}/l4-policy-with-waypoint.yaml", "--name", lab.name)
    allowed = until(lab, CURL, PAGE, [TITLE, "200"])
    show(terminal, allowed, [TITLE])
    terminal.proof("with the waypoint named there, GET of curl: 200 and the page", holds=TITLE in allowed.output)
    deleted = until(lab, CURL, PAGE, [DENIED, "403"], method="DELETE")
    show(terminal, deleted, [DENIED])
    terminal.proof(f"DELETE of curl: 403, {DENIED}", holds=deleted.output == f"{DENIED}\n403")
    other = until(lab, Pod("deploy/reviews-v1", "default"), PAGE, [DENIED, "403"])
    show(terminal, other, [DENIED])
    terminal.proof(f"GET of reviews-v1: 403, {DENIED}", holds=other.output == f"{DENIED}\n403")
    page = until(lab, BROWSER, ENTRANCE, [TITLE, "200"])
    terminal.proof("the browser still gets the page: the gateway goes past the waypoint", holds=TITLE in page.output)
    change(lab, "lab", "label", "service", "productpage", "istio.io/ingress-use-waypoint=true", "--name", lab.name)
    judged = until(lab, BROWSER, ENTRANCE, [DENIED, "403"])
    show(terminal, judged, [DENIED])
    terminal.proof(f"unless its service says that it is not to: 403, {DENIED}", holds=judged.output == f"{DENIED}\n403")


def split(lab: Lab, terminal: Terminal) -> None:
    """One in ten."""
    terminal.chapter("A route: nine of ten requests to reviews-v1, one to reviews-v2")
    change(lab, "lab", "apply", "-f", f"{SAMPLES}/reviews-90-10.yaml", "--name", lab.name)
    counted: Counter[str] = Counter()
    deadline = time.monotonic() + IN_FORCE_SECONDS
    while "reviews-v3" in (counted := versions(lab)) and time.monotonic() < deadline:
        continue
    terminal.say(f"{REQUESTS} requests:", *(f"   {name:<12} {count}" for name, count in sorted(counted.items())), "")
    only = counted.keys() <= {"reviews-v1", "reviews-v2"} and counted.total() == REQUESTS
    # Ten are expected; more than 25, or none, has odds of about one in 30,000.
    terminal.proof("about nine of ten, and nobody sees reviews-v3", holds=only and 0 < counted["reviews-v2"] <= 25)


def versions(lab: Lab) -> Counter[str]:
    """Which version answered how many of REQUESTS requests."""
    found: Counter[str] = Counter()
    for _ in range(REQUESTS // 10):
        answers = lab.run(*lab.several(CURL, "http://reviews:9080/reviews/0", 10)).output
        found.update(re.findall(r'"podname": "(reviews-v\d)-', answers))
    return found


def away(lab: Lab, terminal: Terminal) -> None:
    """Without it: closed, until nobody asks for it."""
    terminal.chapter("Without the waypoint")
    change(lab, "waypoint", "delete", "--all", "--lab", lab.name)
    refused = until(lab, CURL, PAGE, ["000"])
    show(terminal, refused, ["curl:", "request failed"])
    terminal.proof("while a label asks for a waypoint that is not there, nothing passes", holds=refused.code != 0)
    change(lab, "lab", "label", "ns", "default", "istio.io/use-waypoint-", "--name", lab.name)
    change(lab, "lab", "delete", "-f", f"{SAMPLES}/l4-policy.yaml", "--name", lab.name)
    page = until(lab, CURL, PAGE, [TITLE, "200"])
    terminal.proof("without label and policy all is as before", holds=TITLE in page.output)


def change(lab: Lab, *words: str) -> None:
    """Run a command, show it, and wait until everybody has read what it changed.

    Raises:
        DemoError: it failed, or the lab does not settle.
    """
    lab.show(*words)
    done = lab.run("lab", "settle", "--name", lab.name)
    if done.code != 0:
        raise DemoError(done.output)


def until(lab: Lab, pod: Pod, url: str, words: Iterable[str], method: str = "GET") -> Done:
    """A request, typed and sent until its answer (with the status on the last line) has all of these words; the last answer."""
    lab.typed(pod, url, method)
    return _patiently(lambda: lab.run(*lab.request(pod, url, method=method)), tuple(words))


def _patiently(ask: Callable[[], Done], words: tuple[str, ...]) -> Done:
    deadline = time.monotonic() + IN_FORCE_SECONDS
    while True:
        done = ask()
        if all(word in done.output for word in words) or time.monotonic() > deadline:
            return done
        time.sleep(0.2)


def show(terminal: Terminal, done: Done, telling: Iterable[str]) -> None:
    """Print the lines of an answer that tell something, and its status."""
    # curl's status of no answer at all, with its error right behind it.
    lines = done.output.removeprefix("000").splitlines()
    chosen = [line for line in lines if any(word in line for word in telling)]
    terminal.say(*dict.fromkeys([*chosen, *lines[-1:]]), "")


def node_of(lab: Lab, pod: str) -> str:
    """The node of the first pod whose name begins so.

    Raises:
        DemoError: there is none.
    """
    listed = lab.run("lab", "get", "pods", "-o", "wide", "--name", lab.name).output
    for line in listed.splitlines():
        if line.startswith(pod):
            return line.split()[-2]
    raise DemoError(f"no pod {pod} in:\n{listed}")
