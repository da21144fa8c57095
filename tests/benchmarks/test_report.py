"""Statistics, tables, files and the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cases, machine, report, session, summary
from benchmarks.cases import Comparison, MemoryComparison
from benchmarks.coordinator import Options
from tests.benchmarks.test_coordinator import stub

ROOT = Path(__file__).resolve().parents[2]
PNG = b"\x89PNG"


def timed(label: str, *seconds: float) -> dict[str, Any]:
    return {"label": label, "seconds": list(seconds), "failure": None}


def failed(label: str, why: str) -> dict[str, Any]:
    return {"label": label, "seconds": [], "failure": why}


def comparison(*entries: dict[str, Any], operations: float | None = 8.0) -> Any:
    return {
        "case": "core",
        "title": "a title",
        "operations": operations,
        "reference_seconds": [2.0, 4.0, 8.0],
        "entries": list(entries),
    }


MEMORY = {
    "case": "memory",
    "title": "memory of it",
    "lengths": [16, 64],
    "entries": [
        {"label": "keras_mha", "peaks": [1_500_000, 6_000_000]},
        {"label": "rival", "peaks": [24_000_000, "out of memory"]},
        {"label": "absent", "peaks": ["not installed", "not installed"]},
    ],
}


def results() -> dict[str, Any]:
    return {
        "machine": machine.describe(2),
        "rounds": 3,
        "reference": {"label": "the product", "operations": 16.0},
        "times": [
            comparison(timed("keras_mha", 1.0, 2.0, 4.0), timed("rival", 3, 5, 8)),
            comparison(failed("keras_mha", "no"), timed("rival", 3, 5, 8)),
            comparison(failed("keras_mha", "no"), failed("rival", "neither")),
        ],
        "memory": [MEMORY],
    }


def test_the_spread_is_median_and_quartiles() -> None:
    assert summary.spread([5.0, 1.0, 2.0, 4.0, 3.0]) == (2.0, 3.0, 4.0)
    assert summary.spread([7.0]) == (7.0, 7.0, 7.0)


def test_ratios_are_taken_within_a_round() -> None:
    # The machine was ten times slower in the second half: the medians' ratio is 10.
    assert summary.paired_ratio([2.0, 20.0, 20.0], [1.0, 10.0, 10.0]) == 2.0
    assert summary.paired_ratio([2.0, 2.0, 30.0], [1.0, 10.0, 10.0]) == 2.0


def test_rows_relate_to_the_product_and_to_the_first() -> None:
    ours, rival = summary.rows(
        comparison(timed("keras_mha", 1.0, 2.0, 4.0), timed("rival", 3.0, 5.0, 8.0)),
        16.0,
    )
    assert isinstance(ours, summary.Row)
    assert isinstance(rival, summary.Row)
    # 8 operations in half the time of a product of 16.
    assert (ours.share, ours.products, ours.times) == (1.0, 0.5, 1.0)
    assert (rival.share, rival.products, rival.times) == (0.4, 1.25, 2.5)
    assert rival.seconds == (4.0, 5.0, 6.5)


def test_rows_without_operations_or_without_the_first() -> None:
    found = comparison(failed("first", "why"), timed("rival", 1, 1, 1), operations=None)
    reason, row = summary.rows(found, 16.0)
    assert reason == "first: why"
    assert isinstance(row, summary.Row)
    assert (row.share, row.times) == (None, None)


def test_tables_name_everything() -> None:
    text = report.markdown(results())
    for line in (
        "| keras_mha | 2 s (1.5 s to 3 s) | 1.00           | 0.5      | 1.00  |",
        "| rival     | 5 s (4 s to 6.5 s) | 0.40           | 1.25     | 2.50  |",
    ):
        assert line in text
    assert "\nkeras_mha: no\n" in text
    assert "\nrival: neither\n" in text
    assert "| keras_mha | 0.0015 GB | 0.006 GB |" in text
    assert "| rival     | 0.024 GB  | failed   |" in text
    assert "\nrival, T=64: out of memory\n" in text
    assert "tensorflow" in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(12.34, "12.3 s"), (1.0, "1 s"), (0.01234, "12.3 ms"), (4.2e-5, "42 µs")],
)
def test_durations_have_three_digits_and_a_unit(seconds: float, text: str) -> None:
    assert report.duration(seconds) == text


def test_a_run_is_written_and_drawn_anew_from_its_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Once: the machine's load is in it, and changes.
    found = results()
    report.write(found, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text("utf-8")) == found
    for name in ("results.md", "times.png", "memory.png"):
        written = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
        monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / "results.json")])
        report.main()
        assert (tmp_path / name).read_bytes() == written
    assert written.startswith(PNG)
    assert (tmp_path / "times.png").read_bytes().startswith(PNG)


def test_the_machine_is_described_without_naming_it() -> None:
    described = machine.describe(3)
    assert json.loads(json.dumps(described)) == described
    assert described["threads"] == 3
    assert described["memory_gib"] > 0
    words = machine.in_words(
        {**described, "packages": {"torch": None, "keras": "3.15.1"}}
    )
    assert "torch not installed" in words
    assert "keras 3.15.1" in words
    assert str(ROOT) not in json.dumps(described)


def test_a_session_shows_and_writes_each_group(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    groups = {
        "quick": lambda: [Comparison("waiting", (stub("keras_mha", "steady"),), 1.0)],
        "large": lambda: [
            MemoryComparison("room", (4, 8), (stub("x", "filling"),), (1, 1, 2**20))
        ],
    }
    options = Options(stub("reference", "steady"), 1.0, rounds=1)
    found = session.run(groups, options, machine.describe(1), tmp_path / "new")
    shown = capsys.readouterr()
    assert "## waiting" in shown.out
    assert "## room" in shown.out
    assert "waiting: round 1 of 1" in shown.err
    assert [part["case"] for part in found["times"] + found["memory"]] == list(groups)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "memory.png",
        "results.json",
        "results.md",
        "times.png",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["core", "nonsense"], "no such case: nonsense; known: layer, core"),
        (["--rounds", "0"], "--rounds must be above 0"),
    ],
)
def test_the_command_line_refuses_what_it_cannot_do(
    arguments: list[str], message: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.slow
def test_every_case_of_ours_runs(tmp_path: Path) -> None:
    # All but packing, which downloads the reviews.
    names = sorted(set(cases.CASES) - {"packing"})
    command = ["benchmarks", *names, "--smoke", "--rounds", "1"]
    subprocess.run(
        [sys.executable, "-m", *command, "--output", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    found = json.loads((tmp_path / "results.json").read_text("utf-8"))
    for part in found["times"]:
        for entry in part["entries"]:
            absent = "is not installed" in (entry["failure"] or "")
            assert absent or entry["seconds"], entry
    for part in found["memory"]:
        for entry in part["entries"]:
            for peak in entry["peaks"]:
                assert isinstance(peak, int) or "is not installed" in peak, entry
