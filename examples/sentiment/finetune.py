"""Fine-tunes a pretrained encoder on token ids, by cross-validation.

Runs on TensorFlow, or on JAX without TensorFlow: the ids come from a file that
`encode.py` wrote. Prints and writes each fold's accuracy on its test part after each
epoch, and chooses nothing by it.

Examples:
    python examples/sentiment/encode.py --output ids.npz
    python examples/sentiment/finetune.py --data ids.npz --folds 0 1 2
        --dtype mixed_bfloat16 --lengths 32 80 --output result.json
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

# Set before TensorFlow is imported, to silence its notes on the hardware.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from checkpoint import load_checkpoint
from keras import ops
from rows import Batches, Rows, accuracy, predict, unpack

from keras_mha.convert import load_bert
from keras_mha.models import BertEncoder

Pooling = Literal["mean", "first"]
DOMAINS = ("amazon", "tweets", "nyt")


@dataclass(frozen=True)
class FineTuning:
    """Everything that the result depends on, except data, checkpoint and seed.

    Sources: Devlin et al. 2019, "BERT" (few epochs, small rates, linear warm-up and
    decay); Howard and Ruder 2018, "Universal language model fine-tuning" (smaller rates
    for lower layers); Izmailov et al. 2018, "Averaging weights leads to wider optima";
    Wu et al. 2021, "R-Drop" (two dropouts must agree); Reimers and Gurevych 2019,
    "Sentence-BERT" (the mean of the tokens, as the checkpoint was trained).
    """

    epochs: int = 4
    batch_size: int = 64
    learning_rate: float = 2e-4
    # The share of all steps in which the rate rises.
    warmup: float = 0.1
    weight_decay: float = 0.01
    # The ratio of each layer's rate to that of the next higher one.
    layer_decay: float = 1.0
    pooling: Pooling = "mean"
    dropout: float = 0.1
    attention_dropout: float = 0.1
    head_dropout: float = 0.1
    label_smoothing: float = 0.0
    # Momentum of a moving average of the weights, which is then tested; 0 for none.
    average_momentum: float = 0.0
    # Weight of the divergence between the answers under two dropouts; 0 for none.
    r_drop: float = 0.0


# The model.


def build_classifier(encoder: BertEncoder, recipe: FineTuning) -> keras.Model:
    """Builds a model from ids `(B, T)`, 0 at padding, to probabilities `(B, 2)`."""
    ids = keras.Input((None,), dtype="int32", name="ids")
    hidden = encoder({"input_ids": ids, "attention_mask": ops.not_equal(ids, 0)})
    if recipe.pooling == "mean":
        # In float32, so that sums are not rounded to the encoder's dtype.
        mean = keras.layers.GlobalAveragePooling1D(dtype="float32", name="mean")
        pooled = mean(hidden)
    else:
        pooled = hidden[:, 0]
    pooled = keras.layers.Dropout(recipe.head_dropout, name="head_dropout")(pooled)
    label = keras.layers.Dense(2, activation="softmax", dtype="float32", name="label")
    if not recipe.r_drop:
        return keras.Model(ids, label(pooled), name="classifier")
    model = AgreeingModel(ids, label(pooled), name="classifier")
    model.agreement = recipe.r_drop
    return model


class AgreeingModel(keras.Model):
    """Sees each row twice, once in each half of a batch, and learns to answer alike."""

    agreement = 0.0

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        """Adds the symmetric divergence of the halves' answers to the loss."""
        loss = super().compute_loss(x, y, y_pred, sample_weight, training)
        halves: Any = ops.split(ops.clip(y_pred, 1e-7, 1.0), 2)
        first, second = halves
        divergence = ops.sum((first - second) * (ops.log(first) - ops.log(second)), -1)
        agreement: Any = ops.mean(divergence) * (self.agreement / 2)
        return loss + agreement


class LinearSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """Rises linearly to `peak` within `warmup` steps, and falls to 0 at `steps`."""

    def __init__(self, peak: float, steps: int, warmup: int) -> None:
        self.peak, self.steps, self.warmup = peak, steps, warmup

    def __call__(self, step: Any) -> Any:
        """Returns the rate of a step, counted from 0."""
        done = ops.cast(step, "float32") + 1.0
        rising = done / max(self.warmup, 1)
        falling = (self.steps - done) / max(self.steps - self.warmup, 1)
        share: Any = ops.maximum(ops.minimum(rising, falling), 0.0)
        return self.peak * share

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {"peak": self.peak, "steps": self.steps, "warmup": self.warmup}


class LayerwiseAdamW(keras.optimizers.AdamW):
    """AdamW with a factor of the learning rate for each variable.

    Args:
        factor: Returns the factor of a variable.
        **kwargs: Arguments of `keras.optimizers.AdamW`.
    """

    def __init__(self, factor: Callable[[Any], float], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._factor = factor
        self._factors: list[float] = []

    def build(self, variables: Any) -> None:
        """Makes the optimizer's state, and looks up the factors."""
        super().build(variables)
        self._factors = [self._factor(variable) for variable in variables]

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Updates one variable."""
        factor = self._factors[self._get_variable_index(variable)]
        super().update_step(gradient, variable, learning_rate * factor)


def compile_classifier(
    model: keras.Model, encoder: BertEncoder, recipe: FineTuning, steps: int
) -> None:
    """Gives the model its optimizer and loss, for `steps` steps in all."""
    loss = keras.losses.CategoricalCrossentropy(label_smoothing=recipe.label_smoothing)
    optimizer = make_optimizer(model, encoder, recipe, steps)
    model.compile(optimizer, loss, metrics=["accuracy"])


def make_optimizer(
    model: keras.Model, encoder: BertEncoder, recipe: FineTuning, steps: int
) -> keras.optimizers.Optimizer:
    """Makes an optimizer for the model around the encoder, for `steps` steps in all."""
    # Heights: 0 for the embeddings, 1 to L for the blocks, and L + 1 for the head.
    heights = {weight.path: 0 for weight in encoder.weights}
    for height, block in enumerate(encoder.blocks, 1):
        heights |= {weight.path: height for weight in block.weights}
    top = len(encoder.blocks) + 1

    def factor(variable: Any) -> float:
        return recipe.layer_decay ** (top - heights.get(variable.path, top))

    optimizer = LayerwiseAdamW(
        factor,
        learning_rate=LinearSchedule(
            recipe.learning_rate, steps, math.ceil(recipe.warmup * steps)
        ),
        weight_decay=recipe.weight_decay,
        global_clipnorm=1.0,
        use_ema=recipe.average_momentum > 0,
        ema_momentum=recipe.average_momentum or 0.99,
    )
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    optimizer.build(model.trainable_variables)
    return optimizer


# Training.


class Tested(keras.callbacks.Callback):
    """Tests the model after each epoch, and keeps the last probabilities."""

    def __init__(self, rows: Rows, lengths: Sequence[int]) -> None:
        super().__init__()
        self.rows, self.lengths = rows, lengths
        self.accuracies: list[float] = []
        self.probabilities = np.zeros((0, 2))

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Tests the weights as they are now."""
        del epoch
        # SwapEMAWeights may leave a weight and its average in the same memory, which
        # `predict` on JAX donates.
        for weight in self.model.trainable_variables:
            weight.assign(np.array(ops.convert_to_numpy(weight)))
        self.probabilities = predict(self.model, self.rows, self.lengths)
        self.accuracies.append(accuracy(self.probabilities, self.rows.labels))
        if logs is not None:
            logs["test_accuracy"] = self.accuracies[-1]


def fit(
    model: keras.Model,
    train: Rows,
    test: Rows,
    recipe: FineTuning,
    lengths: Sequence[int],
    *,
    seed: int,
) -> Tested:
    """Trains a compiled model on `train`, and tests it on `test`."""
    batches = Batches(train, recipe.batch_size, lengths, seed, twice=recipe.r_drop > 0)
    tested = Tested(test, lengths)
    callbacks: list[keras.callbacks.Callback] = [tested]
    if recipe.average_momentum:
        # First, so that the callbacks after it see and keep the averaged weights.
        callbacks.insert(0, keras.callbacks.SwapEMAWeights(swap_on_epoch=True))
    model.fit(
        batches,
        epochs=recipe.epochs,
        shuffle=False,  # `Batches` shuffles the rows.
        callbacks=callbacks,
        verbose=verbosity(),
    )
    return tested


def verbosity() -> Any:
    """Returns `fit`'s verbosity: a bar on a terminal, else a line for each epoch."""
    return 1 if sys.stdout.isatty() else 2


def steps_of(rows: int, recipe: FineTuning) -> int:
    """Returns how many steps the whole training takes."""
    return recipe.epochs * math.ceil(rows / recipe.batch_size)


# Cross-validation.


def restorer(model: keras.Model) -> Callable[[], None]:
    """Returns a function that resets a compiled model to its present state.

    All folds train one model, so that it is compiled once.
    """
    variables = [*model.variables, *model.optimizer.variables]
    values = [np.array(ops.convert_to_numpy(variable)) for variable in variables]

    def restore() -> None:
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)

    return restore


def cross_validate(
    checkpoint: Path,
    data: dict[str, np.ndarray],
    recipe: FineTuning,
    *,
    folds: Sequence[int],
    lengths: Sequence[int],
    seed: int,
    dtype: str,
    extra: bool = False,
    report: Callable[[dict[str, Any], keras.Model], None] = lambda *_: None,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Fine-tunes on each fold's training part, and tests on the fold.

    Args:
        checkpoint: Directory of the checkpoint.
        data: The arrays that `encode.py` wrote.
        recipe: How to train.
        folds: The folds' numbers.
        lengths: The lengths that batches may have.
        seed: Seed of dropout, head and order.
        dtype: Dtype policy of the encoder.
        extra: Whether to train on the further rows too.
        report: Called with the figures and the trained model after each fold.

    Returns:
        The figures, and the probabilities: for each review those of the model that had
        not seen it, and for the other sets' texts those of each fold's model.
    """
    reviews, membership = unpack(data, "mr"), data["mr_folds"]
    further = unpack(data, "extra") if extra else None
    others = {name: unpack(data, name) for name in DOMAINS}
    keras.utils.set_random_seed(seed)
    encoder = load_bert(
        checkpoint,
        dropout=recipe.dropout,
        attention_dropout=recipe.attention_dropout,
        seed=seed,
        dtype=dtype,
    )
    model = build_classifier(encoder, recipe)
    largest = max(np.sum(membership != fold) for fold in folds)
    rows = int(largest) + (len(further) if further else 0)
    compile_classifier(model, encoder, recipe, steps_of(rows, recipe))
    answers = {"mr": np.full((len(reviews), 2), np.nan, np.float32)}
    answers |= {
        name: np.zeros((0, len(o), 2), np.float32) for name, o in others.items()
    }
    results: list[dict[str, Any]] = []
    figures: dict[str, Any] = {
        "recipe": asdict(recipe),
        "seed": seed,
        "dtype": dtype,
        "extra": len(further) if further else 0,
        "backend": keras.backend.backend(),
        "folds": results,
    }
    restore = restorer(model)
    for fold in folds:
        start = time.perf_counter()
        restore()
        train = reviews.take(np.flatnonzero(membership != fold))
        tested_rows = np.flatnonzero(membership == fold)
        train = train + further if further else train
        test = reviews.take(tested_rows)
        tested = fit(model, train, test, recipe, lengths, seed=1000 * seed + fold)
        answers["mr"][tested_rows] = tested.probabilities
        fold_figures = {
            "fold": int(fold),
            "accuracies": tested.accuracies,
            "seconds": round(time.perf_counter() - start, 1),
        }
        for name, other in others.items():
            probabilities = predict(model, other, lengths)
            answers[name] = np.concatenate([answers[name], probabilities[None]])
            fold_figures[name] = domain_figures(probabilities, data[f"{name}_ratings"])
        results.append(fold_figures)
        by_epoch = np.mean([each["accuracies"] for each in results], axis=0)
        figures["mean_accuracy_by_epoch"] = by_epoch.tolist()
        figures["mean_accuracy"] = float(by_epoch[-1])
        report(figures, model)
    return figures, answers


def domain_figures(probabilities: np.ndarray, ratings: np.ndarray) -> dict[str, float]:
    """Compares answers `(n, 2)` with mean human ratings `(n,)`, which may be zero.

    The accuracy is that of the sign, without zeros. The correlation is Pearson's, of
    the probability of the positive label with the rating.
    """
    signed = ratings != 0
    labels = (ratings[signed] > 0).astype(int)
    return {
        "accuracy": accuracy(probabilities[signed], labels),
        "correlation": float(np.corrcoef(probabilities[:, 1], ratings)[0, 1]),
    }


# The command.


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    description, _, epilog = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="file that encode.py wrote")
    add(
        "--checkpoint",
        type=Path,
        help="directory of config.json and model.safetensors (default: MiniLM, "
        "downloaded at the first call)",
    )
    add("--output", type=Path, help="JSON file for the figures (default: none)")
    add("--probabilities", type=Path, help=".npz file for the answers (default: none)")
    add(
        "--folds",
        type=int,
        nargs="*",
        default=list(range(10)),
        help="numbers of the folds (default: all ten)",
    )
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--dtype", default="float32", help="dtype policy (default: %(default)s)")
    add(
        "--lengths",
        type=int,
        nargs="+",
        default=[16, 24, 32, 40, 48, 64, 96, 128],
        help="lengths that batches may have; JAX compiles each",
    )
    add("--extra", action="store_true", help="train on the further rows too")
    for field in fields(FineTuning):
        add(
            f"--{field.name.replace('_', '-')}",
            type=type(field.default),
            default=field.default,
            help="default: %(default)s",
        )
    options = parser.parse_args(arguments)
    if options.pooling not in get_args(Pooling):
        parser.error(f"--pooling must be one of {get_args(Pooling)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    options = parse(arguments)
    recipe = replace(
        FineTuning(),
        **{field.name: getattr(options, field.name) for field in fields(FineTuning)},
    )

    def report(figures: dict[str, Any], _: keras.Model) -> None:
        last = figures["folds"][-1]
        print(
            f"fold {last['fold']}: {last['accuracies']}, {last['seconds']} s; mean of "
            f"{len(figures['folds'])}: {figures['mean_accuracy']:.4f}",
            flush=True,
        )
        if options.output is not None:
            temporary = options.output.with_name(f".{options.output.name}.part")
            temporary.write_text(json.dumps(figures, indent=2) + "\n", "utf-8")
            temporary.replace(options.output)

    with np.load(options.data) as file:
        data = dict(file)
    _, answers = cross_validate(
        options.checkpoint or load_checkpoint(),
        data,
        recipe,
        folds=options.folds,
        lengths=options.lengths,
        seed=options.seed,
        dtype=options.dtype,
        extra=options.extra,
        report=report,
    )
    if options.probabilities is not None:
        np.savez_compressed(options.probabilities, **answers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
