"""Exports a model to the formats asked for, and tells how that goes."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keras_mha_cli import options
from keras_mha_cli.console import MISSING_PACKAGE, UNREADABLE, Console, StepError

if TYPE_CHECKING:
    from keras_mha.export import ExportReport

_RANGES = "representative_data"
# What `export_tflite` does with a model of texts, whole.
_OF_TEXTS = {"text", "metadata"}


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


def export(request: Request) -> int:
    """Does what was asked for; returns the exit code."""
    names = [option.argument for option in options.OPTIONS]
    console = Console(names, debug=request.debug)
    packages, extras = options.absent_packages(tuple(request.places))
    if packages:
        console.say(
            f"error: {', '.join(packages)} not installed: "
            f"pip install 'keras-mha[{','.join(extras)}]'"
        )
        return MISSING_PACKAGE
    return console.run(lambda: _export(request, console))


def _export(request: Request, console: Console) -> int:
    with console.step("start Keras and TensorFlow"):
        import keras_mha.export
        import keras_mha.models  # registers the layers that models hold
        import keras_mha.text
    model = console.load_model(request.model)
    values = dict(request.options)
    with console.step(f"load {request.samples}", UNREADABLE):
        values["samples"] = keras_mha.export.load_samples(request.samples)
        if _RANGES in values:
            values[_RANGES] = keras_mha.export.load_samples(values[_RANGES])
    if "metadata" in values:
        label = f"load {values['metadata']}"
        with console.step(label, (*UNREADABLE, TypeError)):
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
            with console.step(label, (ValueError, TypeError)):
                given[False] = _without_tokenizer(model, values)
        given[True] = (model, values | {"tokens": True})

    reports: dict[str, ExportReport] = {}
    failures: dict[str, StepError] = {}
    # TypeError: the samples' types are known only now.
    unfit = (ValueError, TypeError, OSError, keras_mha.export.VerificationError)
    for one in formats:
        exporter = getattr(keras_mha.export, one.exporter)
        part, chosen = given[takes_texts[one.name]]
        if one.name == "tflite":
            chosen = {name: chosen[name] for name in chosen if name != "tokens"}
        place = request.places[one.name]
        try:
            with console.step(f"export to {one.name}, {place}", unfit):
                reports[one.name] = exporter(
                    part, place, **options.of_format(chosen, one.name)
                )
        except StepError as failure:
            failures[one.name] = failure
    _tell(request, console, reports, failures)
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


def _tell(
    request: Request,
    console: Console,
    reports: Mapping[str, ExportReport],
    failures: Mapping[str, StepError],
) -> None:
    """Prints what was found out, and writes it where asked."""
    if request.in_full:  # then there is one format
        for report in reports.values():
            print(report.to_markdown())
            if request.report is not None:
                with console.step(f"write {request.report}", (OSError,)):
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
    with console.step(f"write {request.report}", (OSError,)):
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
