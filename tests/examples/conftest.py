"""The modules of an example, which its programs import by their short names."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "sentiment"


@pytest.fixture(scope="module")
def example(request: pytest.FixtureRequest) -> Iterator[dict[str, ModuleType]]:
    """Those that a test file names in `MODULES`."""
    names = request.module.MODULES
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLE))
        for name in names:
            patch.delitem(sys.modules, name, raising=False)
        yield {name: importlib.import_module(name) for name in names}
        for name in names:
            patch.delitem(sys.modules, name, raising=False)
