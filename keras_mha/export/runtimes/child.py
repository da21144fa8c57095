"""Runs an exported file where the package that wrote it cannot be imported.

    python child.py DIRECTORY

`DIRECTORY` holds `request.json` and `case_<i>.npz`. The answers are written next to
them as `answer_<i>.npz` and, last, `result.json`.
"""

from __future__ import annotations

import json
import socket
import struct
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

_SECONDS = struct.Struct("=d")  # what `fresh_process` reads


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
            import_module(name)
        except ModuleNotFoundError:
            continue
        raise RuntimeError(f"{name} could be imported in spite of the blocker")


def _import_sibling(name: str) -> ModuleType:
    """Imports a file of this folder as one of a package that has no `__init__`."""
    package = ModuleType("keras_mha_runtimes")
    package.__path__ = [str(Path(__file__).resolve().parent)]
    sys.modules.setdefault(package.__name__, package)
    return import_module(f"{package.__name__}.{name}")


def _take_turns(call: Callable[[], object], channel: int) -> None:
    """Times a call each time that the parent asks; no other process has its turn then.

    Args:
        call: What to time.
        channel: The number of the open socket to the parent.
    """
    with socket.socket(fileno=channel) as parent:
        parent.sendall(_SECONDS.pack(0.0))  # the answers are written
        while parent.recv(1):  # until the parent closes its end
            start = time.perf_counter()
            call()
            parent.sendall(_SECONDS.pack(time.perf_counter() - start))


def main(directory: Path) -> None:
    """Answers the request in `directory`."""
    request = json.loads((directory / "request.json").read_text("utf-8"))
    _block(request["blocked"])
    exchange = _import_sibling("exchange")
    runtime = _import_sibling(request["module"])
    answer, facts = runtime.load(request["path"], **request["options"])
    case = {}
    for i in range(request["cases"]):
        case = exchange.read_arrays(directory / f"case_{i}.npz")
        exchange.write_arrays(directory / f"answer_{i}.npz", answer(case))
    told = facts()
    if request["channel"] is not None:
        _take_turns(lambda: answer(case), request["channel"])
    imported = sorted(set(request["blocked"]) & set(sys.modules))
    if imported:
        raise RuntimeError(f"{imported} were imported in spite of the blocker")
    (directory / "result.json").write_text(json.dumps(told), "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
