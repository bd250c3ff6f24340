"""The dashboard asks for metrics and labels that our programs have."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from waypoint.telemetry.series import HISTOGRAMS, LABELS, NAMES
from ztunnel.runtime.metrics import AuthorityMetrics, Metrics

DASHBOARD = json.loads((Path(__file__).parents[3] / "deploy" / "helm" / "ztunnel" / "dashboard.json").read_text())
OF_PROMETHEUS: dict[str, set[str]] = {"process_cpu_seconds_total": set(), "process_resident_memory_bytes": set()}
TARGET = {"instance", "le"}
"""Labels that Prometheus adds."""
WORDS = {"sum", "min", "max", "count", "rate", "increase", "by", "and", "on", "histogram_quantile", "label_values"}


def known() -> dict[str, set[str]]:
    """Every series that a scrape can show, with its labels."""
    found: dict[str, set[str]] = dict(OF_PROMETHEUS)
    for registry in (Metrics(), AuthorityMetrics()):
        for name, labels in registry.names().items():
            found[name] = found[f"{name}_total"] = set(labels)
    for metric, name in NAMES.items():
        found.setdefault(f"{name}_bucket" if metric in HISTOGRAMS else f"{name}_total", set(LABELS))
    return found


def expressions() -> Iterator[tuple[str, str]]:
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["name"], variable["query"]["query"]


@pytest.mark.parametrize(("title", "expression"), list(expressions()))
def test_an_expression_names_what_exists(title: str, expression: str) -> None:
    series = known()
    bare = re.sub(r'"[^"]*"|\[[^\]]*\]', "", expression)
    names = set(re.findall(r"[a-z_]{3,}", bare)) - WORDS
    metrics = {name for name in names if name in series}
    assert metrics, f"{title}: no metric of ours in {expression}"
    labels = set().union(*(series[name] for name in metrics)) | TARGET
    assert names - metrics <= labels, f"{title}: neither a metric nor a label of it: {names - metrics - labels}"


def test_panels_do_not_lie_over_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert not cells & taken
        assert place["x"] + place["w"] <= 24
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
