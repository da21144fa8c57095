"""The base class of the attention layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, TypedDict, get_args

import keras
import numpy as np
from keras import ops
from typing_extensions import override

from keras_mha.attention import dispatch
from keras_mha.attention.bias import Bias, all_distances, as_bias, check_bias
from keras_mha.attention.dropout import check_rate
from keras_mha.attention.mask_parts import MaskParts, spell_others
from keras_mha.layers import compiled
from keras_mha.layers.arguments import (
    check_flag,
    check_name,
    check_number,
    check_optional,
    check_output_shape,
    check_positive,
    check_seed,
    constructor_options,
)
from keras_mha.layers.dtype_config import dtype_config
from keras_mha.layers.normalization import RMSNormalization
from keras_mha.layers.observer import current_observer
from keras_mha.layers.positions import (
    ALiBi,
    DistanceBias,
    FunctionBias,
    RelativePositionBias,
    RotaryEmbedding,
)
from keras_mha.layers.projections import (
    Projection,
    ProjectionOptions,
    projection_arguments,
)
from keras_mha.layers.residual_norm import clone_layer
from keras_mha.layers.seeded_layer import SeededLayer, not_rematerialized
from keras_mha.typing import Shape, Tensor

Position: TypeAlias = Literal["rotary", "alibi", "relative"]
Norm: TypeAlias = Literal["layer", "rms"]

_QK_NORMS = {"layer": keras.layers.LayerNormalization, "rms": RMSNormalization}
_QK_NORM_EPSILON = 1e-6


class AttentionOptions(TypedDict, total=False):
    """Arguments that the attention layers add to Keras' own, by keyword.

    The constructor of `AttentionLayer` sets their defaults, checks and stores them.
    """

    jit_compile: compiled.JitCompile
    num_key_value_heads: int | None
    position: Position | keras.layers.Layer | Callable[..., Tensor] | None
    qk_norm: Norm | None
    qk_norm_epsilon: float
    logits_soft_cap: float | None
    use_sinks: bool
    # Those of `keras.layers.Layer`.
    name: str | None
    dtype: Any
    trainable: bool
    autocast: bool


class AttentionLayer(SeededLayer):
    """Base of the attention layers: arguments, projections, seeds and boundary.

    An option is named here, in `AttentionOptions` and in the constructor, and stored
    in the attribute `_name`, from which `get_config` reads it.
    """

    def __init__(
        self,
        *,
        num_heads: int,
        dropout: float,
        use_bias: bool,
        output_shape: int | Sequence[int] | None,
        sliding_window: int | None,
        flash_attention: bool | None,
        kernel_initializer: Any,
        bias_initializer: Any,
        kernel_regularizer: Any,
        bias_regularizer: Any,
        activity_regularizer: Any,
        kernel_constraint: Any,
        bias_constraint: Any,
        use_gate: bool,
        seed: int | None,
        jit_compile: compiled.JitCompile = "auto",
        num_key_value_heads: int | None = None,
        position: Position | keras.layers.Layer | Callable[..., Tensor] | None = None,
        qk_norm: Norm | None = None,
        qk_norm_epsilon: float = _QK_NORM_EPSILON,
        logits_soft_cap: float | None = None,
        use_sinks: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True
        self._num_heads = check_positive(num_heads, "num_heads")
        self._num_key_value_heads = _check_groups(num_key_value_heads, self._num_heads)
        self._dropout = check_rate(dropout, "dropout")
        self._output_shape = check_output_shape(output_shape)
        self._projections = ProjectionOptions(
            use_bias=use_bias,
            kernel_initializer=kernel_initializer,
            bias_initializer=bias_initializer,
            kernel_regularizer=kernel_regularizer,
            bias_regularizer=bias_regularizer,
            activity_regularizer=activity_regularizer,
            kernel_constraint=kernel_constraint,
            bias_constraint=bias_constraint,
        )
        self._use_gate = check_flag(use_gate, "use_gate")
        self._sliding_window = check_optional(sliding_window, "sliding_window")
        # Lowest and highest distance of a key from its query, without and with
        # causality.
        beyond = None if self._sliding_window is None else self._sliding_window - 1
        lower = None if beyond is None else -beyond
        self._bounds = (lower, beyond), (lower, 0)
        self._flash_attention = (
            None
            if flash_attention is None
            else check_flag(flash_attention, "flash_attention")
        )
        self._qk_norm = check_name(qk_norm, "qk_norm", Norm, optional=True)
        self._qk_norm_epsilon = check_number(qk_norm_epsilon, "qk_norm_epsilon")
        if self._qk_norm is None and self._qk_norm_epsilon != _QK_NORM_EPSILON:
            raise ValueError(
                "`qk_norm_epsilon` belongs to the normalizations of `qk_norm`. "
                f"Received: qk_norm=None, qk_norm_epsilon={qk_norm_epsilon}"
            )
        self._logits_soft_cap = (
            None
            if logits_soft_cap is None
            else check_number(logits_soft_cap, "logits_soft_cap")
        )
        self._use_sinks = check_flag(use_sinks, "use_sinks")
        self._jit_compile: compiled.JitCompile = compiled.check_jit_compile(jit_compile)
        self.supports_jit = self._jit_compile is not False
        # Factor of the scores; `None` is `1 / sqrt(H)`. An exporter folds it into the
        # queries' kernel.
        self._score_scale: float | None = None
        self.seed = self._seed = check_seed(seed)
        if self._dropout > 0:
            self._add_generator(self.seed)
        self._position = position if isinstance(position, str) else None
        with not_rematerialized():
            self.position_layer = self._position_layer(position)
            self.query_norm, self.key_norm = (
                None
                if qk_norm is None
                else _QK_NORMS[qk_norm](
                    epsilon=self._qk_norm_epsilon, dtype=self.dtype_policy, name=name
                )
                for name in ("query_norm", "key_norm")
            )
        self._turns = qk_norm is not None or isinstance(
            self.position_layer, RotaryEmbedding
        )

    @property
    def num_heads(self) -> int:
        """N, the number of query heads."""
        return self._num_heads

    @property
    def num_key_value_heads(self) -> int:
        """K, the number of key and value heads."""
        return self._num_key_value_heads or self._num_heads

    @property
    def dropout(self) -> float:
        """Share of the attention probabilities dropped in training."""
        return self._dropout

    @property
    def use_bias(self) -> bool:
        """Whether the projections have biases."""
        return self._projections.use_bias

    @property
    def jit_compile(self) -> compiled.JitCompile:
        """Whether XLA compiles the attention: True, False or "auto"."""
        return self._jit_compile

    @override
    def get_config(self) -> dict[str, Any]:
        projections = self._projections.get_config()
        options = {
            name: getattr(self, f"_{name}")
            for name in constructor_options(AttentionLayer)
            if name not in projections
        }
        if isinstance(self.position_layer, FunctionBias):
            # Copies need no registered function; what saves the layer does.
            options["position"] = self.position_layer
        elif self._position is None and self.position_layer is not None:
            options["position"] = keras.saving.serialize_keras_object(
                self.position_layer
            )
        return {
            **super().get_config(),
            **dtype_config(self),
            **options,
            **projections,
        }

    @classmethod
    @override
    def from_config(cls, config: dict[str, Any]) -> Any:
        if isinstance(config.get("position"), dict):
            position = keras.saving.deserialize_keras_object(config["position"])
            config = {**config, "position": position}
        return cls(**config)

    @override
    def quantize(
        self, mode: Any = None, type_check: bool = True, config: Any = None
    ) -> None:
        """Quantizes every projection; see `keras.Model.quantize`."""
        for layer in self._layers:
            if isinstance(layer, Projection):
                layer.quantize(mode, type_check=type_check, config=config)

    def _projection(
        self, name: str, rank: int, bound: int, output: Shape, **kwargs: Any
    ) -> Any:
        """Makes the dense layer `name`; see `projection_arguments`."""
        with not_rematerialized():
            return Projection(
                **projection_arguments(rank, bound, output, self._projections.use_bias),
                **self._projections.projection_kwargs(),
                dtype=self.dtype_policy,
                name=name,
                **kwargs,
            )

    def _position_layer(self, position: Any) -> Any:
        """Makes the layer for positions, or copies the one that the user passed."""
        if position is None:
            return None
        makers = {
            "rotary": lambda: RotaryEmbedding(dtype=self.dtype_policy, name="rotary"),
            "alibi": lambda: ALiBi(
                self._num_heads, dtype=self.dtype_policy, name="alibi"
            ),
            "relative": lambda: RelativePositionBias(
                self._num_heads, dtype=self.dtype_policy, name="relative"
            ),
        }
        if isinstance(position, str) and position in makers:
            return makers[position]()
        if isinstance(position, FunctionBias):
            position = position.function
        if callable(position) and not isinstance(position, keras.layers.Layer):
            return FunctionBias(
                position, self._num_heads, dtype=self.dtype_policy, name="function"
            )
        if not isinstance(position, RotaryEmbedding | DistanceBias):
            raise ValueError(
                f"`position` must be None, one of {get_args(Position)}, a "
                "`RotaryEmbedding`, a `DistanceBias` such as `ALiBi` or "
                "`RelativePositionBias`, or a function of distances. "
                f"Received: position={position!r}"
            )
        heads = getattr(position, "num_heads", self._num_heads)
        if heads != self._num_heads:
            raise ValueError(
                "The biases of `position` must be for as many heads as there are. "
                f"Received: position with num_heads={heads} and "
                f"num_heads={self._num_heads}"
            )
        return clone_layer(position, name=position.name)

    def _build_scores(self, axes: tuple[int, ...], key_dim: int) -> None:
        """Builds the weights that act on the scores."""
        if len(axes) > 1 and self.position_layer is not None:
            raise ValueError(
                "`position` needs a single attention axis: several have no one order "
                f"of positions. Received: attention_axes={axes}"
            )
        self._axis = min(axes)  # of positions, where there is one order of them
        if isinstance(self.position_layer, RotaryEmbedding):
            self.position_layer.options.size(key_dim)  # raises where it does not fit
        for norm in (self.query_norm, self.key_norm):
            if norm is not None:
                norm.build((None, None, self._num_heads, key_dim))
        if self.position_layer is not None:
            self.position_layer.build(())
        if self._use_sinks:
            self.sinks = self.add_weight(
                name="sinks",
                shape=(self._num_heads,),
                initializer="zeros",
                dtype="float32",
                autocast=False,
            )

    def _turn(self, heads: Tensor, norm: Any, start: Tensor | int = 0) -> Tensor:
        """Normalizes and rotates queries or keys, whose positions begin at `start`."""
        if norm is not None:
            heads = norm(heads)
        if isinstance(self.position_layer, RotaryEmbedding):
            places = ops.arange(ops.shape(heads)[1], dtype="int32") + start
            heads = self.position_layer(heads, positions=places)
        return heads

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: MaskParts,
        *,
        bias: Tensor | None = None,
        head_mask: Tensor | None = None,
        training: bool | None,
        return_scores: bool,
        keys_are_finite: bool = False,
        offset: Any = 0,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends, and reads weights and seed here, outside the XLA boundary."""
        dropout = self._dropout if training else 0.0
        joined = self._bias(bias, query, key, offset)
        implementation = dispatch.current_implementation()
        if implementation == "auto" and self._flash_attention is not None:
            implementation = "blockwise" if self._flash_attention else "reference"
            if return_scores:
                implementation = "reference"
        jit_compile = self._jit_compile
        observer = current_observer.get()
        if observer is not None:
            jit_compile = False  # a compiled function would outlive the observer
            if observer.wants_scores:
                implementation, return_scores = "reference", True
        mixed, scores = self._mix(
            query,
            key,
            value,
            mask,
            joined,
            self._draw_seed() if dropout > 0 else None,
            jit_compile=jit_compile,
            scale=self._score_scale,
            logits_soft_cap=self._logits_soft_cap,
            dropout=dropout,
            return_scores=return_scores,
            implementation=implementation,
            training=bool(training),
            keys_are_finite=keys_are_finite,
        )
        mixed = scale_heads(mixed, head_mask)
        if observer is not None:
            if observer.wants_scores:
                observer.see_scores(self, scores)
            mixed = scale_heads(mixed, observer.head_mask(self, mixed))
        return mixed, scores

    def _mix(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: MaskParts,
        bias: Bias,
        seed: Tensor | None,
        *,
        jit_compile: compiled.JitCompile,
        implementation: str,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Runs `dispatch.attend`, through XLA if `jit_compile` is True."""
        options["implementation"] = implementation
        if jit_compile is not True:
            return dispatch.attend(query, key, value, mask, bias, seed, **options)
        if mask.others is not None:
            # The boundary takes tensors, and these masks hold any values.
            names = ("logits_soft_cap", "dropout", "return_scores")
            call = {name: options[name] for name in names}
            dispatch.select(implementation, query, key, value, mask, bias, **call)
            mask = spell_others(mask, ops.shape(query)[1], ops.shape(key)[1])
        layout = (
            *query.shape[-2:],
            *value.shape[-2:],
            mask.structure,
            *map(_shared_axes, (mask.pairs, *bias)),
        )
        tensors = (query, key, value, mask, bias, seed)
        return compiled.call(dispatch.attend, *tensors, layout=layout, **options)

    def _offset(self, attention_mask: Any) -> Any:
        """How many keys a mask value counts before the first query."""
        if not isinstance(self.position_layer, DistanceBias):
            return 0
        return getattr(attention_mask, "offset", 0)

    def _bias(
        self, bias: Tensor | None, query: Tensor, key: Tensor, offset: Any
    ) -> Bias:
        distances = sinks = None
        if isinstance(self.position_layer, DistanceBias):
            T, S = (ops.shape(heads)[self._axis] for heads in (query, key))
            distances = self.position_layer(all_distances(T, S) - offset)
            T, S = (heads.shape[self._axis] for heads in (query, key))
            shape = (None, self._num_heads, T, S)
            check_bias(Bias(distances=distances), shape, "position")
        if self._use_sinks:
            # Keras takes its variable for a tensor and would not convert it, and a
            # `tf.function` inside another one cannot take a variable of Keras'.
            sinks = ops.cast(self.sinks, "float32")
        pairs = None if bias is None else as_bias(bias, None, 0, 0, "").pairs
        return Bias(pairs, distances, sinks)

    def _check_factors(
        self, bias: Any, head_mask: Tensor | None, score_shape: Shape
    ) -> None:
        """Refuses what joins the scores or the heads and does not fit them."""
        if callable(bias) and not ops.is_tensor(bias):
            raise TypeError(
                "`attention_bias` must be a tensor; biases of distances go to the "
                f"layer's `position`. Received: attention_bias={bias!r}"
            )
        if bias is not None:
            parts = as_bias(bias, None, 0, 0, "attention_bias")
            check_bias(parts, score_shape, "attention_bias")
        if head_mask is not None:
            _check_head_mask(np.shape(head_mask), score_shape[0], self._num_heads)


def _shared_axes(tensor: Tensor | None) -> tuple[bool, ...] | None:
    """Which axes have one element for all, so that it stays known in later traces."""
    return None if tensor is None else tuple(size == 1 for size in tensor.shape)


def _check_groups(num_key_value_heads: int | None, num_heads: int) -> int | None:
    heads = check_optional(num_key_value_heads, "num_key_value_heads")
    if heads is not None and num_heads % heads:
        raise ValueError(
            "`num_heads` must be a multiple of `num_key_value_heads`. Received: "
            f"num_heads={num_heads} and num_key_value_heads={num_key_value_heads}"
        )
    return heads


def _check_head_mask(shape: Shape, B: int | None, num_heads: int) -> None:
    fits_batch = len(shape) == 1 or shape[0] == B or None in (shape[0], B)
    if len(shape) not in (1, 2) or shape[-1] != num_heads or not fits_batch:
        raise ValueError(
            f"`head_mask` must have the shape (N,) or (B, N), N={num_heads}, B={B}. "
            f"Received: head_mask of shape {tuple(shape)}"
        )


def scale_heads(mixed: Tensor, head_mask: Tensor | None) -> Tensor:
    """Multiplies mixed values `(B, ..., N, V)` by factors `(N,)` or `(B, N)`."""
    if head_mask is None:
        return mixed
    head_mask = ops.cast(head_mask, mixed.dtype)
    inner = tuple(range(1, len(mixed.shape) - 2))
    if len(head_mask.shape) == 2:
        head_mask = ops.expand_dims(head_mask, inner)
    return mixed * ops.expand_dims(head_mask, -1)
