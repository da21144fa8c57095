"""A residual connection with normalization around any layer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

import keras
from keras import ops
from typing_extensions import override

from keras_mha.attention.dropout import check_rate, dropout
from keras_mha.layers.arguments import check_flag, check_name, check_number, check_seed
from keras_mha.layers.checked_layer import CheckedLayer
from keras_mha.layers.keras_mask import get_keras_mask, set_keras_mask
from keras_mha.layers.normalization import RMSNormalization
from keras_mha.layers.seeded_layer import SeededLayer, keep_frozen, not_rematerialized
from keras_mha.typing import Shape, Tensor

Placement = Literal["pre", "post", "sandwich"]
NormalizationName = Literal["layer", "rms"]
_EPSILON = 1e-6


@keras.saving.register_keras_serializable(package="keras_mha")
class ResidualNorm(SeededLayer):
    """Adds a layer's outputs to its inputs, and normalizes.

    With the sublayer `f`, the normalization `n` and the branch's scaling and
    dropout `s`:

    - `"pre"`: `x + s(f(n(x)))`,
    - `"post"`: `n(x + s(f(x)))`,
    - `"sandwich"`: `x + s(n2(f(n1(x))))`.

    The layer is called as the sublayer is: every argument after the inputs is
    handed on by name. The mask that the inputs carry reaches the sublayer and the
    outputs. Of several outputs the first joins the residual; the others are
    returned as they are. What stands in padding must be finite where the block is
    trained: normalizations and position-wise sublayers see it.

    Sources: He et al. 2016, "Deep residual learning" (residual); Vaswani et al.
    2017 (post); Xiong et al. 2020, "On layer normalization in the transformer
    architecture" (pre); Ding et al. 2021, "CogView" (sandwich); Zhang and Sennrich
    2019, "Root mean square layer normalization"; Huang et al. 2016, "Deep networks
    with stochastic depth"; Touvron et al. 2021, "Going deeper with image
    transformers" (layer scale); Bachlechner et al. 2021, "ReZero is all you need".

    Args:
        sublayer: A Keras layer whose first output has the shape of its first
            input.
        placement: `"pre"`, `"post"` or `"sandwich"`.
        normalization: `"layer"`, `"rms"`, or a layer; for `"sandwich"` a layer
            comes first and a clone of it second.
        dropout: Share of the sublayer's outputs dropped in training.
        stochastic_depth: Probability that an example skips the sublayer in
            training; where it does not, its branch is scaled by
            `1 / (1 - stochastic_depth)`.
        layer_scale: Initial value of a learned factor for each feature of the
            branch. Defaults to none.
        rezero: Whether one learned factor, zero at first, scales the branch.
        epsilon: Added to the variance by the normalizations named by a string.
        seed: Integer seed of dropout and stochastic depth.
        **kwargs: Arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    Call arguments:
        inputs: Floating `(B, ..., D)`.
        *args: The sublayer's other call arguments.
        **kwargs: Likewise.

    Returns:
        A tensor of the shape of `inputs`, followed by the sublayer's further
        outputs, if any.

    Raises:
        ValueError: If an argument is out of its domain, two exclude each other, or
            the sublayer's output has another shape than its input.
        TypeError: If `sublayer` or `normalization` is not a layer.

    Example:

    >>> import numpy as np
    >>> import keras
    >>> import keras_mha
    >>> block = keras_mha.ResidualNorm(keras.layers.Dense(8), rezero=True)
    >>> inputs = np.random.normal(size=(2, 3, 8)).astype("float32")
    >>> bool(np.array_equal(block(inputs), inputs))
    True
    """

    def __init__(
        self,
        sublayer: keras.layers.Layer,
        placement: Placement = "pre",
        normalization: NormalizationName | keras.layers.Layer = "layer",
        dropout: float = 0.0,
        stochastic_depth: float = 0.0,
        layer_scale: float | None = None,
        rezero: bool = False,
        epsilon: float = _EPSILON,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(sublayer, keras.layers.Layer):
            raise TypeError(
                "`sublayer` must be a Keras layer. "
                f"Received: sublayer={sublayer} of type {type(sublayer).__name__}"
            )
        # Keras reads the signature of `call` once, while the layer is made.
        self.call = _sign(self.call, sublayer.call)
        super().__init__(**kwargs)
        if layer_scale is not None:
            layer_scale = check_number(layer_scale, "layer_scale")
        rezero = check_flag(rezero, "rezero")
        if layer_scale is not None and rezero:
            raise ValueError(
                "`layer_scale` and `rezero` are two scalings of the same branch; "
                f"choose one. Received: layer_scale={layer_scale}, rezero={rezero}"
            )
        self.supports_masking = True
        self.sublayer = sublayer
        self.placement: Placement = check_name(placement, "placement", Placement)
        self.dropout = check_rate(dropout, "dropout")
        self.stochastic_depth = check_rate(stochastic_depth, "stochastic_depth")
        self.layer_scale = layer_scale
        self.rezero = rezero
        self.epsilon = check_number(epsilon, "epsilon")
        self.seed = check_seed(seed)
        self._named_norm = normalization if isinstance(normalization, str) else None
        self.norm = self._normalization(normalization)
        with not_rematerialized():
            self.output_norm = (
                clone_layer(self.norm) if placement == "sandwich" else None
            )
        if self.dropout > 0 or self.stochastic_depth > 0:
            self._add_generator(self.seed)

    @property
    def normalization(self) -> str | keras.layers.Layer:
        """The normalization as asked for: its name, or the layer."""
        return self._named_norm or self.norm

    @override
    def argument_shapes(self) -> Mapping[str, str]:
        sublayer, shape = self.sublayer, "(B, ..., D)"
        if isinstance(sublayer, CheckedLayer):
            shape = next(iter(sublayer.argument_shapes().values()), shape)
        return {"inputs": shape}

    @override
    def get_config(self) -> dict[str, Any]:
        serialize = keras.saving.serialize_keras_object
        return {
            **super().get_config(),
            "sublayer": serialize(self.sublayer),
            "placement": self.placement,
            "normalization": self._named_norm or serialize(self.norm),
            "dropout": self.dropout,
            "stochastic_depth": self.stochastic_depth,
            "layer_scale": self.layer_scale,
            "rezero": self.rezero,
            "epsilon": self.epsilon,
            "seed": self.seed,
        }

    @classmethod
    @override
    def from_config(cls, config: dict[str, Any]) -> ResidualNorm:
        deserialize = keras.saving.deserialize_keras_object
        config = {**config, "sublayer": deserialize(config["sublayer"])}
        if not isinstance(config.get("normalization", ""), str):
            config["normalization"] = deserialize(config["normalization"])
        return cls(**config)

    @override
    def build(self, input_shape: Shape) -> None:
        # A layer that was passed or loaded may be built already. One that
        # builds from several shapes does so when it is called.
        for layer in (self.norm, self.output_norm, self.sublayer):
            if layer is not None and not layer.built and _takes_one_shape(layer):
                layer.build(input_shape)
        if self.rezero:
            self.scale = self.add_weight(name="scale", shape=(), initializer="zeros")
        elif self.layer_scale is not None:
            self.scale = self.add_weight(
                name="scale",
                shape=(input_shape[-1],),
                initializer=keras.initializers.Constant(self.layer_scale),
            )
        keep_frozen(self)

    @override
    def call(
        self, inputs: Tensor, *args: Any, training: bool | None = None, **kwargs: Any
    ) -> Tensor:
        # Sublayers are told `training`. Left to Keras' call context they would not
        # know it when `keras.RematScope` computes this call again.
        branch = inputs
        if self.placement != "post":
            branch = self.norm(inputs, training=training)
        mask = get_keras_mask(inputs)
        if mask is not None:
            set_keras_mask(branch, mask)
        outputs = self.sublayer(branch, *args, training=training, **kwargs)
        first, *others = outputs if isinstance(outputs, tuple | list) else (outputs,)
        self._check_shape(inputs, first)
        output_mask = get_keras_mask(first)
        if self.output_norm is not None:
            first = self.output_norm(first, training=training)
        joined = inputs + self._scale(first, bool(training))
        if self.placement == "post":
            joined = self.norm(joined, training=training)
        if output_mask is not None:
            set_keras_mask(joined, output_mask)
        return (joined, *others) if others else joined

    @override
    def compute_output_shape(self, input_shape: Shape) -> tuple[int | None, ...]:
        return tuple(input_shape)

    @override
    def compute_output_spec(self, *args: Any, **kwargs: Any) -> Any:
        # Traces `call`, which also builds a sublayer that takes several shapes.
        return trace_spec(self, *args, **kwargs)

    def _normalization(
        self, normalization: str | keras.layers.Layer
    ) -> keras.layers.Layer:
        named = {"layer": keras.layers.LayerNormalization, "rms": RMSNormalization}
        if isinstance(normalization, keras.layers.Layer):
            if self.epsilon != _EPSILON:
                raise ValueError(
                    "`epsilon` belongs to the normalizations named by a string; a "
                    f"layer brings its own. Received: epsilon={self.epsilon}"
                )
            # It maps each position by itself, which not every layer says of itself.
            normalization.supports_masking = True
            return normalization
        if not isinstance(normalization, str):
            raise TypeError(
                f"`normalization` must be one of {sorted(named)} or a Keras layer. "
                f"Received: normalization={normalization}"
            )
        if normalization not in named:
            raise ValueError(
                f"`normalization` must be one of {sorted(named)} or a layer. "
                f"Received: normalization={normalization!r}"
            )
        with not_rematerialized():
            return named[normalization](epsilon=self.epsilon, dtype=self.dtype_policy)

    def _scale(self, branch: Tensor, training: bool) -> Tensor:
        if training and self.dropout > 0:
            branch = dropout(branch, self.dropout, self._draw_seed())
        if self.layer_scale is not None or self.rezero:
            branch = branch * ops.cast(self.scale, branch.dtype)
        if training and self.stochastic_depth > 0:
            shape = (ops.shape(branch)[0], *([1] * (len(branch.shape) - 1)))
            seed = self._draw_seed()
            branch = dropout(branch, self.stochastic_depth, seed, noise_shape=shape)
        return branch

    def _check_shape(self, inputs: Tensor, outputs: Tensor) -> None:
        before, after = tuple(inputs.shape), tuple(outputs.shape)
        fits = len(before) == len(after) and all(
            None in pair or pair[0] == pair[1]
            for pair in zip(before, after, strict=True)
        )
        if not fits:
            raise ValueError(
                "A residual needs a sublayer whose first output has the shape of its "
                f"input. Received: sublayer '{self.sublayer.name}' with input "
                f"{before} and output {after}"
            )


def trace_spec(layer: keras.layers.Layer, *args: Any, **kwargs: Any) -> Any:
    """Returns the symbolic outputs of a layer, by tracing its `call`."""

    def dense(tensor: Any) -> Any:
        # Keras marks the product of a dense tensor and a number as sparse.
        if isinstance(tensor, keras.KerasTensor) and tensor.sparse:
            return keras.KerasTensor(tensor.shape, tensor.dtype)
        return tensor

    arguments: Any = keras.tree.map_structure(dense, (args, kwargs))
    args, kwargs = arguments
    # Under `keras.RematScope`, `keras.ops.pad` fails in a graph unless inside this.
    with not_rematerialized():
        return keras.Operation.compute_output_spec(layer, *args, **kwargs)


def clone_layer(
    layer: keras.layers.Layer, name: str | None = None
) -> keras.layers.Layer:
    """Returns an unbuilt layer of the same configuration.

    Args:
        layer: The layer.
        name: Name of the clone. Defaults to a new one.
    """
    clone = layer.__class__.from_config({**layer.get_config(), "name": name})
    clone.supports_masking = layer.supports_masking
    return clone


def _takes_one_shape(layer: keras.layers.Layer) -> bool:
    return len(inspect.signature(layer.build).parameters) == 1


def _sign(call: Callable[..., Any], like: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `call` with the signature of `like`, its first argument `inputs`.

    Keras looks for tensors, masks and `training` by the names of a signature, and
    refuses a `**kwargs` that mixes tensors with other values.
    """
    first, *others = inspect.signature(like).parameters.values()
    kinds = inspect.Parameter
    if not any(other.name == "training" for other in others):
        rest = others and others[-1].kind is kinds.VAR_KEYWORD
        place = len(others) - 1 if rest else len(others)
        others.insert(place, kinds("training", kinds.KEYWORD_ONLY, default=None))

    def signed(inputs: Tensor, *args: Any, **kwargs: Any) -> Any:
        return call(inputs, *args, **kwargs)

    parameters = [kinds("inputs", first.kind), *others]
    vars(signed)["__signature__"] = inspect.Signature(parameters)
    return signed
