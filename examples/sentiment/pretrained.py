"""The accurate model: `train.py --pretrained minilm`.

Fine-tunes the checkpoint on the movie reviews, tests it on the rest of them and on
other domains, and exports and verifies the first fold's model.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
from checkpoint import load_checkpoint
from data import LABELS, Reviews, split_fold
from domains import load_critics, load_domains
from encode import MAX_LENGTH, read_vocabulary, token_arrays
from finetune import DOMAINS, FineTuning, cross_validate
from model import encode
from report import comparison, copy_file, versions, write_json, write_text

from keras_mha.export import export_saved_model, export_tflite, verify
from keras_mha.text import WordpieceTokenizer

ALL_FOLDS = 10
LENGTHS = (16, 24, 32, 40, 48, 64, 96, MAX_LENGTH)
SMOKE_ROWS = 200
EXPORT_SAMPLES = 32
VERIFIED_ROWS = 200
# Hutto and Gilbert 2014, "VADER", table 4: correlation with the mean human rating.
VADER_CORRELATIONS = {"amazon": 0.565, "tweets": 0.881, "nyt": 0.492}


def run(
    options: argparse.Namespace, reviews: Reviews, recipe: FineTuning | None = None
) -> dict[str, Any]:
    """Runs the folds asked for, writes the results, returns the figures."""
    recipe = recipe or FineTuning()
    checkpoint = load_checkpoint()
    vocabulary = read_vocabulary(checkpoint)
    further, domains = load_critics(reviews), load_domains()
    if options.smoke:
        recipe = replace(recipe, epochs=1)
        # The file is sorted by label, so the rows are taken from all of it.
        reviews, further = _spread(reviews), _spread(further)
        domains = {name: _spread(rated) for name, rated in domains.items()}
    data = token_arrays(vocabulary, reviews, further, domains, seed=options.seed)

    def report(figures: dict[str, Any], classifier: keras.Model) -> None:
        options.output.mkdir(parents=True, exist_ok=True)
        write_json(options.output / "metrics.json", _complete(figures, options))
        text = to_markdown(figures)
        if len(figures["folds"]) == 1 and options.export:
            split = split_fold(reviews, 0, folds=ALL_FOLDS, seed=options.seed)
            exported = export(options.output, classifier, vocabulary, split.test)
            write_text(options.output / "report.md", f"{text}\n\n{exported}")
        write_text(options.output / "cross_validation.md", text)
        print(text, flush=True)

    figures, _ = cross_validate(
        checkpoint,
        data,
        recipe,
        folds=range(options.folds),
        lengths=LENGTHS,
        seed=options.seed,
        dtype="float32",
        report=report,
    )
    return figures


def _spread(texts: Any) -> Any:
    rows = np.linspace(0, len(texts.texts) - 1, min(SMOKE_ROWS, len(texts.texts)))
    return texts.take(rows.astype(int))


def _complete(figures: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    return {**figures, "smoke": options.smoke, "versions": versions()}


def of_texts(classifier: keras.Model, vocabulary: Sequence[str]) -> keras.Model:
    """The same model with the tokenizer before it: strings `(B,)` in."""
    texts = keras.Input((), dtype="string", name="texts")
    tokenizer = WordpieceTokenizer(vocabulary, MAX_LENGTH, name="tokenizer")
    # Without the optimizer, which would be saved as well.
    bare = keras.Model(classifier.inputs, classifier.outputs, name="classifier")
    outputs = keras.layers.Identity(name="probabilities")(bare(tokenizer(texts)))
    return keras.Model(texts, outputs, name="sentiment")


def export(
    output: Path, classifier: keras.Model, vocabulary: Sequence[str], test: Reviews
) -> str:
    """Writes the model in every form, verifies each, and returns the reports."""
    write_text(output / "labels.txt", "\n".join(LABELS))
    write_text(output / "vocab.txt", "\n".join(vocabulary))
    model = of_texts(classifier, vocabulary)
    beside = output / ".beside.keras"
    model.save(beside)
    beside.replace(output / "model.keras")
    samples = test.texts[:EXPORT_SAMPLES].tolist()
    saved_model = export_saved_model(
        model, output / "saved_model", samples=samples, version=1, overwrite=True
    )
    named = keras.layers.Identity(name="probabilities")(classifier.outputs[0])
    of_ids = keras.Model(classifier.inputs, named, name="classifier")
    rows = encode(test.texts[:VERIFIED_ROWS].tolist(), list(vocabulary), MAX_LENGTH)
    ids = np.stack([np.pad(row, (0, MAX_LENGTH - len(row))) for row in rows])
    tflite = export_tflite(
        of_ids,
        output,
        sequence_lengths=(MAX_LENGTH,),
        samples=ids[:EXPORT_SAMPLES],
    )
    copy_file(Path(tflite.files[0].path), output / "model.tflite")
    labels = test.labels[:VERIFIED_ROWS]
    reports = {
        "texts": verify(
            model,
            samples=test.texts[:VERIFIED_ROWS].tolist(),
            labels=labels,
            saved_model=output / "saved_model",
        ),
        "ids": verify(
            of_ids, samples=ids, labels=labels, tflite=[tflite.files[0].path]
        ),
    }
    for name, report in reports.items():
        report.write(output / f"verified_{name}.json")
    sections = [saved_model, tflite, *reports.values()]
    return "\n\n".join(section.to_markdown() for section in sections)


def to_markdown(figures: dict[str, Any]) -> str:
    """The figures of all folds there are, as text."""
    folds = figures["folds"]
    last = [fold["accuracies"][-1] for fold in folds]
    by_epoch = ", ".join(f"{100 * x:.1f}" for x in figures["mean_accuracy_by_epoch"])
    lines = [
        "# Sentiment of movie reviews, from a pretrained encoder",
        "",
        f"MiniLM, fine-tuned; mean after each epoch: {by_epoch} %.",
        "",
        comparison({"this model, pretrained": last}),
        "",
        "## Other domains",
        "",
        "Trained on movie reviews alone, tested on the sign of the mean human rating; "
        "and the correlation of the probability with the rating, beside that of VADER, "
        "which was made with these texts at hand.",
        "",
        "| texts | accuracy % | correlation | VADER's |",
        "| --- | --: | --: | --: |",
    ]
    for name in DOMAINS:
        accuracy, correlation = (
            float(np.mean([fold[name][key] for fold in folds]))
            for key in ("accuracy", "correlation")
        )
        published = VADER_CORRELATIONS[name]
        lines.append(
            f"| {name} | {100 * accuracy:.1f} | {correlation:.3f} | {published} |"
        )
    return "\n".join(lines)
