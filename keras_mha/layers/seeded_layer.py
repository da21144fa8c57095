"""Calls that can be computed again for their gradient, with the same dropout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

import keras
from typing_extensions import override

from keras_mha.layers.checked_layer import CheckedLayer
from keras_mha.layers.keras_mask import get_keras_mask, set_keras_mask
from keras_mha.typing import Tensor

_draw: ContextVar[Callable[[Any], Tensor] | None] = ContextVar("draw", default=None)


class SeededLayer(CheckedLayer):
    """Base of the layers with dropout, right under `keras.RematScope` too.

    There a layer's call runs twice, once forward and once more when its gradient
    is needed. Drawing a seed each time would give the gradient of another dropout
    than the one that was applied, so the second run gets the seeds of the first.
    Keyword arguments and masks, which TensorFlow loses there, survive.
    Sublayers are made inside `not_rematerialized()`: the layer is computed again as
    one, not each part of it once more by itself.
    """

    def _add_generator(self, seed: int | None) -> None:
        self.seed_generator = keras.random.SeedGenerator(seed)

    def _draw_seed(self) -> Tensor:
        """Returns the seed tensor `(2,)` of one dropout."""
        draw = _draw.get()
        generator = self.seed_generator
        return generator.next() if draw is None else draw(generator)

    @override
    def rematerialized_call(
        self, layer_call: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Callable[..., Any]:
        if any(x.activity_regularizer is not None for x in self._flatten_layers()):
            raise ValueError(
                "Under `keras.RematScope` the loss of an activity regularizer would "
                f"have no gradient. Received: layer '{self.name}' with an "
                "`activity_regularizer`"
            )
        rematerialize = super().rematerialized_call

        def call(*args: Any, **kwargs: Any) -> Any:
            arguments = (args, kwargs)
            leaves = keras.tree.flatten(arguments)
            places = [i for i, leaf in enumerate(leaves) if _is_floating(leaf)]
            seeds: list[Tensor] = []
            output_masks: list[Tensor | None] = []

            def replayed(*tensors: Tensor) -> Any:
                filled = list(leaves)
                for place, tensor in zip(places, tensors, strict=True):
                    set_keras_mask(tensor, get_keras_mask(leaves[place]))
                    filled[place] = tensor
                args, kwargs = keras.tree.pack_sequence_as(arguments, filled)
                # Keras would also compute each operation again by itself, and cannot
                # in a graph if it has keyword arguments, as `ops.pad` does.
                with not_rematerialized(), _replay(seeds):
                    outputs = layer_call(*args, **kwargs)
                output_masks[:] = map(get_keras_mask, keras.tree.flatten(outputs))
                return outputs

            # TensorFlow takes only floating tensors, by position, and passes on
            # copies without the masks that they carry.
            tensors = [leaves[place] for place in places]
            outputs = rematerialize(replayed, *tensors)(*tensors)
            flat = keras.tree.flatten(outputs)
            for output, mask in zip(flat, output_masks, strict=True):
                set_keras_mask(output, mask)
            return outputs

        return call


def _is_floating(leaf: Any) -> bool:
    return keras.ops.is_tensor(leaf) and "float" in keras.backend.standardize_dtype(
        leaf.dtype
    )


def keep_frozen(layer: keras.layers.Layer) -> None:
    """Freezes the weights that `build` has just created, if the layer is frozen.

    Keras passes `trainable=False` on only to sublayers that exist at that moment.
    """
    if not layer.trainable:
        # TensorFlow skips an assignment of the value that is there.
        layer.trainable = True
        layer.trainable = False


def not_rematerialized() -> AbstractContextManager[Any]:
    """Context in which sublayers are made that do not rematerialise themselves."""
    no_mode: Any = None  # Keras takes it, and says "str"
    return keras.RematScope(mode=no_mode)


@contextmanager
def _replay(seeds: list[Tensor]) -> Iterator[None]:
    """Hands out `seeds` in order, then draws more and appends them.

    An enclosing replay is asked for them, so that layers inside layers keep theirs.
    """
    outer = _draw.get()
    left = iter(tuple(seeds))

    def draw(generator: Any) -> Tensor:
        if (seed := next(left, None)) is not None:
            return seed
        seeds.append(generator.next() if outer is None else outer(generator))
        return seeds[-1]

    token = _draw.set(draw)
    try:
        yield
    finally:
        _draw.reset(token)
