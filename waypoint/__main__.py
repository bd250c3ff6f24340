"""`python -m waypoint`."""

from __future__ import annotations

from waypoint.cli import main

main()
