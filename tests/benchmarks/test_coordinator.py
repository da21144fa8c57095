"""The coordinator and its workers, on contenders without a library."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import coordinator, worker
from benchmarks.cases import Comparison, Entry, MemoryComparison
from benchmarks.contenders.step import Step
from benchmarks.coordinator import ContenderError, Options, Workers, last_error

STUBS = "tests.support.benchmark_stubs"
# Each timing of `signing` is one call, after these: one to warm up, one to measure how
# many calls a timing needs.
WARMING = 2


def stub(label: str, name: str, package: str | None = None, **settings: Any) -> Entry:
    return Entry(label, f"{STUBS}.{name}", settings, package)


def silent(_: str) -> None:
    pass


def options(**changed: Any) -> Options:
    return Options(
        **{
            "reference": stub("reference", "steady"),
            "reference_operations": 1.0,
            "rounds": 2,
            "timeout": 60.0,
            **changed,
        }
    )


def times(*entries: Entry, **changed: Any) -> dict[str, Any]:
    chosen = options(**changed)
    with Workers(chosen) as workers:
        return coordinator.run_times(
            Comparison("title", entries, 3.0), workers, chosen, silent
        )


def by_label(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {entry["label"]: entry for entry in found["entries"]}


def test_rounds_go_through_all_contenders_in_turns(tmp_path: Path) -> None:
    path = tmp_path / "calls"
    reference, *entries = (
        Entry(label, f"{STUBS}.signing", {"name": label, "path": str(path)})
        for label in "rab"
    )
    found = times(*entries, reference=reference, rounds=3)
    prepared = "".join(name * WARMING for name in "rab")
    assert path.read_text("utf-8") == prepared + "rab" + "rba" + "rab"
    assert [len(entry["seconds"]) for entry in found["entries"]] == [3, 3]
    assert len(found["reference_seconds"]) == 3


def test_the_result_is_ready_for_json_and_holds_seconds_of_one_call() -> None:
    found = times(stub("slow", "steady", seconds=0.02), stub("fast", "steady"))
    assert json.loads(json.dumps(found)) == found
    assert (found["title"], found["operations"]) == ("title", 3.0)
    assert min(by_label(found)["slow"]["seconds"]) >= 0.02
    assert max(by_label(found)["fast"]["seconds"]) < 0.02


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (stub("x", "failing", text="no such kernel"), "ValueError: no such kernel"),
        (stub("x", "aborting"), "ended by SIGABRT"),
        (stub("x", "failing_at_call", number=WARMING + 2), "RuntimeError: worn out"),
        (
            stub("x", "steady", package="no_such_rival"),
            "no_such_rival is not installed",
        ),
    ],
)
def test_a_failure_is_named_and_stops_nobody_else(entry: Entry, reason: str) -> None:
    found = by_label(times(entry, stub("other", "steady")))
    assert found["x"]["failure"].startswith(reason)
    assert found["x"]["seconds"] == []
    assert found["other"]["failure"] is None
    assert len(found["other"]["seconds"]) == 2


def test_a_contender_without_an_answer_in_time_is_ended() -> None:
    found = times(stub("x", "steady", seconds=60.0), timeout=3.0)
    assert found["entries"][0]["failure"] == "no answer within 3 s"


def test_what_a_library_prints_is_no_answer() -> None:
    assert len(times(stub("x", "printing"))["entries"][0]["seconds"]) == 2


def test_a_process_serves_again_after_a_failure() -> None:
    chosen = options()
    with Workers(chosen) as workers:
        for name, settings, failed in (
            ("failing", {"text": "once"}, True),
            ("steady", {}, False),
        ):
            comparison = Comparison("title", (stub("x", name, **settings),))
            found = coordinator.run_times(comparison, workers, chosen, silent)
            assert bool(found["entries"][0]["failure"]) is failed


def test_without_the_reference_there_is_no_result() -> None:
    with pytest.raises(ContenderError, match="reference: ValueError: broken"):
        times(reference=stub("reference", "failing", text="broken"))


def test_memory_is_what_a_step_adds_at_its_peak() -> None:
    comparison = MemoryComparison(
        "title", (2**10, 2**12, 2**14), (stub("x", "filling"),), (2, 4, 2**12)
    )
    chosen = options(memory_limit=2**28)
    found = coordinator.run_memory(comparison, chosen, silent)
    small, large, failed = found["entries"][0]["peaks"]
    # B * N * H = 2**15, so 32 MiB, 128 MiB, and 512 MiB, which is above the limit.
    assert small == pytest.approx(2**25, rel=0.1)
    assert large == pytest.approx(2**27, rel=0.1)
    assert "MemoryError" in failed
    assert json.loads(json.dumps(found)) == found


def test_a_worker_calls_short_steps_often_and_divides() -> None:
    calls = []
    requests = [
        {"do": "prepare", "builder": f"{STUBS}.steady", "settings": {}},
        {"do": "run"},
    ]
    answers = io.StringIO()
    worker.answer(io.StringIO("\n".join(map(json.dumps, requests))), answers)
    prepared, ran = map(json.loads, answers.getvalue().splitlines())
    assert prepared["calls"] > 1
    assert 0 < ran["seconds"] < worker.SECONDS

    assert worker.timed(Step(lambda: calls.append(1), calls.append), 3) > 0
    # The last result, and it alone, is waited for.
    assert calls == [1, 1, 1, None]


def test_a_step_of_several_parts_counts_as_several(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker, "timed", lambda _, calls: 6.0 * calls)
    monkeypatch.setattr(worker, "build", lambda **_: Step(lambda: None, parts=3))
    answers = io.StringIO()
    worker.answer(io.StringIO('{"do": "prepare"}\n{"do": "run"}\n'), answers)
    assert json.loads(answers.getvalue().splitlines()[1]) == {"seconds": 2.0}


def test_a_worker_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="No such request: 'run'"):
        worker.answer(io.StringIO('{"do": "run"}'), io.StringIO())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        ("Traceback\n  File 'x'\nValueError: a / b\n", "ValueError: a / b"),
        ("a.b.ValueError: first\nKeyError: 'second'\nbye", "KeyError: 'second'"),
        ("ImportError: no x (/home/me/lib.py)", "ImportError: no x (lib.py)"),
        ("terminate called\n\n", "terminate called"),
        (
            "tf.OOMError: Graph error:\n\nDetected at x\n  File\nOOM of 3 GB\nHint",
            "OOMError: Graph error: OOM of 3 GB",
        ),
    ],
)
def test_the_reason_is_the_last_error_without_folders(text: str, expected: str) -> None:
    assert last_error(text) == expected
