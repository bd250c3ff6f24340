"""Rows to text, literally."""

from __future__ import annotations

import pytest

from ztunnel.cli import kinds
from ztunnel.cli.health import certificate_problem, problems
from ztunnel.cli.output import (
    Column,
    Row,
    as_yaml,
    changed,
    columns_of,
    duration,
    merged,
    names,
    rows_of,
    shown,
    size,
    table,
    text,
)

CART = {"namespace": "shop", "name": "cart", "vips": ["10.96.0.1"], "ports": ["80→8080"], "endpoints": 2, "ready_endpoints": 1}
WEB = {"namespace": "web", "name": "web", "vips": [], "ports": [], "endpoints": 0, "ready_endpoints": 0}


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, "0s"),
        (59.9, "59s"),
        (60, "1m"),
        (61, "1m1s"),
        (599, "9m"),
        (3600, "1h"),
        (3660, "1h1m"),
        (36000, "10h"),
        (86400, "1d"),
        (90000, "1d1h"),
        (864000, "10d"),
        (-61, "-1m1s"),
    ],
)
def test_durations(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, "0B"), (999, "999B"), (1000, "1.0KiB"), (2048, "2.0KiB"), (204800, "200KiB"), (10**9, "954MiB"), (10**15, "909.5TiB")],
)
def test_sizes(count: int, expected: str) -> None:
    assert size(count) == expected


def test_cells_hold_nothing_that_moves_a_terminal() -> None:
    assert shown("a\x1b[2J\nb\u202e") == "a\\u001b[2J\\nb\\u202e"
    assert shown(["a", None, True]) == "a,<none>,yes"
    assert shown("") == shown([]) == shown(None) == "<none>"


def test_a_table_is_aligned_and_has_no_trailing_spaces() -> None:
    assert table([CART, WEB], columns_of(kinds.SERVICES, wide=False, agents=False)) == [
        "NAMESPACE   NAME   VIPS        PORTS     ENDPOINTS   WAYPOINT",
        "shop        cart   10.96.0.1   80→8080   1/2         none",
        "web         web    headless    <none>    0/0         none",
    ]
    assert table([WEB], [Column("NAME", text("name"))], headers=False) == ["web"]
    assert table([], [Column("NAME", text("name"))]) == ["NAME"]


def test_rows_of_several_agents() -> None:
    tunnel = {"pod": "shop/cart", "direction": "outbound", "peer": "p", "id": "1"}
    rows = merged(kinds.TUNNELS, [("b", [tunnel]), ("a", [tunnel])])
    assert [row["agents"] for row in rows] == [["a"], ["b"]]
    assert columns_of(kinds.TUNNELS, wide=False, agents=True)[0].header == "NODE"
    rows = merged(kinds.SERVICES, [("b", [CART, WEB]), ("a", [CART])])
    assert [(row["name"], row["agents"]) for row in rows] == [("cart", ["a", "b"]), ("web", ["b"])]
    assert columns_of(kinds.SERVICES, wide=True, agents=True)[0].header == "AGENTS"
    assert columns_of(kinds.SERVICES, wide=False, agents=True)[0].header == "NAMESPACE"


def test_names() -> None:
    assert names(kinds.SERVICES, [CART]) == ["service/shop/cart"]


def test_yaml() -> None:
    assert as_yaml({"b": [1], "a": "x"}) == "b:\n- 1\na: x"


def test_a_watch_shows_what_is_new_or_lastingly_different() -> None:
    before: list[Row] = [{"id": 1, "age_seconds": 1, "state": "open"}, {"id": 2, "age_seconds": 1, "state": "open"}]
    after: list[Row] = [{"id": 1, "age_seconds": 2, "state": "open"}, {"id": 2, "age_seconds": 2, "state": "draining"}, {"id": 3}]
    assert changed(before, after) == after[1:]


def test_what_is_no_list_of_rows_is_empty() -> None:
    assert rows_of(None) == rows_of("x") == rows_of([1]) == []


def test_namespaces_are_found_in_every_kind() -> None:
    assert kinds.CONNECTIONS.namespace({"pod": "shop/cart"}) == "shop"
    assert kinds.CERTIFICATES.namespace({"identity": "spiffe://cluster.local/ns/shop/sa/cart"}) == "shop"
    assert kinds.CERTIFICATES.namespace({"identity": "?"}) == ""
    assert kinds.PODS.namespace({"namespace": "shop"}) == "shop"


def test_problems_are_sentences_and_said_once() -> None:
    answer = {
        "ready": False,
        "pending": ["proxy", "certificates"],
        "problems": [
            {"kind": "manifest", "file": "a.yaml", "object": "Pod shop/x", "field": "spec", "reason": "not a mapping"},
            {"kind": "pod", "object": "Pod web/web", "file": "", "field": "", "reason": "its namespace is gone"},
        ],
        "certificates": [
            {"identity": "spiffe://a", "state": "Unavailable", "error": "away"},
            {"identity": "spiffe://b", "state": "Valid", "error": ""},
            {"identity": "spiffe://c", "state": "Pending", "error": ""},
        ],
        "items": [
            {"namespace": "web", "name": "web", "problem": "said above"},
            {"namespace": "shop", "name": "a", "labelled": True, "enrolled": False},
            {"namespace": "shop", "name": "b", "labelled": True, "enrolled": True, "captured": False},
            {"namespace": "shop", "name": "c", "labelled": True, "enrolled": True, "captured": True},
        ],
    }
    assert problems(answer) == [
        "not ready: waiting for proxy,certificates",
        "manifest a.yaml: Pod shop/x: spec: not a mapping",
        "Pod web/web: its namespace is gone",
        "certificate spiffe://a: unavailable: away",
        "certificate spiffe://c: pending",
        "pod shop/a: it is labelled but not enrolled yet",
        "pod shop/b: it is enrolled but its redirection rules are not there",
    ]
    assert problems({"ready": True}) == []
    assert certificate_problem({"state": "Failing", "error": "x"}) == "failing: x"
