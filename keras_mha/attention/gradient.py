"""Custom gradients, in the one form that every backend of Keras accepts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from keras import ops, tree

from keras_mha.typing import Tensor


def with_gradient(
    function: Callable[[Any, Any], tuple[Tensor, Callable[[Tensor], Any]]],
    inputs: Any,
    constants: Any = None,
) -> Tensor:
    """Calls a function that brings its own gradient.

    Every tensor becomes an argument of the backend's custom gradient, those without
    a gradient too: JAX rejects a value with a gradient that comes by closure, and
    torch passes upstream gradients by name. What is not a tensor (`None`, numbers)
    reaches the function as it is. It has no second derivative.

    Args:
        function: Maps `inputs` and `constants` to one output tensor and a function
            that maps the gradient of the output to the gradients of `inputs`, in
            their structure; what it says of places without a tensor does not count.
            That function must not hold the output itself, only what it was computed
            from: torch would never free it.
        inputs: Structure (tuples, named tuples, lists, dicts) of floating tensors.
        constants: Structure of tensors that have no gradient, such as masks.

    Returns:
        The output of `function`.

    Example:

    >>> import tensorflow as tf
    >>> from keras_mha.attention.gradient import with_gradient
    >>> def clipped_square(inputs, limit):
    ...     (x,) = inputs
    ...     return x * x, lambda upstream: (upstream * tf.minimum(2.0 * x, limit),)
    >>> x = tf.Variable(5.0)
    >>> with tf.GradientTape() as tape:
    ...     y = with_gradient(clipped_square, (tf.convert_to_tensor(x),), 3.0)
    >>> float(y), float(tape.gradient(y, x))
    (25.0, 3.0)
    """
    leaves = tree.flatten((inputs, constants))
    places = [place for place, leaf in enumerate(leaves) if ops.is_tensor(leaf)]
    count = len(tree.flatten(inputs))

    @ops.custom_gradient
    def differentiable(*tensors: Tensor) -> tuple[Tensor, Callable[..., Any]]:
        filled = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        given = tree.pack_sequence_as((inputs, constants), filled)
        output, backward = function(*given)

        def gradient(*arguments: Tensor, upstream: Tensor = None) -> tuple[Any, ...]:
            # torch repeats the tensors by position; the others give nothing else.
            found = backward(arguments[0] if upstream is None else upstream)
            gradients = tree.flatten(found)
            return tuple(gradients[p] if p < count else None for p in places)

        return output, gradient

    return differentiable(*(leaves[place] for place in places))
