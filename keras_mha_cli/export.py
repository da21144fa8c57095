"""Exports a model to the formats asked for, and tells how that goes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keras_mha_cli import options
from keras_mha_cli.console import MISSING_PACKAGE, UNREADABLE, Console, StepError
from keras_mha_cli.declared import FORMATS, options_of

if TYPE_CHECKING:
    from keras_mha.export import ExportReport


@dataclass(frozen=True)
class Request:
    """The export asked for on the command line.

    Attributes:
        model: The `.keras` file.
        samples: The file of samples.
        places: Where each format goes, by its name.
        options: The exporters' options, by their names of them.
        tokens: Whether formats that take no strings get the part after the tokenizer.
        modules: Modules that register the user's own layers.
        report: Where the report goes, if anywhere.
        debug: Whether errors are shown with their traceback.
    """

    model: Path
    samples: Path
    places: Mapping[str, Path]
    options: Mapping[str, Any]
    tokens: bool
    modules: Sequence[str]
    report: Path | None
    debug: bool


def export(request: Request) -> int:
    """Does what was asked for; returns the exit code."""
    console = Console(("tokens", *options_of(list(FORMATS))), debug=request.debug)
    packages, extras = options.absent_packages(tuple(request.places))
    if packages:
        console.say(
            f"error: {', '.join(packages)} not installed: "
            f"pip install 'keras-mha[{','.join(extras)}]'"
        )
        return MISSING_PACKAGE
    return console.run(lambda: _export(request, console))


def _export(request: Request, console: Console) -> int:
    keras_mha = console.start()
    model = console.load_model(request.model, request.modules)
    known = options_of(list(request.places))
    values = dict(request.options)
    with console.step(f"load {request.samples}", UNREADABLE):
        values["samples"] = keras_mha.export.load_samples(request.samples)
    samples = ["samples"]  # and further arguments of this kind
    for name in request.options:
        read = known[name][0].read if name in known else None
        if read is not None:
            unreadable = (*UNREADABLE, TypeError)
            with console.step(f"load {values[name]}", unreadable):
                if read == "samples":
                    samples.append(name)
                    read = keras_mha.export.load_samples
                values[name] = read(values[name])
    texts = {name for name in request.places if FORMATS[name].takes_texts(values)}
    cut: tuple[Any, dict[str, Any]] = (model, {})
    if request.tokens and texts != set(request.places):
        label = "cut the model after its tokenizer"
        with console.step(label, (ValueError, TypeError)):
            cut = _without_tokenizer(model, {name: values[name] for name in samples})

    reports: dict[str, ExportReport] = {}
    failures: dict[str, StepError] = {}
    # TypeError: the samples' types are known only now.
    unfit = (ValueError, TypeError, OSError, keras_mha.export.VerificationError)
    for name, place in request.places.items():
        takes = {"samples", *FORMATS[name].arguments}
        of_format = {key: value for key, value in values.items() if key in takes}
        part = model
        if name not in texts:
            part, ids = cut
            of_format |= {key: value for key, value in ids.items() if key in takes}
        elif request.tokens and FORMATS[name].signature_of_tokens:
            of_format["tokens"] = True
        exporter = getattr(keras_mha.export, f"export_{name}")
        try:
            with console.step(f"export to {name}, {place}", unfit):
                reports[name] = exporter(part, place, **of_format)
        except StepError as failure:
            failures[name] = failure
    _tell(request, console, reports, failures)
    return max((failure.code for failure in failures.values()), default=0)


def _without_tokenizer(
    model: Any, samples: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Returns the part of the model that takes ids, and ids for the samples."""
    from keras_mha.export import without_tokenizer

    cut = {name: without_tokenizer(model, texts) for name, texts in samples.items()}
    return cut["samples"][0], {name: ids for name, (_, ids) in cut.items()}


def _tell(
    request: Request,
    console: Console,
    reports: Mapping[str, ExportReport],
    failures: Mapping[str, StepError],
) -> None:
    """Prints the results, and writes them where asked."""
    summary = _summary(request.places, reports)
    print(summary)
    if request.report is None:
        return
    if request.report.suffix == ".json":
        results = {name: report.to_dict() for name, report in reports.items()}
        results |= {name: {"error": str(error)} for name, error in failures.items()}
        text = json.dumps(results, indent=2)
    else:
        failed = [f"## {name}: not written\n\n{e}" for name, e in failures.items()]
        full = [report.to_markdown() for report in reports.values()]
        text = "\n\n".join([summary, *full, *failed])
    with console.step(f"write {request.report}", (OSError,)):
        part = request.report.with_name(f".{request.report.name}.part")
        part.write_text(text + "\n", "utf-8")
        part.replace(request.report)


def _summary(places: Mapping[str, Path], reports: Mapping[str, ExportReport]) -> str:
    """Returns a Markdown table with a line for each file."""
    rows = [
        "| format | written | size in bytes | largest difference | allowed | run by |",
        "| --- | --- | ---: | ---: | ---: | --- |",
    ]
    for name in places:
        if name not in reports:
            rows.append(f"| {name} | nothing: it failed | | | | |")
            continue
        for file in reports[name].written():
            parity = file.parity
            run_by = [f"{parity.runtime} {parity.runtime_version}", *file.remarks()]
            rows.append(
                f"| {name} | {file.path} | {file.size_bytes} | "
                f"{parity.max_absolute_difference:.3g} | {parity.tolerance:.3g} | "
                f"{'; '.join(run_by)} |"
            )
    return "\n".join(rows)
