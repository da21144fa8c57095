"""Trains the accurate model: `train.py --pretrained minilm`.

Fine-tunes the checkpoint on the movie reviews, tests it on the held-out ones and on
other domains, and exports and verifies the first fold's model. That model then teaches
a small one for devices, which is tested, exported and verified too.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
from checkpoint import load_checkpoint
from data import LABELS, Reviews, Split, split_fold
from distill import Distillation, first_blocks, needed_tokens, teach, with_features
from domains import Rated, load_critics, load_domains
from encode import MAX_LENGTH, read_vocabulary, token_arrays
from finetune import (
    DOMAINS,
    FineTuning,
    build_classifier,
    cross_validate,
    domain_figures,
)
from model import encode
from report import comparison, copy_file, versions, write_json, write_text
from rows import Rows, accuracy, predict

from keras_mha.convert import load_bert
from keras_mha.export import (
    VerificationError,
    export_saved_model,
    export_tflite,
    verify,
)
from keras_mha.text import WordpieceTokenizer

ALL_FOLDS = 10
LENGTHS = (16, 24, 32, 40, 48, 64, 96, MAX_LENGTH)
SMOKE_ROWS = 200
EXPORT_SAMPLES = 32
VERIFIED_ROWS = 200
# Each takes a second in an emulator.
EMULATED_ROWS = 10
# Probabilities of unclear texts may move this far; what counts is the accuracy.
INT8_TOLERANCE = 0.15
# Hutto and Gilbert 2014, "VADER", table 4: correlation with the mean human rating.
VADER_CORRELATIONS = {"amazon": 0.565, "tweets": 0.881, "nyt": 0.492}


def run(
    options: argparse.Namespace, reviews: Reviews, recipe: FineTuning | None = None
) -> dict[str, Any]:
    """Runs the requested folds, writes the results, returns the figures."""
    recipe = recipe or FineTuning()
    checkpoint = load_checkpoint()
    vocabulary = read_vocabulary(checkpoint)
    further, domains = load_critics(reviews), load_domains()
    if options.smoke:
        recipe = replace(recipe, epochs=1)
        # The file is sorted by label, so take rows from all of it.
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
            small = distill(
                options.output / "on_device",
                classifier,
                checkpoint,
                split,
                domains,
                Distillation(training=recipe),
                seed=options.seed,
            )
            write_json(options.output / "on_device" / "metrics.json", small)
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
    """Puts the tokenizer before the model, which then takes strings `(B,)`."""
    texts = keras.Input((), dtype="string", name="texts")
    tokenizer = WordpieceTokenizer(vocabulary, MAX_LENGTH, name="tokenizer")
    # Without the optimizer, which would be saved too.
    bare = keras.Model(classifier.inputs, classifier.outputs, name="classifier")
    outputs = keras.layers.Identity(name="probabilities")(bare(tokenizer(texts)))
    return keras.Model(texts, outputs, name="sentiment")


def distill(
    output: Path,
    teacher: keras.Model,
    checkpoint: Path,
    split: Split,
    domains: Mapping[str, Rated],
    recipe: Distillation,
    *,
    seed: int,
) -> dict[str, Any]:
    """Teaches a small model, tests, exports and verifies it; returns the figures."""
    vocabulary = read_vocabulary(checkpoint)
    rows = Rows(encode(split.train.texts, vocabulary, MAX_LENGTH), split.train.labels)
    tokens = needed_tokens(vocabulary, rows)
    words = [vocabulary[i] for i in tokens]
    print(
        f"The fine-tuned model teaches one of {recipe.blocks} blocks and {len(words)} "
        "tokens",
        flush=True,
    )
    keras.utils.set_random_seed(seed)
    dropouts = {
        "dropout": recipe.training.dropout,
        "attention_dropout": recipe.training.attention_dropout,
    }
    encoder = first_blocks(
        load_bert(checkpoint, seed=seed, **dropouts), recipe.blocks, tokens
    )
    student = build_classifier(encoder, recipe.training)
    student_ids = [np.searchsorted(tokens, row).astype(np.int32) for row in rows.ids]
    teach(
        student,
        encoder,
        predict(with_features(teacher), rows, LENGTHS),
        Rows(student_ids, rows.labels),
        recipe,
        LENGTHS,
        seed=seed,
    )

    def answer(texts: Sequence[str]) -> np.ndarray:
        ids = encode(texts, words, MAX_LENGTH)
        return predict(student, Rows(ids, np.zeros(len(ids), int)), LENGTHS)

    figures = {
        "recipe": asdict(recipe),
        "tokens": len(words),
        "parameters": student.count_params(),
        "accuracy": accuracy(answer(split.test.texts), split.test.labels),
        **{
            name: domain_figures(answer(rated.texts), rated.ratings)
            for name, rated in domains.items()
        },
    }
    text = distilled_to_markdown(figures)
    print(text, flush=True)
    exported = export(
        output,
        student,
        words,
        split.test,
        quantization="dynamic_int8",
        verified_rows=None,  # What int8 costs shows on many.
    )
    write_text(output / "report.md", f"{text}\n\n{exported}")
    return figures


def export(
    output: Path,
    classifier: keras.Model,
    vocabulary: Sequence[str],
    test: Reviews,
    quantization: str | None = None,
    verified_rows: int | None = VERIFIED_ROWS,
) -> str:
    """Writes the model in every form, verifies each, and returns the reports.

    Raises:
        VerificationError: If a file's answers differ from the model's.
    """
    tolerance = None if quantization is None else INT8_TOLERANCE
    verified = test.take(np.arange(len(test))[:verified_rows])
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "labels.txt", "\n".join(LABELS))
    write_text(output / "vocab.txt", "\n".join(vocabulary))
    model = of_texts(classifier, vocabulary)
    partial = output / ".partial.keras"
    model.save(partial)
    partial.replace(output / "model.keras")
    samples = test.texts[:EXPORT_SAMPLES].tolist()
    saved_model = export_saved_model(
        model, output / "saved_model", samples=samples, version=1, overwrite=True
    )
    named = keras.layers.Identity(name="probabilities")(classifier.outputs[0])
    of_ids = keras.Model(classifier.inputs, named, name="classifier")
    rows = encode(verified.texts.tolist(), list(vocabulary), MAX_LENGTH)
    ids = np.stack([np.pad(row, (0, MAX_LENGTH - len(row))) for row in rows])
    tflite = export_tflite(
        of_ids,
        output,
        sequence_lengths=(MAX_LENGTH,),
        samples=ids[:EXPORT_SAMPLES],
        overwrite=True,
        quantization=quantization,
        quantized_tolerance=tolerance,
    )
    copy_file(Path(tflite.files[0].path), output / "model.tflite")
    reports = {
        "texts": verify(
            model,
            samples=verified.texts.tolist(),
            labels=verified.labels,
            saved_model=output / "saved_model",
        ),
        "ids": verify(
            of_ids,
            samples=ids,
            labels=verified.labels,
            tflite=[tflite.files[0].path],
            quantized_tolerance=INT8_TOLERANCE,
            emulated_samples=EMULATED_ROWS,
        ),
    }
    for name, report in reports.items():
        report.write(output / f"verified_{name}.json")
    if not all(report.passed for report in reports.values()):
        raise VerificationError(
            f"A file in {output} and the model disagree: see verified_*.json"
        )
    sections = [saved_model, tflite, *reports.values()]
    return "\n\n".join(section.to_markdown() for section in sections)


def to_markdown(figures: dict[str, Any]) -> str:
    """Returns the figures of all trained folds as text."""
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
        *_domain_lines(folds),
    ]
    return "\n".join(lines)


def distilled_to_markdown(figures: dict[str, Any]) -> str:
    """Returns the figures of the small model as text."""
    lines = [
        "# Sentiment of movie reviews, for devices",
        "",
        f"The first {figures['recipe']['blocks']} blocks of MiniLM over "
        f"{figures['tokens']:,} tokens, {figures['parameters']:,} weights, taught by "
        f"the fine-tuned model: {100 * figures['accuracy']:.1f} % of the test part of "
        "one fold.",
        "",
        *_domain_lines([figures]),
    ]
    return "\n".join(lines)


def _domain_lines(folds: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "## Other domains",
        "",
        "Trained only on movie reviews, tested on the sign of the mean human rating. "
        "The last columns are the correlation of the probability with the rating, and "
        "that of VADER, which was built with these texts at hand.",
        "",
        "| texts | accuracy % | correlation | VADER's |",
        "| --- | --: | --: | --: |",
    ]
    for name in DOMAINS:
        right, correlation = (
            float(np.mean([fold[name][key] for fold in folds]))
            for key in ("accuracy", "correlation")
        )
        published = VADER_CORRELATIONS[name]
        lines.append(
            f"| {name} | {100 * right:.1f} | {correlation:.3f} | {published} |"
        )
    return lines
