"""One dense layer for queries, keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops
from typing_extensions import override

from keras_mha.layers.projections import (
    PARTS,
    Part,
    Projection,
    check_lora,
    clone_initializer,
    projection_arguments,
)
from keras_mha.typing import Shape, Tensor


class FusedProjection(Projection):
    """Projects inputs to the heads' queries, keys and values in one product.

    The kernel is `(D, K, G H + H + V)`, G = N / K: the columns of each key head, its
    queries', its own and its values', lie side by side. Each part is initialized as
    a projection of its own would be, and can have low-rank factors of its own.

    Low-rank adaptation follows Hu et al. 2021, "LoRA: low-rank adaptation of large
    language models": the kernel is frozen and `alpha / rank * A B` joins it, `A`
    `(D, rank)` and `B` `(rank, heads * size)` for each adapted part. Weights are saved
    with the factors merged in, as Keras does, so a file fits a layer with and
    without factors.

    Letters: B batch, T length, D model width, N query heads, K key/value heads, H
    query and key size of a head, V value size of a head.

    Args:
        num_heads: N.
        key_dim: H.
        value_dim: V.
        use_bias: Whether each projection has a bias.
        num_key_value_heads: K, a divisor of N. Defaults to N.
        **kwargs: Arguments of `keras.layers.EinsumDense`.
    """

    def __init__(
        self,
        num_heads: int,
        key_dim: int,
        value_dim: int,
        use_bias: bool = True,
        num_key_value_heads: int | None = None,
        **kwargs: Any,
    ) -> None:
        self._num_heads = num_heads
        self._key_dim = key_dim
        self._shared = num_key_value_heads or num_heads
        self._sizes = (num_heads // self._shared * key_dim, key_dim, value_dim)
        kwargs["kernel_initializer"] = _PartwiseInitializer(
            kwargs["kernel_initializer"], self._sizes
        )
        arguments = projection_arguments(
            3, 1, (self._shared, sum(self._sizes)), use_bias=use_bias
        )
        super().__init__(**arguments, **kwargs)
        self._adapted: tuple[Part, ...] = ()
        self._lora_options: tuple[Any, ...] | None = None
        self._scaling = 0.0

    @property
    def head_sizes(self) -> tuple[int, int]:
        """H and V."""
        return self._key_dim, self._sizes[2]

    @override
    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        outputs = super().call(inputs, training=training)
        return self._with_delta(outputs, inputs) if self._adapted else outputs

    @override
    def quantized_call(self, *args: Any, **kwargs: Any) -> Tensor:
        outputs = super().quantized_call(*args, **kwargs)
        if not self._adapted:
            return outputs
        return self._with_delta(outputs, args[0] if args else kwargs["inputs"])

    def split(self, projected: Tensor) -> Any:
        """Cuts it into `(B, T, N, H)`, `(B, T, K, H)` and `(B, T, K, V)`."""
        query, key, value = self.cut(projected)
        if self._shared != self._num_heads:
            batch, length = ops.shape(query)[:2]
            heads = (batch, length, self._num_heads, self._key_dim)
            query = ops.reshape(query, heads)
        return query, key, value

    @override
    def enable_lora(
        self,
        rank: int,
        targets: Sequence[Part] = ("query", "value"),
        lora_alpha: float | None = None,
    ) -> None:
        """Freezes the kernel and adds low-rank factors to the parts in `targets`.

        A second call with the same arguments changes nothing; see `Projection`.

        Args:
            rank: Columns of `A`, rows of `B`.
            targets: Names out of "query", "key" and "value".
            lora_alpha: Numerator of the scaling `lora_alpha / rank`, positive.
                Defaults to `rank`.

        Raises:
            ValueError: If an argument is out of its domain, the layer is not
                built, has a kernel constraint, is adapted already, or is
                quantized in another way than int8.
        """
        options = rank, targets, lora_alpha = check_lora(rank, targets, lora_alpha)
        if options == self._lora_options:
            return
        if not self.built:
            raise ValueError("`enable_lora` needs a built layer: call it first.")
        if self._adapted:
            raise ValueError(
                "`enable_lora` was called before and works once a layer. "
                f"Already adapted: {self._adapted}"
            )
        if self.kernel_constraint is not None:
            raise ValueError(
                "`enable_lora` and `kernel_constraint` exclude each other. "
                f"Received: kernel_constraint={self.kernel_constraint}"
            )
        if self.quantization_mode not in (None, "int8"):
            raise ValueError(
                "`enable_lora` works on float and int8 kernels. "
                f"Received: quantization mode {self.quantization_mode}"
            )
        # Keras locks a built layer's state and has no public way to reopen it.
        self._tracker.unlock()
        for target in targets:
            width = self._shared * self._sizes[PARTS.index(target)]
            for letter, shape, initializer in (
                ("a", (self._kernel.shape[0], rank), "he_uniform"),
                ("b", (rank, width), "zeros"),
            ):
                # float32 whatever the policy: small updates would underflow
                factor = self.add_weight(
                    name=f"lora_{target}_{letter}",
                    shape=shape,
                    initializer=initializer,
                    regularizer=self.kernel_regularizer,
                    dtype="float32",
                )
                setattr(self, f"lora_{target}_{letter}", factor)
        self._kernel.trainable = False
        self._tracker.lock()
        self._adapted = targets
        self._lora_options = options
        self._scaling = 1.0 if lora_alpha is None else lora_alpha / rank

    @override
    def quantize(
        self, mode: Any = None, type_check: bool = True, config: Any = None
    ) -> None:
        """Quantizes the kernel, low-rank factors merged in first.

        Raises:
            ValueError: If the kernel is adapted and `mode` is not "int8".
        """
        if self._adapted:
            if mode != "int8":
                raise ValueError(
                    "A kernel with low-rank factors can be quantized to int8 only. "
                    f"Received: mode={mode}"
                )
            self._kernel.assign(self.merged_kernel())
            self._reset_factors()
        super().quantize(mode, type_check=type_check, config=config)

    @override
    def save_own_variables(self, store: Any) -> None:
        if not self._adapted:
            super().save_own_variables(store)
            return
        values = {"kernel": self.merged_kernel()}
        if self.quantization_mode == "int8":
            values["kernel"], scale = keras.quantizers.abs_max_quantize(
                values["kernel"], axis=0, to_numpy=True
            )
            values["kernel_scale"] = ops.reshape(scale, self.kernel_scale.shape)
        for place, name in enumerate(self._saved_names()):
            store[str(place)] = values[name] if name in values else getattr(self, name)

    @override
    def load_own_variables(self, store: Any) -> None:
        if not self._adapted:
            super().load_own_variables(store)
            return
        for place, name in enumerate(self._saved_names()):
            variable = self._kernel if name == "kernel" else getattr(self, name)
            variable.assign(store[str(place)])
        self._reset_factors()

    def _saved_names(self) -> list[str]:
        names = self.variable_serialization_spec[self.quantization_mode]
        return [name for name in names if name != "bias" or self.bias is not None]

    def _factors(self, target: str) -> tuple[Any, Any]:
        return getattr(self, f"lora_{target}_a"), getattr(self, f"lora_{target}_b")

    def _reset_factors(self) -> None:
        """Makes the factors' product zero, once the kernel holds it."""
        for target in self._adapted:
            _, up = self._factors(target)
            up.assign(ops.zeros_like(up))

    def _with_delta(self, outputs: Tensor, inputs: Tensor) -> Tensor:
        dtype = outputs.dtype
        return outputs + self._spread(
            {
                target: ops.matmul(
                    ops.matmul(inputs, ops.cast(down, dtype)), ops.cast(up, dtype)
                )
                for target in self._adapted
                for down, up in [self._factors(target)]
            },
            ops.zeros_like(outputs),
        )

    def merged_kernel(self) -> Tensor:
        """The kernel in float, low-rank factors merged in; its columns: `cut`."""
        kernel = self._kernel
        if self.quantization_mode == "int8":
            scale = ops.reshape(self.kernel_scale, (1, *kernel.shape[1:]))
            kernel = ops.cast(kernel, scale.dtype) / scale
        deltas = {
            target: ops.matmul(*self._factors(target)) for target in self._adapted
        }
        delta = self._spread(deltas, ops.zeros(kernel.shape))
        return ops.cast(ops.cast(kernel, "float32") + delta, kernel.dtype)

    def cut(self, columns: Tensor) -> Any:
        """Cuts the last axis into queries', keys' and values' columns.

        Args:
            columns: `(..., K, G H + H + V)`, as the kernel and the bias have them.

        Returns:
            `(..., K, G H)`, of which the last two axes are `(N, H)` in order, then
            `(..., K, H)` and `(..., K, V)`.
        """
        query, key, value = self._sizes
        if query == key == value:  # without arithmetic on the places to cut at
            return ops.split(columns, 3, axis=-1)
        return ops.split(columns, (query, query + key), axis=-1)

    def _spread(self, deltas: dict[str, Tensor], zeros: Tensor) -> Tensor:
        """Lays the parts' deltas `(..., N * size)` out as `zeros`, scaled."""
        blanks = zip(PARTS, self.cut(zeros), strict=True)
        parts = [
            ops.reshape(deltas[name], ops.shape(blank)) * self._scaling
            if name in deltas
            else blank
            for name, blank in blanks
        ]
        return ops.concatenate(parts, axis=-1)


class _PartwiseInitializer(keras.initializers.Initializer):
    """Draws the kernel part by part, each with the fans of its own projection."""

    def __init__(self, initializer: Any, sizes: tuple[int, ...]) -> None:
        self.initializer = initializer
        self.sizes = sizes

    def __call__(self, shape: Shape, dtype: Any = None) -> Tensor:
        width, num_heads, _ = shape
        return ops.concatenate(
            [
                self._of_part()((width, num_heads, size), dtype=dtype)
                for size in self.sizes
            ],
            axis=-1,
        )

    def _of_part(self) -> Any:
        if not isinstance(self.initializer, keras.initializers.Initializer):
            return self.initializer  # a plain function
        config = self.initializer.get_config()
        if "input_axes" in config and config["input_axes"] is None:
            # what `keras.layers.EinsumDense` sets since Keras 3.15
            config.update(input_axes=[0], output_axes=[1, 2])
            return self.initializer.__class__.from_config(config)
        return clone_initializer(self.initializer)
