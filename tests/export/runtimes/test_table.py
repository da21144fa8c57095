from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest

from keras_mha.export.formats import FORMATS
from keras_mha.export.runtimes.descriptor import AbsentError, File, Runtime
from keras_mha.export.runtimes.table import RUNTIMES


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_runtime_is_whole(name: str) -> None:
    runtime = RUNTIMES[name]
    module = importlib.import_module(f"keras_mha.export.runtimes.{runtime.module}")
    path, *options = inspect.signature(module.load).parameters.values()
    assert path.name == "path"
    assert {option.kind for option in options} <= {inspect.Parameter.KEYWORD_ONLY}
    assert {kind.partition("/")[0] for kind in runtime.reads} <= set(FORMATS)
    assert "keras_mha" in runtime.blocked


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_whole(name: str) -> None:
    one = FORMATS[name]
    reader = importlib.import_module(f"keras_mha.export.{name}.reader")
    assert list(inspect.signature(reader.open_file).parameters) == [
        *("path", "samples", "signature_name", "timeout")
    ]
    assert (one.name, bool(one.packages)) == (name, bool(one.extra))
    assert all(place.startswith(one.place.split("/")[0]) for place in one.writes)
    kinds = {kind for runtime in RUNTIMES.values() for kind in runtime.reads}
    assert name in kinds


def test_what_is_missing_is_told() -> None:
    def missing(*_: object) -> dict[str, str]:
        raise FileNotFoundError("apt-get install something")

    absent = Runtime("x", "X", ("x",), {"no_such_package": "some"})
    with pytest.raises(AbsentError, match=r"pip install 'keras-mha\[some\]'"):
        absent.check_present()
    incomplete = Runtime("x", "X", ("x",), find=missing, options=missing)
    with pytest.raises(AbsentError, match="apt-get install something"):
        incomplete.check_present()
    with pytest.raises(AbsentError, match="apt-get install something"):
        incomplete.options_for(File(Path("a"), "x"))
    Runtime("x", "X", ("x",)).check_present()
