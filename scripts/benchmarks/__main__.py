"""`scripts/bench [SCENARIO] [OPTIONS]`: the scenario's own module takes the rest of the words."""

from __future__ import annotations

import sys

from scripts.benchmarks import kube, l4, profile, same_node, scale, waypoint

SCENARIOS = {
    "kube": kube.main,
    "l4": l4.main,
    "profile": profile.main,
    "same-node": same_node.main,
    "scale": scale.main,
    "waypoint": waypoint.main,
}


def main(words: list[str]) -> int:
    """Runs the scenario that the first word names; `l4` when it names none. Exit code: see there; 2: no such scenario."""
    if not words or words[0].startswith("-"):
        return SCENARIOS["l4"](words)
    scenario = SCENARIOS.get(words[0])
    if scenario is None:
        print(f"scripts/bench: no scenario {words[0]!r}; there are: {', '.join(SCENARIOS)}", file=sys.stderr)
        return 2
    return scenario(words[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
