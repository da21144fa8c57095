"""`keras-mha lint`: finds what a TFLite file's target refuses or computes wrongly."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keras_mha_cli.console import (
    INTERRUPTED_TEXT,
    WRONG_USAGE,
    Console,
    StepError,
)
from keras_mha_cli.declared import seconds
from keras_mha_cli.options import check_files

if TYPE_CHECKING:
    from keras_mha.export import Finding

_DESCRIPTION = """\
Names the operators in TFLite files that a target refuses, or silently computes
wrongly. A file is read in a process of its own and not run, so it need not be trusted.
A rule that is broken is one line, which says how to mend the model; the operators that
break it follow.
No finding does not mean that the values are right: `keras-mha verify` compares those.
"""

_EPILOG = f"""\
examples:
  Before a file goes to a phone's GPU:
    keras-mha lint dist/tflite/model_128.tflite --target gpu

  All files of a directory:
    keras-mha lint dist/tflite/*.tflite

exit codes:
  0  no errors; there may be warnings
  1  at least one error: the file does not run on the target, or computes wrongly
  2  wrong usage, or a file is missing, or is not a TFLite file
  3  a package is missing: the message is the command that installs it
  {INTERRUPTED_TEXT}
"""


def add_lint(commands: Any) -> None:
    """Adds the command to the parser's `commands`."""
    parser = commands.add_parser(
        "lint",
        help="find what a TFLite file's target refuses or computes wrongly",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "files", metavar="FILE", type=Path, nargs="+", help="TFLite files"
    )
    parser.add_argument(
        "--target",
        choices=("cpu", "gpu"),
        default="cpu",
        help="what will run it: LiteRT's interpreter, or its GPU delegate for the "
        "whole graph (default: cpu)",
    )
    parser.add_argument(
        "--timeout",
        type=seconds,
        default=60.0,
        metavar="SECONDS",
        help="how long reading one file may take (default: 60)",
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.set_defaults(run=lambda parsed: _run(parser, parsed))


def _run(parser: argparse.ArgumentParser, parsed: argparse.Namespace) -> int:
    check_files(parser, parsed.files)
    console = Console(("target", "timeout"), debug=parsed.debug)
    return console.run(lambda: _lint(console, parsed))


def _lint(console: Console, parsed: argparse.Namespace) -> int:
    """Prints the findings and their number; returns the exit code."""
    lint_tflite = console.start().export.lint_tflite
    code = 0
    for path in parsed.files:
        try:
            with console.step(f"read {path}", (ValueError, OSError), code=WRONG_USAGE):
                findings = lint_tflite(path, parsed.target, timeout=parsed.timeout)
        except StepError as error:  # the other files are read all the same
            code = max(code, error.code)
            continue
        for (severity, rule, message), broken in _by_rule(findings).items():
            print(f"{path}: {severity}: {rule}: {message}")
            for finding in broken:
                print(f"  {finding.place}")
        count = Counter(finding.severity for finding in findings)
        print(
            f"{path}, target {parsed.target}: {count['error']} errors, "
            f"{count['warning']} warnings"
        )
        code = max(code, int(count["error"] > 0))
    return code


def _by_rule(findings: Iterable[Finding]) -> dict[tuple[str, str, str], list[Finding]]:
    """Findings by severity, rule and message, in the order of their first ones."""
    rules: dict[tuple[str, str, str], list[Finding]] = {}
    for one in findings:
        rules.setdefault((one.severity, one.rule, one.message), []).append(one)
    return rules
