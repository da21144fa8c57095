"""The options of the exports, and checks of arguments before the work begins."""

from __future__ import annotations

import argparse
import importlib.util
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from keras_mha_cli.console import modules_of_this_directory
from keras_mha_cli.declared import FORMATS, options_of


def check_files(parser: argparse.ArgumentParser, paths: Iterable[Path]) -> None:
    """Ends the program where one of `paths` is not a file."""
    for path in paths:
        if not path.is_file():
            parser.error(
                f"{path} {'is not a file' if path.exists() else 'does not exist'}"
            )


def check_model(parser: argparse.ArgumentParser, path: Path) -> None:
    """Ends the program where the file at `path` cannot be a `.keras` file."""
    if not zipfile.is_zipfile(path):
        parser.error(
            f"{path} is not a .keras file, which `model.save('name.keras')` writes"
        )


def check_report(
    parser: argparse.ArgumentParser, path: Path, suffixes: Sequence[str]
) -> None:
    """Ends the program where no report can be written to `path`."""
    if path.suffix not in suffixes:
        *most, last = suffixes
        parser.error(f"--report must end in {', '.join(most)} or {last}")
    if not path.parent.is_dir():
        parser.error(f"the directory {path.parent} does not exist")


def add_import(parser: argparse.ArgumentParser) -> None:
    """Adds the option that names modules of the user's own layers."""
    parser.add_argument(
        "--import",
        dest="modules",
        action="append",
        default=[],
        metavar="MODULE",
        help="a module that registers your own layers, from the current directory or "
        "installed; its code is run; may be repeated",
    )


def check_modules(parser: argparse.ArgumentParser, modules: Iterable[str]) -> None:
    """Ends the program where one of `modules` is not there to be imported."""
    for module in modules:
        if not all(part.isidentifier() for part in module.split(".")):
            parser.error(
                f"--import takes the name of a module, such as my_layers, not {module}"
            )
        with modules_of_this_directory():
            if importlib.util.find_spec(module.split(".")[0]) is None:
                parser.error(
                    f"there is no module {module}, here or installed, to --import"
                )


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of all formats, one group for each set of formats.

    What the command line leaves out is absent from the result, so that the
    exporters' own defaults hold.
    """
    groups: dict[str, Any] = {}
    for option, formats in options_of(list(FORMATS)).values():
        title = f"for {', '.join(formats)}"
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        groups[title].add_argument(
            option.flag, default=argparse.SUPPRESS, **option.settings
        )


def chosen(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the exporters' options on the command line, by their names of them."""
    names = options_of(list(FORMATS))
    return {key: value for key, value in vars(arguments).items() if key in names}


def find_problem(values: Mapping[str, Any], formats: Sequence[str]) -> str | None:
    """Says what is wrong with `values` for an export to `formats`, if anything is."""
    options = options_of(list(FORMATS))
    for argument in values:
        option, of_formats = options[argument]
        if not set(of_formats) & set(formats):
            return (
                f"{option.flag} is for {' and '.join(of_formats)}, not for "
                f"{' and '.join(formats)}: leave it out, or add one to --to"
            )
    problems = (FORMATS[name].problem(values, formats) for name in formats)
    return next((problem for problem in problems if problem), None)


def absent_packages(formats: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the packages that `formats` need and lack, and their extras."""
    absent = {
        name: [p for p in FORMATS[name].packages if importlib.util.find_spec(p) is None]
        for name in formats
    }
    extras = [FORMATS[name].extra for name in formats if absent[name]]
    return [package for packages in absent.values() for package in packages], extras
