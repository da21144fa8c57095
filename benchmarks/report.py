"""Results as tables, JSON and plots.

    python -m benchmarks.report results.json

Rewrites the tables and plots of a run, next to its `results.json`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks import machine, summary

BAR_HEIGHT = 0.24
WIDTH = 8.0
COLUMNS = 2
OURS, RIVAL = "#0b6e4f", "#9aa5b1"


def write(results: dict[str, Any], folder: Path) -> None:
    """Writes `results.json` and `results.md`, and `times.png` and `memory.png`."""
    write_json(results, folder)
    (folder / "results.md").write_text(markdown(results), encoding="utf-8")
    if results["times"]:
        draw_times(results, folder / "times.png")
    if results["memory"]:
        draw_memory(results, folder / "memory.png")


def write_json(results: dict[str, Any], folder: Path) -> None:
    """Writes `results.json`: all timings, from which all else follows."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1) + "\n"
    (folder / "results.json").write_text(text, encoding="utf-8")


def markdown(results: dict[str, Any]) -> str:
    """Writes all tables, and the machine that measured them, as Markdown."""
    reference = results["reference"]
    parts = [
        "# Results",
        machine.in_words(results["machine"]),
        f"{results['rounds']} rounds. Medians, in brackets the quartiles. "
        f'"Of the product" is the share of the rate of: {reference["label"]}. '
        '"Products" is the time in such products. "Times" is the time over that of '
        "the first line, both of one round.",
    ]
    parts += [times_table(each, reference) for each in results["times"]]
    parts += [memory_table(each) for each in results["memory"]]
    return "\n\n".join(parts) + "\n"


def times_table(comparison: dict[str, Any], reference: dict[str, Any]) -> str:
    """Writes a comparison as a Markdown table, with failures below."""
    rows = summary.rows(comparison, reference["operations"])
    cells = [
        (
            row.label,
            f"{duration(row.seconds.median)} "
            f"({duration(row.seconds.lower)} to {duration(row.seconds.upper)})",
            "" if row.share is None else f"{row.share:.2f}",
            f"{row.products:.3g}",
            "" if row.times is None else f"{row.times:.2f}",
        )
        for row in rows
        if isinstance(row, summary.Row)
    ]
    product = summary.spread(comparison["reference_seconds"])
    rate = reference["operations"] / product.median / 1e9
    return "\n\n".join(
        [
            f"## {comparison['title']}",
            _table(("", "time", "of the product", "products", "times"), cells),
            f"The product: {rate:.0f} GFLOP/s.",
            *(row for row in rows if isinstance(row, str)),
        ]
    )


def memory_table(comparison: dict[str, Any]) -> str:
    """Writes peaks by length as a Markdown table, with failures below."""
    failures = []
    cells = []
    for entry in comparison["entries"]:
        line = [entry["label"]]
        for length, peak in zip(comparison["lengths"], entry["peaks"], strict=True):
            if isinstance(peak, str):
                line.append("failed")
                failures.append(f"{entry['label']}, T={length}: {peak}")
            else:
                line.append(f"{peak / 1e9:.3g} GB")
        cells.append(tuple(line))
    heads = ("", *(f"T={length}" for length in comparison["lengths"]))
    return "\n\n".join([f"## {comparison['title']}", _table(heads, cells), *failures])


def draw_times(results: dict[str, Any], path: Path) -> None:
    """Draws each comparison as a panel of bars: medians, with quartiles as whiskers."""
    from matplotlib.figure import Figure

    panels = [(each["title"], _measured(each, results)) for each in results["times"]]
    heights = [1.2 + BAR_HEIGHT * max(len(rows), 1) for _, rows in panels]
    lines = [
        max(heights[start : start + COLUMNS])
        for start in range(0, len(panels), COLUMNS)
    ]
    figure = Figure(figsize=(WIDTH * COLUMNS, sum(lines)), layout="constrained")
    axes = figure.subplots(len(lines), COLUMNS, height_ratios=lines, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (title, rows) in zip(axes.flat, panels, strict=False):
        medians = [row.seconds.median for row in rows]
        whiskers = [
            [row.seconds.median - row.seconds.lower for row in rows],
            [row.seconds.upper - row.seconds.median for row in rows],
        ]
        labels = [row.label for row in rows]
        bars = axis.barh(labels, medians, xerr=whiskers, color=_colors(labels))
        axis.bar_label(bars, [duration(value) for value in medians], padding=3)
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.set_title(title, fontsize="medium")
        axis.set_xlabel("seconds")
    figure.savefig(path, dpi=80)


def draw_memory(results: dict[str, Any], path: Path) -> None:
    """Plots peaks over the length, both in logarithms; failures have no point."""
    from matplotlib.figure import Figure

    comparisons = results["memory"]
    figure = Figure(figsize=(WIDTH, 5 * len(comparisons)), layout="constrained")
    axes = figure.subplots(len(comparisons), 1, squeeze=False)
    for axis, comparison in zip(axes.flat, comparisons, strict=True):
        for entry in comparison["entries"]:
            points = [
                (length, peak / 1e9)
                for length, peak in zip(
                    comparison["lengths"], entry["peaks"], strict=True
                )
                if not isinstance(peak, str)
            ]
            style = "o-" if _is_ours(entry["label"]) else "s--"
            lengths, peaks = zip(*points, strict=True) if points else ((), ())
            axis.plot(lengths, peaks, style, label=entry["label"])
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_title(comparison["title"], fontsize="medium")
        axis.set_xlabel("T")
        axis.set_ylabel("GB above the base")
        axis.legend()
    figure.savefig(path, dpi=100)


def duration(seconds: float) -> str:
    """Formats seconds with three digits and a unit that fits."""
    for unit, factor in (("s", 1), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _measured(comparison: dict[str, Any], results: dict[str, Any]) -> list[summary.Row]:
    rows = summary.rows(comparison, results["reference"]["operations"])
    return [row for row in rows if isinstance(row, summary.Row)]


def _colors(labels: list[str]) -> list[str]:
    return [OURS if _is_ours(label) else RIVAL for label in labels]


def _is_ours(label: str) -> bool:
    return label.startswith("keras_mha")


def _table(heads: tuple[str, ...], cells: list[tuple[str, ...]]) -> str:
    """Aligns the columns, so that a terminal shows them too."""
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    lines = [
        tuple(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in (heads, *cells)
    ]
    lines.insert(1, tuple("-" * max(width, 1) for width in widths))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Writes tables and plots anew from a run's JSON."""
    parser = argparse.ArgumentParser(description="Draws a run's results anew.")
    parser.add_argument("results", type=Path, help="a results.json")
    path = parser.parse_args().results
    write(json.loads(path.read_text(encoding="utf-8")), path.parent)


if __name__ == "__main__":
    main()
