"""The adapter of custom gradients, with gradients that are none of the true ones."""

from __future__ import annotations

import gc
import weakref
from typing import Any, NamedTuple

import numpy as np
import pytest
from keras import ops

from keras_mha.attention.gradient import with_gradient
from tests.support.attention_cases import (
    BACKEND,
    MODES,
    cast,
    draw,
    value_and_gradients,
)

X, Y, UPSTREAM = draw(3, 5, seed=1), draw(5, seed=2), draw(3, 5, seed=3)
COUNTS = np.array([2, 0, 7], "int32")
each_mode = pytest.mark.parametrize("mode", MODES)


class Inputs(NamedTuple):
    x: Any
    nothing: Any
    y: Any


class Constants(NamedTuple):
    counts: Any
    flag: Any
    factor: float


def product(inputs: Inputs, constants: Constants) -> Any:
    """`factor * counts * x * y`, with its gradient for `x` negated, for `y` halved."""
    x, nothing, y = inputs
    assert nothing is None
    assert constants.factor == 3.0
    weights = ops.cast(ops.where(constants.flag, constants.counts, 0), x.dtype)
    weights = ops.expand_dims(weights * constants.factor, 1)

    def backward(upstream: Any) -> Inputs:
        outer = upstream * weights
        return Inputs(-outer * y, "not looked at", ops.sum(outer * x, axis=0) / 2)

    return weights * x * y, backward


def apply(x: Any, y: Any, counts: Any, flag: Any) -> Any:
    return with_gradient(product, Inputs(x, None, y), Constants(counts, flag, 3.0))


@each_mode
def test_the_gradients_are_the_functions_own(mode: str) -> None:
    flag = np.array([True, True, False])
    (output,), found = value_and_gradients(
        apply,
        cast([X, Y], "float32"),
        [UPSTREAM],
        mode,
        constants=[ops.convert_to_tensor(COUNTS), ops.convert_to_tensor(flag)],
    )
    weights = (3.0 * COUNTS * flag)[:, None]
    np.testing.assert_allclose(output, weights * X * Y, atol=1e-5)
    outer = UPSTREAM * weights
    np.testing.assert_allclose(found[0], -outer * Y, atol=1e-5)
    np.testing.assert_allclose(found[1], (outer * X).sum(axis=0) / 2, atol=1e-5)


@each_mode
def test_constants_may_come_from_what_has_a_gradient(mode: str) -> None:
    """A mask computed from the inputs, say: none of it is a closed-over tracer."""

    def function(x: Any, y: Any) -> Any:
        return apply(x, y, ops.cast(x[:, 0] * 0 + 2, "int32"), x[:, 0] * 0 == 0)

    _, found = value_and_gradients(function, cast([X, Y], "float32"), [UPSTREAM], mode)
    np.testing.assert_allclose(found[0], -6 * UPSTREAM * Y, atol=1e-5)


@each_mode
def test_gradients_go_on_through_what_comes_before_and_after(mode: str) -> None:
    def function(x: Any, y: Any) -> Any:
        ones = ops.ones((3,), "int32")
        return 2.0 * apply(ops.square(x), y, ones, ones > 0)

    _, found = value_and_gradients(function, cast([X, Y], "float32"), [UPSTREAM], mode)
    np.testing.assert_allclose(found[0], -6 * UPSTREAM * Y * 2 * X, atol=1e-4)


@pytest.mark.skipif(BACKEND != "torch", reason="others keep no output of their own")
def test_what_the_gradient_keeps_is_freed_with_the_output() -> None:
    kept = []

    def function(inputs: Any, constants: Any) -> Any:
        del constants
        inner = ops.exp(inputs[0])
        kept.append(weakref.ref(inner))
        # A view of what is kept is another tensor: no circle.
        return ops.swapaxes(inner, 0, 1), lambda upstream: (
            ops.swapaxes(upstream, 0, 1) * inner,
        )

    x = cast([X], "float32")[0].requires_grad_()
    gc.collect()
    gc.disable()
    try:
        output = with_gradient(function, (x,))
        assert kept[-1]() is not None
        del output
        assert kept[-1]() is None
    finally:
        gc.enable()
