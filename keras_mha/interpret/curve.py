"""Measures what a model still does as its least useful heads go, one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops
from typing_extensions import override

from keras_mha.interpret.paths import (
    attention_layers,
    pair_batches,
    run_model,
    watching,
)
from keras_mha.interpret.pruning import check_heads
from keras_mha.layers.arguments import check_positive
from keras_mha.layers.attention_layer import AttentionLayer
from keras_mha.layers.observer import Observer
from keras_mha.typing import Tensor

Metric = Callable[[Any, Any], float]


@dataclass(frozen=True)
class PruningStep:
    """A model without some heads.

    Attributes:
        removed: The heads that are gone, by path of the layer, as `prune_heads` takes
            them.
        heads_left: How many heads are left in all layers.
        score: What the metric says of the answers.
    """

    removed: dict[str, tuple[int, ...]]
    heads_left: int
    score: float


@dataclass(frozen=True)
class PruningCurve:
    """The steps of removing heads, from the whole model to one head, or group, a layer.

    Attributes:
        metric: Name of the metric.
        steps: The steps; the first one has all heads.
    """

    metric: str
    steps: tuple[PruningStep, ...]

    def smallest(self, max_drop: float) -> PruningStep:
        """Returns the step of the fewest heads whose score is at most `max_drop` lower.

        Args:
            max_drop: How far the score may lie under that of the whole model.

        Raises:
            ValueError: If `max_drop` is negative.

        Example:

        >>> from keras_mha.interpret import PruningCurve, PruningStep
        >>> steps = PruningStep({}, 3, 0.9), PruningStep({"heads": (1,)}, 2, 0.88)
        >>> PruningCurve("accuracy", steps).smallest(0.05).heads_left
        2
        """
        if not max_drop >= 0:
            raise ValueError(f"`max_drop` must be 0 or more. Received: {max_drop}")
        least = self.steps[0].score - max_drop
        return [step for step in self.steps if step.score >= least][-1]

    def to_markdown(self) -> str:
        """Returns a table of the steps, with the heads that go in each."""
        lines = [f"| heads left | {self.metric} | removed |", "| --: | --: | --- |"]
        before: dict[str, tuple[int, ...]] = {}
        for step in self.steps:
            gone = {
                path: sorted(set(heads) - set(before.get(path, ())))
                for path, heads in step.removed.items()
            }
            text = ", ".join(
                f"{path}: {' '.join(map(str, heads))}"
                for path, heads in gone.items()
                if heads
            )
            lines.append(f"| {step.heads_left} | {step.score:.4f} | {text} |")
            before = step.removed
        return "\n".join(lines)


def pruning_curve(
    model: keras.layers.Layer,
    importance: Mapping[str, np.ndarray],
    inputs: Any,
    labels: Any = None,
    *,
    heads_per_step: int = 1,
    metric: str | Metric = "accuracy",
    batch_size: int = 256,
) -> PruningCurve:
    """Removes the least important heads step by step, and says what each step costs.

    Heads are masked, which gives the answers of the model that `prune_heads` makes of
    `step.removed`; `model` stays as it is. The importance is not estimated anew, and
    nothing is trained in between. Heads that share keys and values go together, and
    the most important ones of each layer stay, as `prune_heads` wants it.

    A score of the examples by which `importance` was found, or by which a step is
    chosen, flatters: take others for the last word.

    Source: Michel, Levy and Neubig 2019, "Are sixteen heads really better than one?",
    section 4.2.

    Args:
        model: As for `head_importance`.
        importance: Numbers `(N,)` by path, as `head_importance` returns them. Heads
            of layers that are not in it stay.
        inputs: What `attention_maps` takes, with `labels`; or without them an iterable
            of pairs `(inputs, labels)` of batches.
        labels: One row for each example.
        heads_per_step: How many heads go in a step, or groups that share keys.
        metric: `"accuracy"`, or a function of all labels and all outputs as NumPy
            arrays that returns a number, greater = better. Accuracy compares labels
            `(n,)` or `(n, 1)` of class numbers, or `(n, C)` of one class each, with
            the greatest of outputs `(n, C)`, and labels 0 and 1 with outputs `(n, 1)`
            or `(n,)` above 0.5.
        batch_size: Rows of a batch where `inputs` are not batches already.

    Returns:
        The curve.

    Raises:
        TypeError: If `model` is not a Keras layer, or `metric` is neither.
        ValueError: If `importance` does not fit the model's heads, labels or outputs
            are not what accuracy compares, or the model does not fit (see
            `attention_maps`).

    Example:

    >>> import keras
    >>> import numpy as np
    >>> import keras_mha
    >>> from keras_mha.interpret import pruning_curve
    >>> inputs = keras.Input((None, 8))
    >>> x = keras_mha.MultiHeadSelfAttention(num_heads=4, name="heads")(inputs)
    >>> x = keras.layers.GlobalAveragePooling1D()(x)
    >>> model = keras.Model(inputs, keras.layers.Dense(2, "softmax")(x))
    >>> examples = np.random.normal(size=(6, 5, 8)).astype("float32")
    >>> importance = {"heads": np.array([0.3, 0.1, 0.9, 0.2])}
    >>> curve = pruning_curve(model, importance, examples, np.array([0, 1] * 3))
    >>> [step.removed for step in curve.steps]
    [{}, {'heads': (1,)}, {'heads': (1, 3)}, {'heads': (0, 1, 3)}]
    """
    layers = attention_layers(model)
    step_size = check_positive(heads_per_step, "heads_per_step")
    size = check_positive(batch_size, "batch_size")
    measure = accuracy if metric == "accuracy" else metric
    if not callable(measure):
        raise TypeError(
            "`metric` must be 'accuracy' or a function of labels and outputs. "
            f"Received: metric={metric!r}"
        )
    order = _order(layers, importance)
    batches = list(pair_batches(inputs, labels, size))
    total = sum(layer.num_heads for layer in layers.values())
    steps = []
    for gone in (*range(0, len(order), step_size), len(order)):
        removed = check_heads(layers, _by_path(order[:gone]))
        answers = [
            (targets, masked_outputs(model, layers, removed, batch))
            for batch, targets in batches
        ]
        score = float(measure(*map(_joined, zip(*answers, strict=True))))
        left = total - sum(map(len, removed.values()))
        steps.append(PruningStep(removed, left, score))
    name = metric if isinstance(metric, str) else getattr(metric, "__name__", "score")
    return PruningCurve(name, tuple(steps))


def masked_outputs(
    model: keras.layers.Layer,
    layers: Mapping[str, AttentionLayer],
    removed: Mapping[str, tuple[int, ...]],
    inputs: Any,
) -> Any:
    """Answers as the model does in inference while some heads give zeros."""
    factors = {}
    for path, heads in removed.items():
        factors[id(layers[path])] = np.ones(layers[path].num_heads, "float32")
        factors[id(layers[path])][list(heads)] = 0.0
    with watching(model, _Masked(factors)):
        return run_model(model, inputs)


def accuracy(labels: Any, outputs: Any) -> float:
    """The share of examples whose answer is the label; see `pruning_curve`.

    Example:

    >>> import numpy as np
    >>> from keras_mha.interpret.curve import accuracy
    >>> accuracy(np.array([1, 0]), np.array([[0.2, 0.8], [0.1, 0.9]]))
    0.5
    """
    labels, outputs = np.asarray(labels), np.asarray(outputs)
    shapes = f"labels {labels.shape} and outputs {outputs.shape}"
    if outputs.ndim == 2 and outputs.shape[1] > 1:
        if labels.shape == outputs.shape:
            labels = labels.argmax(axis=1)
        outputs = outputs.argmax(axis=1)
    elif outputs.ndim == 1 or (outputs.ndim == 2 and outputs.shape[1] == 1):
        outputs = outputs.reshape(-1) > 0.5
    if labels.shape not in (outputs.shape, (*outputs.shape, 1)) or outputs.ndim != 1:
        raise ValueError(
            "Accuracy compares labels (n,), (n, 1) or (n, C) with outputs (n, C), (n,) "
            f"or (n, 1). Received: {shapes}"
        )
    return float(np.mean(labels.reshape(-1) == outputs))


class _Masked(Observer):
    """Multiplies the heads of layers by factors, by the layer's identity."""

    def __init__(self, factors: Mapping[int, np.ndarray]) -> None:
        self.factors = factors

    @override
    def head_mask(self, layer: keras.layers.Layer, mixed: Tensor) -> Tensor | None:
        return self.factors.get(id(layer))


def _order(
    layers: Mapping[str, AttentionLayer], importance: Mapping[str, np.ndarray]
) -> list[tuple[str, range]]:
    """The heads that may go, those that share keys together, least important first."""
    units = []
    for path, numbers in importance.items():
        if path not in layers or np.shape(numbers) != (layers[path].num_heads,):
            raise ValueError(
                "`importance` must hold a number for each head, by path: "
                f"{ {name: (layer.num_heads,) for name, layer in layers.items()} }. "
                f"Received: {path!r} of shape {np.shape(numbers)}"
            )
        if not np.all(np.isfinite(numbers)):
            raise ValueError(
                f"`importance` must be finite. Received: {path!r} {numbers}"
            )
        size = layers[path].num_heads // layers[path].num_key_value_heads
        sums = np.reshape(np.asarray(numbers, float), (-1, size)).sum(axis=1)
        units += [
            (float(sums[group]), path, range(group * size, (group + 1) * size))
            for group in range(len(sums))
            if group != sums.argmax()
        ]
    units.sort(key=lambda unit: unit[0])
    return [(path, heads) for _, path, heads in units]


def _by_path(units: Iterable[tuple[str, range]]) -> dict[str, list[int]]:
    heads: dict[str, list[int]] = {}
    for path, unit in units:
        heads.setdefault(path, []).extend(unit)
    return heads


def _joined(structures: Iterable[Any]) -> Any:
    """Joins the batches of a structure of tensors to NumPy arrays."""
    several: Any = list(structures)

    def join(*parts: Tensor) -> np.ndarray:
        arrays: Any = [ops.convert_to_numpy(part) for part in parts]
        return np.concatenate(arrays)

    return keras.tree.map_structure(join, *several)
