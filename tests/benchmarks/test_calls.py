"""How much of the package a call goes through."""

from __future__ import annotations

from benchmarks import calls

LIMITS = {
    "plain": calls.Count(files=11, frames=75),
    "padding, causal": calls.Count(files=11, frames=95),
    "rotary, blockwise, padding, causal": calls.Count(files=17, frames=190),
}


def test_calls_stay_short() -> None:
    counts = calls.counts()
    assert counts.keys() == LIMITS.keys()
    for name, (files, frames) in counts.items():
        assert 0 < files <= LIMITS[name].files, name
        assert files < frames <= LIMITS[name].frames, name


def test_times_are_of_both_layers() -> None:
    for _, times in calls.times(rounds=1):
        assert min(times) > 0
