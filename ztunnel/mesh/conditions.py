"""Conditions: what is said of an object in its status. Values only; who writes them adds the time and the observed generation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Condition:
    """One condition. `reason` is one word in CamelCase, `message` is for people."""

    type: str
    status: bool
    reason: str
    message: str = ""
