"""The dense layers around attention."""

from __future__ import annotations

import math
import re
import string
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, get_args

import keras
from keras import ops
from typing_extensions import override

from keras_mha.layers.arguments import check_flag, check_number, check_positive
from keras_mha.typing import Shape, Tensor

Part: TypeAlias = Literal["query", "key", "value"]
PARTS = get_args(Part)


class ProjectionOptions:
    """Initializers, regularizers and constraints of an attention layer's kernels.

    Holds them as objects, hands each projection its own copy of the initializers
    (one unseeded instance shared by two kernels would give both the same values),
    and serializes them for `get_config`.
    """

    def __init__(
        self,
        *,
        use_bias: bool,
        kernel_initializer: Any,
        bias_initializer: Any,
        kernel_regularizer: Any,
        bias_regularizer: Any,
        activity_regularizer: Any,
        kernel_constraint: Any,
        bias_constraint: Any,
    ) -> None:
        self.use_bias = check_flag(use_bias, "use_bias")
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)
        self.activity_regularizer = keras.regularizers.get(activity_regularizer)
        self.kernel_constraint = keras.constraints.get(kernel_constraint)
        self.bias_constraint = keras.constraints.get(bias_constraint)

    def get_config(self) -> dict[str, Any]:
        """Returns the options under the names of the constructors' arguments."""
        initializers, regularizers, constraints = (
            keras.initializers,
            keras.regularizers,
            keras.constraints,
        )
        return {
            "use_bias": self.use_bias,
            "kernel_initializer": initializers.serialize(self.kernel_initializer),
            "bias_initializer": initializers.serialize(self.bias_initializer),
            "kernel_regularizer": regularizers.serialize(self.kernel_regularizer),
            "bias_regularizer": regularizers.serialize(self.bias_regularizer),
            "activity_regularizer": regularizers.serialize(self.activity_regularizer),
            "kernel_constraint": constraints.serialize(self.kernel_constraint),
            "bias_constraint": constraints.serialize(self.bias_constraint),
        }

    def projection_kwargs(self) -> dict[str, Any]:
        """Returns the keyword arguments of one projection."""
        return {
            "kernel_initializer": clone_initializer(self.kernel_initializer),
            "bias_initializer": clone_initializer(self.bias_initializer),
            "kernel_regularizer": self.kernel_regularizer,
            "bias_regularizer": self.bias_regularizer,
            "activity_regularizer": self.activity_regularizer,
            "kernel_constraint": self.kernel_constraint,
            "bias_constraint": self.bias_constraint,
        }


class Projection(keras.layers.EinsumDense):
    """An `EinsumDense` whose bias is right for sizes of one, and that quantizes.

    On TensorFlow `keras.ops.add`, with which Keras adds the bias, drops dimensions of
    size one, and then takes a bias `(N, 1)` for one of the time axis where T = N.
    """

    def __init__(self, equation: str, **kwargs: Any) -> None:
        super().__init__(equation, **kwargs)
        self.read_equation()

    def read_equation(self) -> None:
        """Takes from the equation how `call` computes it."""
        # It maps each position by itself, so a mask means the same after it.
        self.supports_masking = True
        inputs, _, outputs = re.split(",|->", self.equation)
        # How many axes of the inputs stay; the kernel's first sum over the others.
        self._free = sum(letter in outputs for letter in inputs)
        self._summed = len(inputs) - self._free

    @override
    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        del training  # nothing differs; Keras passes it to every `EinsumDense`
        kernel = self.kernel
        summed: Any = kernel.shape[: self._summed]
        size = math.prod(summed)
        # One product of two matrices: TensorFlow would multiply the kernel with each
        # row of the batch, and sum up a gradient for each.
        rows = ops.reshape(inputs, (-1, size))
        outputs: Any = ops.matmul(rows, ops.reshape(kernel, (size, -1)))
        free: Any = inputs.shape[: self._free]
        if None in free:
            free = ops.shape(inputs)[: self._free]
        outputs = ops.reshape(outputs, (*free, *kernel.shape[self._summed :]))
        if self.bias is not None:
            outputs += self.bias
        return outputs if self.activation is None else self.activation(outputs)

    @override
    def enable_lora(
        self,
        rank: int,
        lora_alpha: float | None = None,
        a_initializer: Any = "he_uniform",
        b_initializer: Any = "zeros",
    ) -> None:
        """Freezes the kernel and adds low-rank factors; see `EinsumDense`.

        A second call for the same rank and scaling changes nothing: a loop over all
        layers of a model meets the layer that holds this one, too.

        Raises:
            ValueError: If the layer is not built, has a kernel constraint or is
                adapted already in another way.
        """
        if not self.is_adapted(rank, lora_alpha):
            super().enable_lora(rank, lora_alpha, a_initializer, b_initializer)

    def is_adapted(self, rank: int, lora_alpha: float | None) -> bool:
        """Returns whether the factors asked for are there already.

        Raises:
            ValueError: If they are not and cannot be added.
        """
        if not self.built:
            raise ValueError("`enable_lora` needs a built layer: call it first.")
        if self.kernel_constraint is not None:
            raise ValueError(
                "`enable_lora` and `kernel_constraint` exclude each other. "
                f"Received: kernel_constraint={self.kernel_constraint}"
            )
        if not self.lora_enabled:
            return False
        if (self.lora_rank, self.lora_alpha) != (rank, lora_alpha or rank):
            raise ValueError(
                f"`enable_lora` works once a layer, and '{self.name}' has factors of "
                f"rank {self.lora_rank} and lora_alpha={self.lora_alpha}. "
                f"Received: rank={rank}, lora_alpha={lora_alpha}"
            )
        return True

    @override
    def quantize(
        self, mode: Any = None, type_check: bool = True, config: Any = None
    ) -> None:
        del type_check  # Keras' guard against subclasses that it does not know
        if self.bias is not None and 1 in self.bias.shape[1:]:
            raise ValueError(
                "Keras adds the bias of a quantized projection wrongly where a size is "
                "one; use `use_bias=False` or leave it in float. Received: projection "
                f"'{self.name}' with a bias of shape {tuple(self.bias.shape)}"
            )
        super().quantize(mode, type_check=False, config=config)


def check_lora(
    rank: int, targets: Sequence[Part], lora_alpha: float | None
) -> tuple[int, tuple[Part, ...], float | None]:
    """Returns the arguments of `enable_lora`, checked.

    Raises:
        ValueError: If one is out of its domain.
    """
    rank = check_positive(rank, "rank")
    if lora_alpha is not None:
        lora_alpha = check_number(lora_alpha, "lora_alpha")
    names: Any = (targets,) if isinstance(targets, str) else tuple(targets)
    unknown = [name for name in names if name not in PARTS]
    if not names or unknown or len(set(names)) < len(names):
        raise ValueError(
            f"`targets` must be different names out of {PARTS}, at least one. "
            f"Received: targets={names}"
        )
    return rank, names, lora_alpha


def clone_initializer(initializer: Any) -> Any:
    """Returns an initializer of the same configuration that draws for itself."""
    if not isinstance(initializer, keras.initializers.Initializer):
        return initializer  # a plain function
    return initializer.__class__.from_config(initializer.get_config())


def projection_arguments(
    rank: int, bound: int, output: Shape, use_bias: bool
) -> dict[str, Any]:
    """Arguments of an `EinsumDense` that maps the last axes of its inputs.

    Args:
        rank: Number of dimensions of the inputs, the batch included.
        bound: How many of the last ones the projection sums over.
        output: Sizes of the dimensions that take their place.
        use_bias: Whether to add a bias of shape `output`.

    Example:

    >>> from keras_mha.layers.projections import projection_arguments
    >>> projection_arguments(3, 1, (2, 5), use_bias=True)["equation"]
    'abc,cde->abde'
    """
    letters = string.ascii_lowercase
    free = letters[: rank - bound]
    summed = letters[rank - bound : rank]
    new = letters[rank : rank + len(output)]
    return {
        "equation": f"{free}{summed},{summed}{new}->{free}{new}",
        "output_shape": (*([None] * (len(free) - 1)), *output),
        "bias_axes": new if use_bias else None,
    }
