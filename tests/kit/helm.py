"""The chart as a cluster would get it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import yaml

from tests.kit.kube_api import program

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "helm" / "ztunnel"
NAMESPACE = "ztunnel-system"
Json = dict[str, object]


class ChartRefused(AssertionError):
    """Helm does not take the values."""


def template(*arguments: str, namespace: str = NAMESPACE) -> str:
    """The manifests for values (as `--set a=b`).

    Raises:
        ChartRefused: with what Helm says.
    """
    command = [str(program("helm")), "template", "ztunnel", str(CHART), "--namespace", namespace, "--kube-version", "1.33", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ChartRefused(done.stderr)
    return done.stdout


def objects(manifests: str) -> dict[tuple[str, str], Json]:
    """By kind and name."""
    found: dict[tuple[str, str], Json] = {}
    for document in yaml.safe_load_all(manifests):
        if document is not None:
            found[document["kind"], document["metadata"]["name"]] = document
    return found


def document(text: str) -> dict[str, Any]:
    """One mapping, as a ConfigMap's file has it."""
    found = yaml.safe_load(text)  # noqa: TID251 - our own
    assert isinstance(found, dict)
    return found
