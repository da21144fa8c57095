"""Which layers `from_keras` converts, and how."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import keras

from keras_mha.convert import keras_hub
from keras_mha.convert.keras_layers import Masks, from_stock, is_stock
from keras_mha.convert.stock_masks import StockMaskAttention
from keras_mha.layers.multi_head_attention import MultiHeadAttention
from keras_mha.twin import Twins

Converter: TypeAlias = Callable[[Any], keras.layers.Layer]

_CONVERTERS: dict[type, Converter] = {}


def register_converter(layer_class: type, function: Converter) -> None:
    """Tells `from_keras` what to put in the place of layers of a class.

    Layers of exactly this class are converted, in models and on their own, whatever is
    inside them. A second call for a class takes the place of the first.

    Args:
        layer_class: A subclass of `keras.layers.Layer`.
        function: Takes a layer of that class, built or not, and returns the layer that
            takes its place: one that is called in the same way, with copies of the
            weights. It must not change the layer that it gets.

    Raises:
        TypeError: If `layer_class` is not such a class, or `function` cannot be called.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> import keras_mha
    >>> from keras_mha.convert import from_keras, register_converter
    >>> class Mixer(keras.layers.Layer):
    ...     def build(self, shape):
    ...         self.kernel = self.add_weight(shape=(3, shape[-1], 2, 4))
    ...         self.last = self.add_weight(shape=(2, 4, shape[-1]))
    ...     def call(self, x):
    ...         heads = keras.ops.einsum("btd,pdnh->pbtnh", x, self.kernel)
    ...         mixed = keras.ops.dot_product_attention(*keras.ops.unstack(heads))
    ...         return keras.ops.einsum("btnh,nhd->btd", mixed, self.last)
    >>> def convert(mixer):
    ...     layer = keras_mha.MultiHeadSelfAttention(2, 4, use_bias=False)
    ...     layer.build((None, None, mixer.last.shape[-1]))
    ...     kernel = np.concatenate(np.asarray(mixer.kernel), axis=-1)
    ...     layer.set_weights([kernel, mixer.last])
    ...     return layer
    >>> register_converter(Mixer, convert)
    >>> x = keras.Input((5, 6))
    >>> model = keras.Model(x, Mixer()(x))
    >>> x = np.random.normal(size=(3, 5, 6))
    >>> bool(np.allclose(from_keras(model)(x), model(x), atol=1e-5))
    True
    """
    if not (isinstance(layer_class, type) and issubclass(layer_class, keras.Layer)):
        raise TypeError(
            "`layer_class` must be a subclass of keras.layers.Layer. "
            f"Received: {layer_class!r}"
        )
    if not callable(function):
        raise TypeError(
            "`function` must take a layer and return the one in its place. "
            f"Received: {function!r}"
        )
    _CONVERTERS[layer_class] = function


def convert_layer(layer: Any, twins: Twins, masks: Masks) -> Any:
    """Makes what takes the place of a layer; `None` if that stays."""
    function = _CONVERTERS.get(type(layer))
    if function is not None:
        converted = function(layer)
        if not isinstance(converted, keras.Layer):
            raise TypeError(
                "A registered converter must return a layer. Received: "
                f"{converted!r} for layer '{layer.name}' ({type(layer).__name__})"
            )
        return converted
    if is_stock(layer):
        kind = StockMaskAttention if masks == "as_keras" else MultiHeadAttention
        return from_stock(layer, twins, kind)
    return keras_hub.convert_layer(layer, twins, masks)
