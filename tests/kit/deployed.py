"""What deploy/ grants, read from the manifests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

MANIFEST = Path(__file__).parents[2] / "deploy" / "kustomize" / "base" / "agent.yaml"


def capabilities() -> list[str]:
    """Of the agent's container, which has no others."""
    documents: list[Any] = list(yaml.safe_load_all(MANIFEST.read_text()))
    (daemon_set,) = [each for each in documents if each["kind"] == "DaemonSet"]
    granted = daemon_set["spec"]["template"]["spec"]["containers"][0]["securityContext"]["capabilities"]
    assert granted["drop"] == ["ALL"]
    found: list[str] = granted["add"]
    return found
