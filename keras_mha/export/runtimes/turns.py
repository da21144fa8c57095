"""Cases that a runtime goes through, the last of them in turns with other processes.

Stand-alone: the standard library.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

SECONDS = struct.Struct("=d")


class Turns(Sequence[Mapping[str, Any]]):
    """Gives every case once, then the last again each time that the parent asks.

    What a runtime does between two cases is one call: it takes from one `next` to the
    following. The parent is told how long, and no other process has its turn then.

    Args:
        cases: The cases.
        channel: Number of the open socket to the parent.
    """

    def __init__(self, cases: Sequence[Mapping[str, Any]], channel: int) -> None:
        self.cases = cases
        self.channel = channel

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: Any) -> Any:
        return self.cases[index]

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        yield from self.cases
        with socket.socket(fileno=self.channel) as parent:
            parent.sendall(SECONDS.pack(0.0))  # the values are there
            while parent.recv(1):  # until the parent closes its end
                start = time.perf_counter()
                yield self.cases[-1]
                parent.sendall(SECONDS.pack(time.perf_counter() - start))
