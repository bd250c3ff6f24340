"""The table that a person reads. PURE: figures in, lines out."""

from __future__ import annotations

from collections.abc import Sequence

from scripts.benchmarks.figures import Figure, Verdict
from scripts.benchmarks.rows import Against, Better


def table(figures: Sequence[Figure], ways: Sequence[str], baseline: str | None) -> list[str]:
    """Lines of equal columns: medians of each way, then the ratio with its lowest and highest round, floor, aim and verdict."""
    header = ["figure", *ways, "ratio", "lowest–highest", "floor", "aim", *([f"× {baseline}"] if baseline else []), ""]
    lines = [header, *(_line(figure, ways, baseline) for figure in figures)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return [_aligned(line, widths) for line in lines]


def _line(figure: Figure, ways: Sequence[str], baseline: str | None) -> list[str]:
    row = figure.row
    sign = "≥" if row.better is Better.HIGHER else "≤"
    starred = figure.rival if row.against is Against.ENVOY else None
    missing = figure.verdict is Verdict.MISSING
    return [
        row.title,
        *(_number(figure.medians[way]) + ("*" if way == starred else "") if way in figure.medians else "-" for way in ways),
        "-" if missing or row.against is Against.NOTHING else f"{figure.ratio:.2f}",
        "-" if missing else f"{_ratio(min(figure.ratios))}–{_ratio(max(figure.ratios))}",
        f"{sign} {row.floor:g}",
        f"{row.aim:g}",
        *([_number(figure.gain) if figure.gain else "-"] if baseline else []),
        figure.verdict.value + (f" {figure.errors}" if figure.verdict is Verdict.ERRORS else ""),
    ]


def _ratio(value: float) -> str:
    return f"{value:.2f}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _aligned(line: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = (
        f"{cell:<{width}}" if at in (0, len(widths) - 1) else f"{cell:>{width}}"
        for at, (cell, width) in enumerate(zip(line, widths, strict=True))
    )
    return "  ".join([first, *others]).rstrip()
