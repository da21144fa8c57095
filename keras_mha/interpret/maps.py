"""The attention maps of a whole model, by layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops
from typing_extensions import override

from keras_mha.interpret.paths import (
    as_tensors,
    attention_layers,
    run_model,
    watching,
)
from keras_mha.layers.observer import Observer
from keras_mha.typing import Tensor


def attention_maps(model: keras.layers.Layer, inputs: Any) -> dict[str, np.ndarray]:
    """Returns the scores of every attention layer and head of a model, by layer.

    Runs the model once, eagerly and in inference: no dropout. Each layer computes its
    scores whatever implementation it runs on otherwise, blockwise and compiled ones
    included, in memory that grows with T S. The model, its weights and what Keras has
    traced of it stay as they are, and other threads may use it meanwhile.

    What a map does not prove. It says how a head mixed its values, not why the model
    answered as it did. Jain and Wallace 2019, "Attention is not explanation", find
    very different maps that give the same answer, and maps that agree little with
    gradients and with leaving words out. Serrano and Smith 2019, "Is attention
    interpretable?", find that words of high attention can often be removed without
    effect on the answer. Wiegreffe and Pinter 2019, "Attention is not not
    explanation", object that such other maps are hard for a trained model to learn,
    and give tests of when maps tell something: run one before you rely on a map. In
    later layers, positions also stand for mixtures of words; see
    `keras_mha.interpret.attention_rollout`.

    Letters: B batch, T query length, S key length, N query heads.

    Args:
        model: A built model of any kind, or a layer, that attends by layers of
            keras_mha, at any depth.
        inputs: What one would hand to `model.predict`: an array, a tensor, a list of
            strings, a dictionary by input name, or a list with one entry for each of
            several inputs. If `model` is a layer and not a `keras.Model`, and its
            `call` takes several tensors other than `mask`, a list holds these arguments
            in their order, as in `[query, value]`; a dictionary holds arguments of any
            layer by name. A layer that was built on a list or dictionary gets one.

    Returns:
        Probabilities `(B, N, T, S)` in float32, or float64 for layers of that dtype,
        in the order of the calls, by path: the names of the layers that lead to the
        attention, such as `"encoder/block_0/attention/self_attention"`. A layer's
        second call in the model is `"...#2"`. Masked keys have zero, queries that see
        no key a row of zeros; other rows sum to one, or with `use_sinks` to less.
        Over several attention axes the shape is `(B, ..., N, T..., S...)`.

    Raises:
        TypeError: If `model` is not a Keras layer.
        ValueError: If it is not built, has no attention layer or calls none, or has
            one of Keras, which do not show their scores.
            `keras_mha.convert.from_keras` swaps `keras.layers.MultiHeadAttention` and
            `keras.layers.GroupQueryAttention`. It swaps no subclass of them, nor
            `keras.layers.Attention` and `keras.layers.AdditiveAttention`: put ours in
            the place of these yourself.
        RuntimeError: If it calls one inside a `tf.function` of its own, which this
            would change. A `tf.function` that was traced before is passed by.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> import keras_mha
    >>> ids = keras.Input((None,), dtype="int32")
    >>> x = keras_mha.TokenAndPositionEmbedding(11, 7, 8)(ids)
    >>> x = keras_mha.TransformerEncoderBlock(2, 16, name="block")(x)
    >>> model = keras.Model(ids, x)
    >>> maps = keras_mha.attention_maps(model, np.array([[3, 1, 4], [1, 5, 0]]))
    >>> {path: scores.shape for path, scores in maps.items()}
    {'block/attention/self_attention': (2, 2, 3, 3)}
    >>> float(maps["block/attention/self_attention"][1, :, :, 2].max())  # padding
    0.0
    """
    recorder = _Recorder(attention_layers(model))
    with watching(model, recorder):
        run_model(model, as_tensors(inputs))
    if not recorder.maps:
        raise ValueError(
            "`model` must call one of its attention layers where it can be watched. "
            f"Received: {type(model).__name__} {model.name!r}, which called none of "
            f"{list(recorder.paths.values())}"
        )
    return recorder.maps


class _Recorder(Observer):
    """Keeps the scores of every call."""

    wants_scores = True

    def __init__(self, layers: Mapping[str, keras.layers.Layer]) -> None:
        self.paths = {id(layer): path for path, layer in layers.items()}
        self.maps: dict[str, np.ndarray] = {}

    @override
    def see_scores(self, layer: keras.layers.Layer, scores: Tensor) -> None:
        # A layer that Keras does not know of, and does not save, has no path of ours.
        path = self.paths.get(id(layer)) or layer.path or layer.name
        if keras.config.backend() == "tensorflow" and not hasattr(scores, "numpy"):
            raise RuntimeError(
                "`attention_maps` runs models eagerly. Received: attention layer "
                f"{path!r}, called inside a `tf.function`; see "
                "`tf.config.run_functions_eagerly`"
            )
        name, call = path, 1
        while name in self.maps:
            call += 1
            name = f"{path}#{call}"
        wide = "float64" if "float64" in str(scores.dtype) else "float32"
        self.maps[name] = np.asarray(ops.convert_to_numpy(ops.cast(scores, wide)))
