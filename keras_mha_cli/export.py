"""Exports a model to the formats asked for, and tells how that goes."""

from __future__ import annotations

import inspect
import json
import os
import re
import sys
import time
import traceback
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keras_mha_cli import options

if TYPE_CHECKING:
    from keras_mha.export import ExportReport

# How reading a file fails: as a whole, or where an entry of it is missing.
_UNREADABLE = (ValueError, OSError, KeyError, EOFError, zipfile.BadZipFile)
_RANGES = "representative_data"
# What `export_tflite` does with a model of texts, whole.
_OF_TEXTS = {"text", "metadata"}
_FAILED, _MISSING_PACKAGE, _INTERRUPTED = 1, 3, 130


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line.

    Attributes:
        model: The `.keras` file.
        samples: The file of samples.
        places: Where each format goes, by its name.
        options: What was given of `options.OPTIONS`, by the exporters' names.
        report: Where the report goes, if anywhere.
        debug: Whether errors are shown with their traceback.
        in_full: Whether the whole report is printed, and not its summary.
    """

    model: Path
    samples: Path
    places: Mapping[str, Path]
    options: Mapping[str, Any]
    report: Path | None
    debug: bool
    in_full: bool


class _StepError(Exception):
    """A step that failed in a way that was to be expected."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def export(request: Request) -> int:
    """Does what was asked for; returns the exit code."""
    packages, extras = options.absent_packages(tuple(request.places))
    if packages:
        _say(
            f"error: {', '.join(packages)} not installed: "
            f"pip install 'keras-mha[{','.join(extras)}]'"
        )
        return _MISSING_PACKAGE
    # Read when TensorFlow is imported, whose notes on the machine hide what is said.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "0" if request.debug else "3")
    # What the files answer is computed on the CPU, and compared.
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return _export(request)
    except _StepError as error:
        return error.code
    except KeyboardInterrupt:
        _say("interrupted; what is unfinished was removed")
        return _INTERRUPTED


def _export(request: Request) -> int:
    with _step("start Keras and TensorFlow", request.debug):
        import keras_mha.export
        import keras_mha.text  # registers the layers that models hold
    with _step(f"load {request.model}", request.debug, (ValueError,)):
        model = _load_model(request.model)
    values = dict(request.options)
    with _step(f"load {request.samples}", request.debug, _UNREADABLE):
        values["samples"] = keras_mha.export.load_samples(request.samples)
        if _RANGES in values:
            values[_RANGES] = keras_mha.export.load_samples(values[_RANGES])
    if "metadata" in values:
        with _step(
            f"load {values['metadata']}", request.debug, (*_UNREADABLE, TypeError)
        ):
            values["metadata"] = _load_metadata(values["metadata"])
    formats = [options.FORMATS[name] for name in request.places]
    # By whether the format takes texts.
    takes_texts = {
        one.name: one.takes_texts
        or (one.name == "tflite" and bool(_OF_TEXTS & {*values}))
        for one in formats
    }
    given = {True: (model, values), False: (model, values)}
    if values.pop("tokens", False):
        if not all(takes_texts.values()):
            label = "cut the model after its tokenizer"
            with _step(label, request.debug, (ValueError, TypeError)):
                given[False] = _without_tokenizer(model, values)
        given[True] = (model, values | {"tokens": True})

    reports: dict[str, ExportReport] = {}
    failures: dict[str, _StepError] = {}
    # TypeError: the samples' types are known only now.
    unfit = (ValueError, TypeError, OSError, keras_mha.export.VerificationError)
    for one in formats:
        exporter = getattr(keras_mha.export, one.exporter)
        part, chosen = given[takes_texts[one.name]]
        if one.name == "tflite":
            chosen = {name: chosen[name] for name in chosen if name != "tokens"}
        place = request.places[one.name]
        try:
            with _step(f"export to {one.name}, {place}", request.debug, unfit):
                reports[one.name] = exporter(
                    part, place, **options.of_format(chosen, one.name)
                )
        except _StepError as failure:
            failures[one.name] = failure
    _tell(request, reports, failures)
    return max((failure.code for failure in failures.values()), default=0)


def _without_tokenizer(model: Any, values: dict[str, Any]) -> tuple[Any, dict]:
    """The part of the model that takes ids, and `values` with ids for texts."""
    from keras_mha.export import without_tokenizer

    part, samples = without_tokenizer(model, values["samples"])
    cut = values | {"samples": samples}
    if _RANGES in values:
        cut[_RANGES] = without_tokenizer(model, values[_RANGES])[1]
    return part, cut


def _load_metadata(path: Path) -> Any:
    """Labels, one in a line, or all that metadata can hold, by name."""
    from keras_mha.export import BertMetadata, RegexMetadata, load_samples

    if path.suffix == ".txt":
        return BertMetadata(load_samples(path))
    fields = json.loads(path.read_text("utf-8"))
    named = isinstance(fields, dict)
    kind = RegexMetadata if named and "delimiter" in fields else BertMetadata
    known = list(inspect.signature(kind).parameters)
    if not named or "labels" not in fields or set(fields) - {*known}:
        raise ValueError(
            f"`metadata` must hold an object with `labels` and further of {known}. "
            f"Received in {path}: {list(fields) if named else type(fields).__name__}"
        )
    return kind(**fields)


def _load_model(path: Path) -> Any:
    import keras

    try:
        return keras.saving.load_model(path)
    except TypeError as error:  # a layer's class is unknown, or cannot be made
        _raise_import_error(error)
        # Keras quotes the configuration of every layer around the one that failed.
        told = str(error).rsplit("Exception encountered: ")[-1]
        raise ValueError(
            f"{told.split(' Full object config')[0]}\nThis command loads layers of "
            "Keras and of keras_mha. For layers of your own, import them and call "
            "`keras_mha.export` in Python."
        ) from error
    except _UNREADABLE as error:
        raise ValueError(f"{path} holds no whole model: {error}") from error


def _raise_import_error(error: BaseException | None) -> None:
    """Raises the ImportError that led to `error`, if one did."""
    while error is not None:
        if isinstance(error, ImportError):
            raise error
        error = error.__cause__ or error.__context__


@contextmanager
def _step(
    label: str, debug: bool, expected: Sequence[type[Exception]] = ()
) -> Iterator[None]:
    """Says what is done, and how long it took or why it failed.

    Raises:
        _StepError: For an ImportError, and for errors that are `expected`.
    """
    _say(f"{label} ...")
    start = time.perf_counter()
    try:
        yield
    except (ImportError, *expected) as error:
        if debug:
            traceback.print_exc()
        message = _as_options(f"{error}" or type(error).__name__)
        _say(f"error: {message}")
        missing = isinstance(error, ImportError)
        raise _StepError(message, _MISSING_PACKAGE if missing else _FAILED) from error
    _say(f"{label}: done in {time.perf_counter() - start:.1f} s")


def _as_options(message: str) -> str:
    """Calls arguments of the exporters by the names that they have on a command line.

    Example:

    >>> _as_options("pass `overwrite=True` or another `version`, not `target='gpu'`")
    'pass `--overwrite` or another `--version`, not `--target gpu`'
    """
    flags = {option.argument: option.flag for option in options.OPTIONS}
    flags |= {"samples": "--samples", "model": "MODEL", "without_tokenizer": "--tokens"}

    def rename(found: re.Match[str]) -> str:
        name, value = found.groups()
        if name not in flags:
            return found[0]
        told = "" if value in (None, "True") else f" {value.strip(chr(39))}"
        return f"`{flags[name]}{told}`"

    return re.sub(r"`(\w+)(?:=([^`]*))?`", rename, message)


def _say(message: str) -> None:
    print(f"keras-mha: {message}", file=sys.stderr, flush=True)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    _say(f"warning: {_as_options(str(message))}")


def _tell(
    request: Request,
    reports: Mapping[str, ExportReport],
    failures: Mapping[str, _StepError],
) -> None:
    """Prints what was found out, and writes it where asked."""
    if request.in_full:  # then there is one format
        for report in reports.values():
            print(report.to_markdown())
            if request.report is not None:
                with _step(f"write {request.report}", request.debug, (OSError,)):
                    report.write(request.report)
        return
    summary = _summary(request.places, reports)
    print(summary)
    if request.report is None:
        return
    if request.report.suffix == ".json":
        found = {name: report.to_dict() for name, report in reports.items()}
        found |= {name: {"error": str(error)} for name, error in failures.items()}
        text = json.dumps(found, indent=2)
    else:
        told = [f"## {name}: not written\n\n{e}" for name, e in failures.items()]
        full = [report.to_markdown() for report in reports.values()]
        text = "\n\n".join([summary, *full, *told])
    with _step(f"write {request.report}", request.debug, (OSError,)):
        beside = request.report.with_name(f".{request.report.name}.part")
        beside.write_text(text + "\n", "utf-8")
        beside.replace(request.report)


def _summary(places: Mapping[str, Path], reports: Mapping[str, ExportReport]) -> str:
    """A Markdown table with a line for each file."""
    rows = [
        "| format | written | size in bytes | largest difference | allowed | run by |",
        "| --- | --- | ---: | ---: | ---: | --- |",
    ]
    for name in places:
        if name not in reports:
            rows.append(f"| {name} | nothing: it failed | | | | |")
            continue
        fields = reports[name].to_dict()
        for file in fields.get("files", [fields]):
            parity = file["parity"]
            rows.append(
                f"| {name} | {file['path']} | {file['size_bytes']} | "
                f"{parity['max_absolute_difference']:.3g} | "
                f"{parity['tolerance']:.3g} | "
                f"{parity['runtime']} {parity['runtime_version']}"
                f"{_in_mediapipe(file.get('mediapipe'))} |"
            )
    return "\n".join(rows)


def _in_mediapipe(check: Mapping[str, Any] | None) -> str:
    if check is None:
        return ""
    if check["status"] != "ok":
        return f"; MediaPipe {check['status']}: {check['reason']}"
    return (
        f"; MediaPipe {check['parity']['runtime_version']}, "
        f"{check['same_ids']} of {check['texts']} texts into the same ids"
    )
