"""What self-attention and attention share as layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from typing_extensions import override

from keras_mha.attention import api
from keras_mha.attention.dropout import check_rate
from keras_mha.attention.masks import Mask
from keras_mha.layers import compiled
from keras_mha.layers.arguments import (
    check_output_shape,
    check_positive,
    check_seed,
)
from keras_mha.layers.dtype_config import dtype_config
from keras_mha.layers.projections import (
    Projection,
    ProjectionOptions,
    projection_arguments,
)
from keras_mha.layers.seeded_layer import SeededLayer, whole
from keras_mha.typing import Shape, Tensor


class AttentionLayer(SeededLayer):
    """Base of the attention layers: arguments, projections, seeds and boundary."""

    def __init__(
        self,
        *,
        num_heads: int,
        dropout: float,
        output_shape: int | Sequence[int] | None,
        projections: ProjectionOptions,
        jit_compile: bool | str,
        seed: int | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True
        self._num_heads = check_positive(num_heads, "num_heads")
        self._dropout = check_rate(dropout, "dropout")
        self._output_shape = check_output_shape(output_shape)
        self._projections = projections
        self._jit_compile = compiled.check_jit_compile(jit_compile)
        self.supports_jit = jit_compile is not False
        self.seed = check_seed(seed)
        if self._dropout > 0:
            self._add_generator(seed)

    @property
    def num_heads(self) -> int:
        """N, the number of heads."""
        return self._num_heads

    @property
    def dropout(self) -> float:
        """Share of the attention probabilities dropped in training."""
        return self._dropout

    @property
    def use_bias(self) -> bool:
        """Whether the projections have biases."""
        return self._projections.use_bias

    @property
    def jit_compile(self) -> bool | str:
        """Whether XLA compiles the attention: True, False or "auto"."""
        return self._jit_compile

    @override
    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            **dtype_config(self),
            "num_heads": self._num_heads,
            "dropout": self._dropout,
            "output_shape": self._output_shape,
            **self._projections.get_config(),
            "jit_compile": self._jit_compile,
            "seed": self.seed,
        }

    @override
    def quantize(
        self, mode: Any = None, type_check: bool = True, config: Any = None
    ) -> None:
        """Quantizes every projection; see `keras.Model.quantize`."""
        for projection in self._layers:
            projection.quantize(mode, type_check=type_check, config=config)

    def _projection(
        self, name: str, rank: int, bound: int, output: Shape, **kwargs: Any
    ) -> Any:
        """Makes the dense layer `name`; see `projection_arguments`."""
        with whole():
            return Projection(
                **projection_arguments(rank, bound, output, self._projections.use_bias),
                **self._projections.projection_kwargs(),
                dtype=self.dtype_policy,
                name=name,
                **kwargs,
            )

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Mask,
        *,
        axes: tuple[int, ...] = (1,),
        training: bool | None,
        return_scores: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Runs `api.attend`, drawing the seed here, outside the XLA boundary."""
        dropout = self._dropout if training else 0.0
        return compiled.call(
            api.attend,
            query,
            key,
            value,
            mask,
            self._draw_seed() if dropout > 0 else None,
            jit_compile=self._jit_compile,
            layout=(*query.shape[-2:], value.shape[-1], mask.structure),
            axes=axes,
            dropout=dropout,
            return_scores=return_scores,
            implementation=api.current_implementation(),
        )
