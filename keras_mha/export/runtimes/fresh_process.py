"""Runs an exported file in a fresh process that cannot import this package."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from keras_mha.export.parity import VerificationError
from keras_mha.export.runtimes import exchange
from keras_mha.export.runtimes.descriptor import AbsentError, Arrays, File, Runtime

_CHILD = Path(exchange.__file__).with_name("child.py")
_SECONDS = struct.Struct("=d")  # what the child sends


def run_in_fresh_process(
    runtime: Runtime, file: File, cases: Sequence[Arrays], *, timeout: float
) -> tuple[list[Arrays], dict[str, Any]]:
    """Runs every case on a file.

    Args:
        runtime: What runs it.
        file: The exported file or directory.
        cases: Arrays by input name, for each run.
        timeout: Seconds that the process may take.

    Returns:
        The arrays by output name for each run, and facts about the run: those that
        the runtime tells, `runtime` and `blocked`.

    Raises:
        VerificationError: If the process fails, is killed or takes too long, or
            something that the file needs is missing.
    """
    try:
        with FreshProcess(runtime, file, cases) as process:
            return process.finish(timeout)
    except AbsentError as error:
        raise VerificationError(str(error)) from error


class FreshProcess:
    """A process that runs every case on a file; it ends with the `with` block.

    Args:
        runtime: What runs it.
        file: The exported file or directory.
        cases: Arrays by input name, for each run.
        in_turns: Whether it afterwards runs the last case again whenever asked, so
            that it can be timed in turns with others.

    Raises:
        AbsentError: If something that the file needs is missing.
    """

    def __init__(
        self,
        runtime: Runtime,
        file: File,
        cases: Sequence[Arrays],
        *,
        in_turns: bool = False,
    ) -> None:
        self._what = f"{runtime.module} on {file.path.name}"
        self._cases = len(cases)
        self._known = {"runtime": runtime.label, "blocked": runtime.blocked}
        self._channel: socket.socket | None = None
        options = runtime.options_for(file)
        with ExitStack() as stack:
            self._directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            channel = None
            if in_turns:
                self._channel, channel = map(stack.enter_context, socket.socketpair())
            request = {
                "module": runtime.module,
                "path": str(file.path.resolve()),
                "cases": len(cases),
                "blocked": runtime.blocked,
                "options": dict(options),
                "channel": channel and channel.fileno(),
            }
            (self._directory / "request.json").write_text(json.dumps(request), "utf-8")
            for i, case in enumerate(cases):
                exchange.write_arrays(self._directory / f"case_{i}.npz", case)
            # A file, which nobody needs to empty while others have their turns.
            stderr = stack.enter_context((self._directory / "stderr").open("wb"))
            self._process = subprocess.Popen(
                [*runtime.python(), str(_CHILD), str(self._directory)],
                env=os.environ | _settings(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                pass_fds=[] if channel is None else [channel.fileno()],
            )
            stderr.close()
            if channel is not None:
                channel.close()  # so that the child's end is the only one
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._stack.close()

    def wait_for_values(self, timeout: float) -> None:
        """Waits until every case was run once; needs `in_turns`.

        Raises:
            VerificationError: If the process fails, is killed or takes too long.
        """
        self._hear(timeout)

    def time_call(self, timeout: float) -> float:
        """Runs the last case once more and returns its seconds; needs `in_turns`.

        Raises:
            VerificationError: If the process fails, is killed or takes too long.
        """
        return self._hear(timeout, asked=b"?")

    def finish(self, timeout: float) -> tuple[list[Arrays], dict[str, Any]]:
        """Waits for the end and reads what `run_in_fresh_process` returns.

        Raises:
            VerificationError: If the process fails, is killed or takes too long.
        """
        if self._channel is not None:
            self._channel.close()
        try:
            status = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise self._took_too_long(timeout) from None
        if status != 0:
            end = (
                f"was killed by signal {-status}"
                if status < 0
                else f"failed with exit status {status}"
            )
            raise VerificationError(f"{self._what} {end}.{self._tail()}")
        facts = json.loads((self._directory / "result.json").read_text("utf-8"))
        answers: list[Arrays] = [
            exchange.read_arrays(self._directory / f"answer_{i}.npz")
            for i in range(self._cases)
        ]
        return answers, facts | self._known

    def _hear(self, timeout: float, asked: bytes = b"") -> float:
        """Returns the seconds that the process tells."""
        if self._channel is None:
            raise RuntimeError("the process was not started with `in_turns`")
        self._channel.settimeout(timeout)
        try:
            self._channel.sendall(asked)
            told = self._channel.recv(_SECONDS.size)
        except TimeoutError:
            raise self._took_too_long(timeout) from None
        except ConnectionError:
            told = b""
        if not told:
            self.finish(timeout)  # says why
            raise VerificationError(f"{self._what} ended too early.{self._tail()}")
        return _SECONDS.unpack(told)[0]

    def _took_too_long(self, timeout: float) -> VerificationError:
        return VerificationError(
            f"{self._what} took longer than timeout={timeout} s.{self._tail()}"
        )

    def _tail(self) -> str:
        content = (self._directory / "stderr").read_bytes().decode("utf-8", "replace")
        lines = content.strip().splitlines()
        return "\nIts last words:\n" + "\n".join(lines[-20:]) if lines else ""


def _settings() -> dict[str, str]:
    # CPU results are compared; a visible GPU would only be occupied.
    settings = {"CUDA_VISIBLE_DEVICES": "-1"}
    if "TF_CPP_MIN_LOG_LEVEL" not in os.environ:
        settings["TF_CPP_MIN_LOG_LEVEL"] = "2"
    return settings
