"""Runs an exported file where the package that wrote it cannot be imported.

    python child.py DIRECTORY

`DIRECTORY` holds `request.json` and `case_<i>.npz`; the answers are written
beside them as `answer_<i>.npz` and, last, `result.json`.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType


class _Blocker:
    """A meta-path finder that refuses packages by name."""

    def __init__(self, names: list[str]) -> None:
        self.names = frozenset(names)

    def find_spec(self, fullname: str, *_: object) -> None:
        if fullname.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"{fullname} is blocked here", name=fullname)


def _block(names: list[str]) -> None:
    sys.meta_path.insert(0, _Blocker(names))
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        raise RuntimeError(f"{name} could be imported in spite of the blocker")


def _load_sibling(name: str) -> ModuleType:
    path = Path(__file__).resolve().with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise RuntimeError(f"{path} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(directory: Path) -> None:
    """Answers the request in `directory`."""
    request = json.loads((directory / "request.json").read_text("utf-8"))
    _block(request["blocked"])
    exchange = _load_sibling("exchange")
    runtime = _load_sibling(request["runtime"])
    cases = [
        exchange.read_arrays(directory / f"case_{i}.npz")
        for i in range(request["cases"])
    ]
    if request["channel"] is not None:
        cases = _load_sibling("turns").Turns(cases, request["channel"])
    answers, facts = runtime.run(request["path"], cases, **request["options"])
    for i, answer in enumerate(answers[: len(cases)]):  # not those of later turns
        exchange.write_arrays(directory / f"answer_{i}.npz", answer)
    imported = sorted(set(request["blocked"]) & set(sys.modules))
    if imported:
        raise RuntimeError(f"{imported} were imported in spite of the blocker")
    (directory / "result.json").write_text(json.dumps(facts), "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
