"""The answers of a model and its converted copy, compared by value.

Letters: B batch, T length.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_mha.convert.drawn_inputs import drawn_inputs
from keras_mha.convert.layer_swap import innermost
from keras_mha.layers.keras_mask import get_keras_mask
from keras_mha.twin import Twins

# How far outputs may differ, in units of the largest.
_TOLERANCES = {"float64": 2e-5, "float32": 2e-5, "bfloat16": 5e-2, "float16": 2e-2}


class _Padding(NamedTuple):
    """What is hidden in a call of attention: queries, keys."""

    queries: bool
    keys: bool


class Difference(NamedTuple):
    """How far an output differs: at most, in how many rows of the batch."""

    output: str
    size: float
    rows: int
    batch: int

    def __str__(self) -> str:
        return (
            f"output '{self.output}' by up to {self.size:.2g}, in {self.rows} of "
            f"{self.batch} rows"
        )


class Comparison(NamedTuple):
    """What a model and its copy answered to the same inputs.

    Attributes:
        differences: Those of outputs that are not equal. What outputs say of padding
            by their own mask does not count.
        gained: Names of layers that no longer attend to padding.
        lost: Names of layers that attend to padding now.
        padded: Names of other layers with queries that are padding.
    """

    differences: list[Difference]
    gained: list[str]
    lost: list[str]
    padded: list[str]


def compare(
    original: Any, converted: Any, swapped: list[tuple[Any, Any]], inputs: Any
) -> Comparison:
    """Calls both with the same inputs; neither is changed."""
    seen: list[list[list[_Padding]]] = []
    answers: list[Any] = []
    # Some of Keras' layers that augment images turn dropout on otherwise.
    inference = {"training": False} if original._call_has_training_arg else {}
    for model, layers in zip(
        (original, converted), zip(*swapped, strict=True), strict=True
    ):
        twins = Twins()
        copied = twins.make(model)
        seen.append([_watch(twins.copy(layer)) for layer in layers])
        # Nothing is assigned to their variables, and what they warn of anyway is not
        # said here.
        with keras.StatelessScope(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            answers.append(copied(inputs, **inference))
    gained, lost, padded = [], [], []
    for (layer, _), *calls in zip(swapped, *seen, strict=True):
        pairs = list(zip(*calls, strict=False))
        if any(after.keys and not before.keys for before, after in pairs):
            gained.append(layer.name)
        elif any(before.keys and not after.keys for before, after in pairs):
            lost.append(layer.name)
        elif any(before.queries or after.queries for before, after in pairs):
            padded.append(layer.name)
    tolerance = max(
        _TOLERANCES.get(layer.compute_dtype, 0.0)
        for model in (original, converted)
        for layer in model._flatten_layers()
    )
    differences = _differences(original, answers[0], answers[1], tolerance)
    return Comparison(differences, gained, lost, padded)


def describe_differences(
    original: Any,
    converted: Any,
    swapped: list[tuple[Any, Any]],
    samples: Any,
    *,
    expected: bool,
) -> str:
    """Says where a converted model answers otherwise; nothing where it does not.

    Args:
        original: The model that was converted.
        converted: Its copy.
        swapped: Pairs of the layers swapped and those in their place.
        samples: Inputs, as the model takes them. With `None` they are drawn.
        expected: Whether answers are expected to differ where there is padding.
    """
    if not swapped or not original.built:
        return ""  # nothing differs, or it answers nothing yet
    unknown = _describe_masks(original, swapped) if expected else ""
    inputs = drawn_inputs(original) if samples is None else _tensors(samples)
    if inputs is None:
        return unknown
    try:
        found = compare(original, converted, swapped, inputs)
    except Exception as error:
        if samples is not None:
            raise ValueError(
                "`samples` must be inputs as the model takes them. Received: samples "
                f"of type {type(samples).__name__}, with which the call fails: "
                f"{innermost(error)}"
            ) from error
        # Drawn inputs need not suit a model.
        return unknown
    if not found.differences or _is_random(original, swapped, inputs):
        return ""
    return _report(found, "drawn inputs" if samples is None else "`samples`")


def _tensors(samples: Any) -> Any:
    """Tensors of arrays, or of lists of numbers, in the structure that they are in."""
    if isinstance(samples, dict):
        return {name: _tensors(each) for name, each in samples.items()}
    if isinstance(samples, list | tuple) and all(hasattr(x, "shape") for x in samples):
        return type(samples)(map(ops.convert_to_tensor, samples))
    return ops.convert_to_tensor(samples)


def _is_random(model: Any, swapped: list[tuple[Any, Any]], inputs: Any) -> bool:
    """Whether a model answers otherwise each time, so that nothing can be compared."""
    layers = [(layer, layer) for layer, _ in swapped]
    return bool(compare(model, model, layers, inputs).differences)


def _report(found: Comparison, inputs: str) -> str:
    where = "; ".join(map(str, found.differences))
    lines = [f"For {inputs} the answers differ from those of the original: {where}."]
    if found.gained:
        lines.append(
            f"{_listed(found.gained)} no longer attend to padding: before, the mask "
            "was lost on the way, since Keras' attention takes it off its inputs."
        )
    if found.lost:
        lines.append(
            f"{_listed(found.lost)} attend to padding now: the mask is lost on the "
            "way, since Keras' attention takes it off its inputs."
        )
    if found.padded:
        lines.append(
            f"{_listed(found.padded)} give queries that are padding other outputs: "
            "Keras' attention gives them the mean of all values, ours the bias."
        )
    if len(lines) == 1:
        lines.append("No padding is involved.")
    return " ".join(lines)


def _describe_masks(original: Any, swapped: list[tuple[Any, Any]]) -> str:
    """Says that answers, which cannot be compared, may differ if there is padding."""
    if not any(
        getattr(layer, "mask_zero", False) or isinstance(layer, keras.layers.Masking)
        for layer in original._flatten_layers()
    ):
        return ""
    return (
        "No inputs could be drawn to compare the answers with those of the original. "
        "They may differ where there is padding, which Keras' attention treats "
        f"otherwise than ours, in {_listed([layer.name for layer, _ in swapped])}: "
        "pass `samples` to see."
    )


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, dict.fromkeys(names)))


def _watch(layer: Any) -> list[_Padding]:
    """Notes what each call of a layer hides."""
    call, calls = layer.call, []
    signature = inspect.signature(call)

    def watched(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        fused = "inputs" in given  # queries, keys and values are one
        query, keys = (
            [_hides(given.get(name)) for name in names]
            for names in (
                (["mask"], ["mask"])
                if fused
                else (["query_mask"], ["value_mask", "key_mask"])
            )
        )
        calls.append(_Padding(any(query), any(keys)))
        return call(*args, **kwargs)

    vars(layer)["call"] = watched
    return calls


def _hides(mask: Any) -> bool:
    return mask is not None and not np.all(_numbers(mask))


def _differences(
    original: Any, expected: Any, found: Any, tolerance: float
) -> list[Difference]:
    paths = keras.tree.flatten_with_path(expected)
    names = getattr(original, "output_names", None)
    if names is None or len(names) != len(paths):
        names = ["/".join(map(str, path)) or "output" for path, _ in paths]
    differences = []
    for name, (_, before), after in zip(
        names, paths, keras.tree.flatten(found), strict=True
    ):
        mask = get_keras_mask(after)
        mask = get_keras_mask(before) if mask is None else mask
        apart = _distance(before, after, mask, tolerance)
        if apart.any():
            rows = apart.reshape(len(apart), -1).max(-1) if apart.ndim else apart[None]
            size, count = float(rows.max()), int((rows > 0).sum())
            differences.append(Difference(name, size, count, len(rows)))
    return differences


def _distance(before: Any, after: Any, mask: Any, tolerance: float) -> np.ndarray:
    """How far numbers are apart, with zeros where that is within the tolerance."""
    one, other = (_numbers(x) for x in (before, after))
    if one.dtype.kind != "f":
        return (one != other).astype(float)
    apart = np.abs(one - other)
    apart[np.isnan(one) & np.isnan(other)] = 0
    apart[np.isnan(apart)] = np.inf
    if mask is not None:
        visible = _numbers(mask).astype(bool)
        visible = visible.reshape(visible.shape + (1,) * (apart.ndim - visible.ndim))
        apart = np.where(visible, apart, 0)
    size = np.abs(one[np.isfinite(one)]).max(initial=0.0)
    return np.where(apart > tolerance * max(size, 1e-3), apart, 0)


def _numbers(tensor: Any) -> np.ndarray:
    """An array of float64, or of whatever is not floating."""
    if keras.backend.standardize_dtype(tensor.dtype) == "bfloat16":  # NumPy has none
        tensor = ops.cast(tensor, "float32")
    array = np.asarray(ops.convert_to_numpy(tensor))
    return array.astype("float64") if array.dtype.kind == "f" else array
