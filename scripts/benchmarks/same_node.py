"""`scripts/bench same-node`: what `tunnel.same_node: plaintext` buys between two pods of one node.

Two meshes of one node each, alike but for that setting, are up at the same time and measured side by side in every round. With one worker
the agent has a CPU of its own, and the client and the server of the load share the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace

from scripts.benchmarks import machine, scenarios
from scripts.benchmarks.conduct import conduct, write_report
from scripts.benchmarks.errors import BenchError
from scripts.benchmarks.figures import Figure, Measurement, judge
from scripts.benchmarks.options import Extent, Options, options, parser
from scripts.benchmarks.rounds import in_rounds
from scripts.benchmarks.rows import Against, Better, Row, rows
from scripts.benchmarks.table import table
from scripts.benchmarks.ways import Way, ours

RIVAL, JUDGED = "encrypt", "plaintext"
WAYS = {RIVAL: "HBONE", JUDGED: "LOCAL"}
"""Values of the setting, and how connections go under each."""
FULL, QUICK = Extent(5, 2.0), Extent(2, 0.6)
BULK_NOISE, NOISE = 0.07, 0.1
"""By so much equal figures differ, see tests/bench/README.md."""


def same_node_rows() -> tuple[Row, ...]:
    """Those of `l4` in which the two settings can differ. Plaintext is to be no worse, and we aim at nothing beyond that."""
    measured = ("bulk-", "cpu-", "ping-", "requests-32", "connections-")
    return tuple(_no_worse(row) for row in rows(1) if row.name.startswith(measured))


def _no_worse(row: Row) -> Row:
    noise = BULK_NOISE if row.name == "cpu-per-gb" or row.name.startswith("bulk-") else NOISE
    bound = round(1 - noise if row.better is Better.HIGHER else 1 + noise, 2)
    title = row.title.replace(", both proxies", ", the agent")
    return replace(row, title=title, against=Against.BASE, floor=bound, aim=bound)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run does."""

    options: Options

    @property
    def rows(self) -> tuple[Row, ...]:
        """The rows that are asked for; raises BenchError if there is none."""
        return self.options.chosen(same_node_rows())


def plan(words: Sequence[str]) -> Plan:
    """What the command line asks for."""
    return Plan(options(parser("same-node", __doc__, FULL, QUICK).parse_args(words), FULL, QUICK))


def main(words: Sequence[str]) -> int:
    """Exit code: see `conduct`."""
    asked = plan(words)
    return conduct(lambda measurements: measure(asked, measurements), lambda measurements: conclude(asked, measurements))


def measure(asked: Plan, measurements: list[Measurement]) -> None:
    """Adds all measurements of the run, as they are taken.

    Raises:
        BenchError: something that must be there is not, or the load did not go as the setting says.
    """
    wanted = {scenario for row in asked.rows for scenario in row.scenarios}
    how = asked.options
    with scenarios.set_up(how) as whole, ExitStack() as stack:
        bench = replace(whole, cpus=machine.Cpus(whole.cpus.far, whole.cpus.far))
        ways = [
            stack.enter_context(ours(whole.tools, whole.cpus, how.workers, each, nodes=1, settings=f"tunnel: {{same_node: {each}}}\n"))
            for each in WAYS
        ]
        for way in ways:
            scenarios.use(bench, way)
            _must_go_as_set(bench, way)
        every = {key: value for key, value in scenarios.EVERY_ROUND.items() if key in wanted}
        in_rounds(how.rounds, every, bench, ways, measurements)
        for way in ways:
            _must_go_as_set(bench, way)


def _must_go_as_set(bench: scenarios.Bench, way: Way) -> None:
    """Asked after a load: one more connection is held while the agent says how it goes, and whether there are tunnels."""
    assert way.protocols is not None
    with scenarios.holding(bench, way.client, way.server, 1) as held:
        held.await_all()
        check(way.name, way.protocols(), tunnels=way.has_tunnel())


def check(setting: str, protocols: set[str], *, tunnels: bool) -> None:
    """Raises BenchError if connections went otherwise than under that setting, or a tunnel is or is not there that should (not) be."""
    if protocols != {WAYS[setting]}:
        raise BenchError(f"{setting}: the load went as {', '.join(sorted(protocols)) or 'nothing that the agent knows'}")
    if tunnels is not (setting == RIVAL):
        raise BenchError(f"{setting}: there are {'tunnels' if tunnels else 'no tunnels'}")


def conclude(asked: Plan, measurements: Sequence[Measurement]) -> list[Figure]:
    """The table, and the report if one is asked for."""
    figures = [judge(row, measurements, (RIVAL,), judged=JUDGED) for row in asked.rows]
    print("\n".join(table(figures, tuple(WAYS), None)))
    print("ratios are medians of the rounds' own, plaintext to encrypt; a floor is 1 less what is noise")
    if asked.options.json is not None:
        write_report(asked.options.json, asdict(asked), figures, measurements)
    return figures
