"""One check of all that a layer owes Keras, as Keras' own `run_layer_test`.

A case is a class with arguments, and inputs. Each part of the check is one function of
a case, so that a test's name says what is wrong.

Letters: B batch, T length.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from keras_mha.layers.arguments import constructor_options
from keras_mha.layers.attention_layer import AttentionLayer
from keras_mha.layers.keras_mask import get_keras_mask, set_keras_mask
from tests.support.attention_cases import check_close, numbers, value_and_gradients
from tests.support.layers import PADDING, normal, plain_config, randomize

# Largest errors of a policy, for outputs of the size of one.
PRECISIONS = {"mixed_float16": 0.03, "mixed_bfloat16": 0.2, "float64": 1e-4}


class LayerCase(NamedTuple):
    """One way to make a layer, and to call it.

    Attributes:
        layer_class: The class.
        required: The arguments without a default.
        options: All others, none at its default.
        inputs: Arrays `(B, T, ...)`.
        carries_mask: Whether the outputs carry the mask of the first input.
        mixes: Whether the padding of the first input, on its right, would count.
        compiles: Whether XLA takes it.
        has_policy: Whether one dtype policy decides on all of it.
    """

    layer_class: Any
    required: dict[str, Any]
    options: dict[str, Any]
    inputs: list[np.ndarray]
    carries_mask: bool = True
    mixes: bool = False
    compiles: bool = True
    has_policy: bool = True

    def make(self, **others: Any) -> Any:
        """A layer that shares no sublayer with other tests, not built."""
        layer = self.layer_class(**{**self.required, **self.options, **others})
        return self.layer_class.from_config(layer.get_config())

    def build(self, **others: Any) -> Any:
        """The same, built, with random weights."""
        layer = self.make(**others)
        layer(*self.inputs)
        return randomize(layer)

    def model(self) -> keras.Model:
        """A Functional model around a layer, for the inputs."""
        symbols = self.symbols()
        return keras.Model(symbols, self.make()(*symbols))

    def symbols(self, *, with_length: bool = False) -> list[Any]:
        """Symbolic inputs of the inputs' dtypes and shapes, of any length or theirs."""
        return [
            keras.Input(
                array.shape[1:] if with_length else _without_length(array.shape[1:]),
                dtype="string" if array.dtype.kind in "UO" else str(array.dtype),
            )
            for array in self.inputs
        ]

    @property
    def arguments(self) -> tuple[str, ...]:
        """The names of the constructor's arguments."""
        if issubclass(self.layer_class, AttentionLayer):
            return constructor_options(self.layer_class)
        parameters = inspect.signature(self.layer_class).parameters.values()
        kinds = inspect.Parameter
        return tuple(each.name for each in parameters if each.kind != kinds.VAR_KEYWORD)

    def __str__(self) -> str:
        return self.layer_class.__name__


def check_layer(case: LayerCase, part: str) -> None:
    """Checks one of `PARTS` of what a layer owes Keras."""
    PARTS[part](case)


def check_config(case: LayerCase) -> None:
    """The configuration holds every argument, and makes the layer again."""
    default = case.layer_class(**case.required).get_config()
    config = case.layer_class(**case.required, **case.options).get_config()
    assert set(case.arguments) <= set(config)
    for name, value in case.options.items():
        assert config[name] != default[name], name
        if isinstance(value, bool | int | float | tuple):
            assert config[name] == value, name
    base = {"name": "mine", "trainable": False}
    for options in ({}, case.options):
        layer = case.layer_class(
            **case.required, **options, **base, dtype="mixed_bfloat16"
        )
        config = layer.get_config()
        assert {name: config[name] for name in base} == base
        assert config["dtype"]["config"]["name"] == "mixed_bfloat16"
        again = case.layer_class.from_config(config)
        assert plain_config(again) == plain_config(layer)
    name = f"keras_mha>{case.layer_class.__name__}"
    assert keras.saving.get_registered_object(name) is case.layer_class


def check_build(case: LayerCase) -> None:
    """Building changes no argument, and calls build no second time."""
    for options in ({}, case.options):
        layer = case._replace(options=options).make()
        names = [name for name in case.arguments if hasattr(layer, name)]
        before = {name: getattr(layer, name) for name in names}
        config = plain_config(layer)
        layer.build(*(array.shape for array in case.inputs))
        paths = [weight.path for weight in layer.weights]
        layer(*case.inputs)
        assert [weight.path for weight in layer.weights] == paths
        assert plain_config(layer) == config
        for name, value in before.items():
            assert getattr(layer, name) is value, name


def check_symbolic(case: LayerCase) -> None:
    """Symbolic shapes, dtypes and masks are those of values."""
    layer = case.build()
    expected = layer(*case.inputs)
    shapes = [array.shape for array in case.inputs]
    taken = inspect.signature(layer.compute_output_shape).parameters
    computed = layer.compute_output_shape(*shapes[: len(taken)])
    assert tuple(computed) == tuple(expected.shape)
    for with_length in (False, True):
        symbols = case.symbols(with_length=with_length)
        outputs = layer(*symbols)
        assert outputs.dtype == keras.backend.standardize_dtype(expected.dtype)
        for symbolic, size in zip(outputs.shape, expected.shape, strict=True):
            assert symbolic in (None, size)
        masks = [get_keras_mask(each) is None for each in (outputs, expected)]
        assert masks[0] == masks[1]
        found = keras.Model(symbols, outputs)(_tensors(case))
        check_close(numbers(found), numbers(expected), 1e-5)


def check_modes(case: LayerCase) -> None:
    """Values and gradients are equal in eager mode, graphs and XLA, in training."""
    layer = case.build()
    expected = _differentiate(case, layer, "eager")
    for mode in ("graph", "xla"):
        for one, other in zip(_differentiate(case, layer, mode), expected, strict=True):
            check_close(one, other, 5e-5)


def check_precision(case: LayerCase) -> None:
    """Values and gradients of other policies come close to those of float32.

    Weights stay float32 in the mixed policies.
    """
    layer = case.build()
    expected = _differentiate(case, layer)
    for policy, tolerance in PRECISIONS.items():
        other = case.build(dtype=policy)
        other.set_weights(layer.get_weights())
        kind = policy.removeprefix("mixed_")
        outputs = other(*case.inputs)
        assert keras.backend.standardize_dtype(outputs.dtype) == kind
        stored = "float64" if policy == "float64" else "float32"
        assert {weight.dtype for weight in other.weights} <= {stored, "float32"}
        for one, wanted in zip(_differentiate(case, other), expected, strict=True):
            check_close(one, wanted, tolerance)


def _differentiate(
    case: LayerCase, layer: Any, mode: str = "eager"
) -> list[np.ndarray]:
    """Outputs in training, and the gradients of floating inputs and of weights."""
    floating = [array.dtype.kind == "f" for array in case.inputs]
    arrays = [x for x in case.inputs if x.dtype.kind == "f"]
    whole = [x for x in case.inputs if x.dtype.kind != "f"]
    weights = [weight.value for weight in layer.trainable_variables]
    state = [weight.value for weight in layer.non_trainable_variables]
    takes_training = "training" in inspect.signature(layer.call).parameters
    call = {"training": True} if takes_training else {}

    def function(*tensors: Any) -> Any:
        end = len(arrays) + len(weights)
        left, right = iter(tensors[: len(arrays)]), iter(tensors[end:])
        inputs = [next(left if is_float else right) for is_float in floating]
        values = list(tensors[len(arrays) : end])
        return layer.stateless_call(values, state, *inputs, **call)[0]

    outputs, gradients = value_and_gradients(
        function,
        [*map(ops.convert_to_tensor, arrays), *weights],
        [normal(*layer(*case.inputs).shape, seed=9)],
        mode,
        constants=[ops.convert_to_tensor(x) for x in whole],
        shapes=[
            *((None, None, *x.shape[2:]) for x in arrays),
            *(tuple(weight.shape) for weight in weights),
            *((None,) * x.ndim for x in whole),
        ],
    )
    return outputs + gradients


def check_files(case: LayerCase) -> None:
    """Both kinds of files bring configuration and outputs back."""
    model, inputs = case.model(), _tensors(case)
    untrained = numbers(model(inputs))
    randomize(model)
    expected = numbers(model(inputs))
    has_weights = bool(model.weights)
    assert (np.abs(expected - untrained).max() > 1e-3) == has_weights
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder, "model.keras"))
        loaded: Any = keras.saving.load_model(Path(folder, "model.keras"))
        model.save_weights(Path(folder, "model.weights.h5"))
        other = case.model()
        different = np.abs(numbers(other(inputs)) - expected).max() > 1e-3
        assert different == has_weights
        other.load_weights(Path(folder, "model.weights.h5"))
    assert type(loaded.layers[-1]) is case.layer_class
    assert plain_config(loaded.layers[-1]) == plain_config(model.layers[-1])
    for each in (loaded, other):
        np.testing.assert_array_equal(numbers(each(inputs)), expected)


def check_masks(case: LayerCase) -> None:
    """The outputs carry the inputs' mask, and padding changes no real position."""
    layer = case.build()
    first, *others = case.inputs

    def run(array: Any, mask: Any = None) -> Any:
        tensor = ops.convert_to_tensor(array)
        if mask is not None:
            set_keras_mask(tensor, ops.convert_to_tensor(mask))
        return layer(tensor, *others)

    outputs = run(first, PADDING)
    np.testing.assert_array_equal(get_keras_mask(outputs), PADDING)
    assert get_keras_mask(run(first)) is None
    poisoned = first.copy()
    poisoned[~PADDING] = np.nan
    found, expected = numbers(run(poisoned, PADDING)), numbers(outputs)
    np.testing.assert_allclose(found[PADDING], expected[PADDING], atol=1e-5)
    difference = np.abs(expected - numbers(run(first)))[PADDING].max()
    assert (difference > 1e-3) == case.mixes


def check_randomness(case: LayerCase) -> None:
    """The seed decides what training drops; each call draws anew, inference nothing."""
    layer, twin = (case.build() for _ in range(2))
    other = case.build(seed=case.options["seed"] + 1)
    drawn, again = (numbers(layer(*case.inputs, training=True)) for _ in range(2))
    np.testing.assert_array_equal(drawn, numbers(twin(*case.inputs, training=True)))
    assert np.abs(drawn - again).max() > 1e-3
    different = numbers(other(*case.inputs, training=True))
    assert np.abs(drawn - different).max() > 1e-3
    rates = {
        name: 0.0
        for name in case.options
        if name.endswith("dropout") or name == "stochastic_depth"
    }
    expected = case.build(**rates)(*case.inputs, training=True)
    np.testing.assert_allclose(layer(*case.inputs), expected, atol=1e-5)


def parts_of(case: LayerCase) -> list[str]:
    """The parts that a case has: all but those that mean nothing for it."""
    left_out = set()
    if not case.compiles:
        left_out.add("modes")
    if not case.has_policy:
        left_out.add("precision")
    if not case.carries_mask:
        left_out.add("masks")
    if "seed" not in case.options:
        left_out.add("randomness")
    return [part for part in PARTS if part not in left_out]


def _without_length(shape: tuple[int, ...]) -> tuple[int | None, ...]:
    return (None, *shape[1:]) if shape else ()


def _tensors(case: LayerCase) -> list[Any]:
    return [tf.convert_to_tensor(array) for array in case.inputs]


PARTS: dict[str, Callable[[LayerCase], None]] = {
    "config": check_config,
    "build": check_build,
    "symbolic": check_symbolic,
    "modes": check_modes,
    "precision": check_precision,
    "files": check_files,
    "masks": check_masks,
    "randomness": check_randomness,
}
