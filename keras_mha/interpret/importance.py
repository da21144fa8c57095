"""How much a model's loss hangs on each of its attention heads."""

from __future__ import annotations

from functools import partial
from typing import Any

import keras
import numpy as np

from keras_mha.interpret.example_losses import check_loss, example_losses
from keras_mha.interpret.paths import attention_layers, count_rows, pair_batches
from keras_mha.layers.arguments import check_flag, check_positive


def head_importance(
    model: keras.layers.Layer,
    inputs: Any,
    labels: Any = None,
    *,
    loss: Any = None,
    normalize: bool = True,
    batch_size: int = 32,
) -> dict[str, np.ndarray]:
    """Estimates how much a model's loss hangs on each attention head.

    For each head `h`, with the head mask `m` of ones that multiplies its mixed values,
    the mean over the examples `x` of

        |d loss(x) / d m_h|,

    in inference. The gradient is taken example by example: effects of opposite signs
    add up. The model is run as `attention_maps` runs it, and stays as it is.

    Source: Michel, Levy and Neubig 2019, "Are sixteen heads really better than one?",
    section 4.1, which divides by the l2 norm over each layer's heads as well.

    What it does not prove. It is a first-order estimate around the whole model: of
    two heads that do the same, each may seem needless while both are not. What
    removing heads costs is measured by `pruning_curve`.

    Needs the TensorFlow backend.

    Letters: B batch, N query heads.

    Args:
        model: A built model that attends by layers of keras_mha, at any depth, whose
            examples do not depend on each other.
        inputs: What `attention_maps` takes, with `labels`; or without them an iterable
            of pairs `(inputs, labels)` of batches, such as a `tf.data.Dataset`.
        labels: What the loss compares the outputs with, one row for each example; an
            array, or a structure of them if `loss` takes one.
        loss: The name of one of Keras' losses, a `keras.losses.Loss`, or a function
            of labels and outputs that returns losses `(B, ...)`. It is taken as
            `compile` takes it: labels and outputs are cast to
            `keras.config.floatx()`, and a last axis of size 1 that only one of them
            has makes no difference. An example's losses are averaged over the positions
            that the outputs' Keras mask leaves, if they carry one, so that padding
            does not count; each example counts alike, whatever its length. A function
            that gives one number for each example has averaged already. Defaults to
            the one `model` was compiled with.
        normalize: Whether to divide by the l2 norm over each layer's heads, which
            makes layers comparable.
        batch_size: Rows of a batch where `inputs` are not batches already.

    Returns:
        Numbers `(N,)` in float64, 0 or more, by path of the layer, as `attention_maps`
        names it. A layer's heads count once, over all its calls.

    Raises:
        TypeError: If `model` is not a Keras layer, or `loss` not a loss.
        ValueError: If the model does not fit (see `attention_maps`), it has no
            loss, no example or no label, losses are not one or more for each example
            or do not have the axes of the outputs' mask, a layer sees other rows than
            the examples, or no gradient reaches a head.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> import keras_mha
    >>> from keras_mha.interpret import head_importance
    >>> ids = keras.Input((None,), dtype="int32")
    >>> x = keras_mha.TokenAndPositionEmbedding(11, 7, 8)(ids)
    >>> x = keras_mha.TransformerEncoderBlock(2, 16, name="block")(x)
    >>> x = keras.layers.GlobalAveragePooling1D()(x)
    >>> model = keras.Model(ids, keras.layers.Dense(2, "softmax")(x))
    >>> reviews, labels = np.array([[3, 1, 4], [1, 5, 0]]), np.array([1, 0])
    >>> importance = head_importance(
    ...     model, reviews, labels, loss="sparse_categorical_crossentropy"
    ... )
    >>> {path: numbers.shape for path, numbers in importance.items()}
    {'block/attention/self_attention': (2,)}
    """
    if keras.config.backend() != "tensorflow":
        raise ValueError(
            "`head_importance` needs Keras on its TensorFlow backend. Received: "
            f"backend={keras.config.backend()!r}"
        )
    from keras_mha.interpret.importance_tensorflow import head_gradients

    layers = attention_layers(model)
    check_flag(normalize, "normalize")
    size = check_positive(batch_size, "batch_size")
    loss = getattr(model, "loss", None) if loss is None else loss
    check_loss(loss)
    losses_of = partial(example_losses, loss)
    sums = {path: np.zeros(layer.num_heads) for path, layer in layers.items()}
    examples = 0
    for batch, targets in pair_batches(inputs, labels, size):
        gradients = head_gradients(model, layers, batch, targets, losses_of)
        for path, gradient in gradients.items():
            sums[path] += np.abs(gradient).sum(axis=0)
        examples += count_rows(targets)
    means = {path: total / examples for path, total in sums.items()}
    if not normalize:
        return means
    norms = {path: float(np.linalg.norm(mean)) for path, mean in means.items()}
    return {path: mean / (norms[path] or 1.0) for path, mean in means.items()}
