"""Holds what encoder and decoder blocks share.

A block does not list the options of its parts. It reads them off the constructors of
the parts, passes each option to every part that has it, and reads them back from the
parts for its configuration.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from typing_extensions import override

from keras_mha.attention.dropout import check_rate
from keras_mha.layers.arguments import check_seed, constructor_options, keyword_only
from keras_mha.layers.dtype_config import dtype_config
from keras_mha.layers.feed_forward import FeedForward
from keras_mha.layers.residual_norm import ResidualNorm, clone_layer
from keras_mha.layers.seeded_layer import SeededLayer, not_rematerialized
from keras_mha.layers.self_attention import MultiHeadSelfAttention
from keras_mha.typing import Shape

# The parts between residuals, by the block's arguments for them, and their names.
_PARTS: dict[str, type[keras.layers.Layer]] = {
    "attention": MultiHeadSelfAttention,
    "feed_forward": FeedForward,
}
_NAMES = {"attention": "self_attention", "feed_forward": "network"}
# Arguments of `keras.layers.Layer`; on a block they are the block's.
_OF_LAYERS = {
    *("name", "trainable", "dtype", "autocast", "activity_regularizer"),
    *("input_shape", "input_dim"),
}
# Options that a block sets itself, or that would change the width D.
_SET_BY_BLOCKS = {"sublayer", "output_shape", "output_dim"}
# Options that each part has for itself; a block has its own arguments for them.
_OF_EACH = {"dropout", "seed"}
# Arguments that version 0.1.0 took by position after `key_dim`.
_ONCE_POSITIONAL = (
    "activation",
    "gated",
    "placement",
    "normalization",
    "dropout",
    "attention_dropout",
    "stochastic_depth",
    "layer_scale",
    "rezero",
    "epsilon",
    "use_bias",
    "kernel_initializer",
    "kernel_regularizer",
    "jit_compile",
    "seed",
)
once_positional = keyword_only(*_ONCE_POSITIONAL)


def part_options(part: type) -> tuple[str, ...]:
    """Returns the options of a part that a block lets one choose."""
    names = constructor_options(part)
    return tuple(name for name in names if name not in _SET_BY_BLOCKS)


def block_options(part: type) -> tuple[str, ...]:
    """Returns the options of a part that are also options of the block."""
    taken = _OF_EACH | _OF_LAYERS
    return tuple(name for name in part_options(part) if name not in taken)


def list_options(
    options: Iterable[inspect.Parameter],
) -> Callable[[Any], Any]:
    """Decorates a constructor, so that `help` lists what its `**options` takes."""

    def decorate(constructor: Any) -> Any:
        signature = inspect.signature(constructor)
        *listed, rest = signature.parameters.values()
        names = {each.name for each in listed}
        listed += [
            each.replace(kind=each.KEYWORD_ONLY)
            for each in options
            if each.name not in names and each.kind is not each.VAR_KEYWORD
        ]
        constructor.__signature__ = signature.replace(parameters=[*listed, rest])
        return constructor

    return decorate


def _parameters() -> list[inspect.Parameter]:
    """The options of all parts, as their constructors have them."""
    parameters: dict[str, inspect.Parameter] = {}
    for part in (*_PARTS.values(), ResidualNorm):
        for base in part.__mro__:
            for name, each in inspect.signature(base.__init__).parameters.items():
                if name in block_options(part):
                    parameters.setdefault(name, each)
    return list(parameters.values())


class TransformerBlock(SeededLayer):
    """Base of the blocks: self-attention and a feed-forward network, with residuals.

    The arguments are those of `TransformerEncoderBlock`.
    """

    attention: ResidualNorm
    feed_forward: ResidualNorm

    @list_options(_parameters())
    @once_positional
    def __init__(
        self,
        num_heads: int | None = None,
        hidden_dim: int | None = None,
        key_dim: int | None = None,
        *,
        dropout: float = 0.0,
        attention_dropout: float | None = None,
        hidden_dropout: float | None = None,
        seed: int | None = None,
        attention: Mapping[str, Any] | MultiHeadSelfAttention | None = None,
        feed_forward: Mapping[str, Any] | keras.layers.Layer | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            **{name: options.pop(name) for name in _OF_LAYERS if name in options}
        )
        self.supports_masking = True
        dropout = check_rate(dropout, "dropout")
        self._attention_dropout, self._hidden_dropout = (
            None if rate is None else check_rate(rate, name)
            for name, rate in (
                ("attention_dropout", attention_dropout),
                ("hidden_dropout", hidden_dropout),
            )
        )
        self.seed = check_seed(seed)
        self._seeds = _derive_seeds(self.seed)
        sizes = {"num_heads": num_heads, "hidden_dim": hidden_dim, "key_dim": key_dim}
        options |= {name: size for name, size in sizes.items() if size is not None}
        chosen = {"attention": attention, "feed_forward": feed_forward}
        self._check_options(options, chosen)
        # Only names: Keras would save a layer in an attribute as one of the block's.
        self._replaced = [name for name in chosen if _is_layer(chosen[name])]
        # What the block tells a part by itself, unless its dictionary does.
        self._told = {
            "attention": {
                "dropout": _first_set(self._attention_dropout, dropout),
                "seed": self._seeds[0],
                "activity_regularizer": None,
            },
            "feed_forward": {
                "dropout": _first_set(self._hidden_dropout, dropout),
                "seed": self._seeds[1],
            },
        }
        residual = pick(options, block_options(ResidualNorm))
        normalization = residual.pop("normalization", "layer")
        self._residual = {**residual, "dropout": dropout, "dtype": self.dtype_policy}
        with not_rematerialized():
            for place, (name, part) in enumerate(_PARTS.items()):
                sublayer = make_part(
                    functools.partial(self._make, part),
                    chosen[name],
                    **pick(options, block_options(part)),
                    **self._told[name],
                    dtype=self.dtype_policy,
                    name=_NAMES[name],
                )
                half = self._with_residual(sublayer, normalization, name, 2 + place)
                setattr(self, name, half)

    @override
    def argument_shapes(self) -> Mapping[str, str]:
        return {"inputs": "(B, T, D)"}

    @override
    def get_config(self) -> dict[str, Any]:
        residual = self.attention.get_config()
        layers = {name: getattr(self, name).sublayer for name in _PARTS}
        configs = {name: layer.get_config() for name, layer in layers.items()}
        shared = pick(residual, block_options(ResidualNorm))
        for name, part in _PARTS.items():
            if name not in self._replaced:
                shared |= pick(configs[name], block_options(part))
        chosen: dict[str, Any] = {}
        for name, part in _PARTS.items():
            if name in self._replaced:
                chosen[name] = keras.saving.serialize_keras_object(layers[name])
            else:
                usual = {**shared, **self._told[name]}
                options = pick(configs[name], part_options(part))
                chosen[name] = {
                    option: value
                    for option, value in options.items()
                    if value != usual[option]
                } or None
        return {
            **super().get_config(),
            **dtype_config(self),
            **shared,
            **chosen,
            "dropout": residual["dropout"],
            "attention_dropout": self._attention_dropout,
            "hidden_dropout": self._hidden_dropout,
            "seed": self.seed,
        }

    @classmethod
    @override
    def from_config(cls, config: dict[str, Any]) -> Any:
        return cls(**keras.saving.deserialize_keras_object(config))

    @override
    def compute_output_shape(self, input_shape: Shape) -> tuple[int | None, ...]:
        return tuple(input_shape)

    def enable_lora(
        self,
        rank: int,
        targets: Sequence[str] = ("query", "value"),
        lora_alpha: float | None = None,
    ) -> None:
        """Adapts the attention of the block by low-rank factors.

        In a decoder block, that to the memory too. The dense layers of the
        feed-forward network have an `enable_lora` of Keras.

        Args:
            rank: Rank of the factors.
            targets: Names out of "query", "key" and "value".
            lora_alpha: The factors' product is scaled by `lora_alpha / rank`.
                Defaults to `rank`.

        Raises:
            ValueError: If an argument is out of its domain, the block is not built, or
                its attention was adapted before in another way.

        Example:

        >>> import keras_mha
        >>> block = keras_mha.TransformerEncoderBlock(num_heads=2, hidden_dim=16)
        >>> block.build((None, None, 8))
        >>> block.enable_lora(3)
        >>> factors = block.attention.sublayer.qkv_dense.trainable_variables
        >>> [tuple(factor.shape) for factor in factors[1:3]]
        [(8, 3), (3, 8)]
        """
        for name in ("attention", "memory_attention"):
            if (half := getattr(self, name, None)) is not None:
                half.sublayer.enable_lora(rank, targets, lora_alpha)

    def _make(self, part: type, **options: Any) -> keras.layers.Layer:
        return part(**options)

    def _with_residual(
        self,
        sublayer: keras.layers.Layer,
        normalization: str | keras.layers.Layer,
        name: str,
        seed: int,
    ) -> ResidualNorm:
        """Puts a residual around a sublayer, and a normalization shared with none."""
        if isinstance(normalization, keras.layers.Layer):
            normalization = clone_layer(normalization, name=normalization.name)
        return ResidualNorm(
            sublayer,
            **self._residual,
            normalization=normalization,
            seed=self._seeds[seed],
            name=name,
        )

    def _check_options(
        self, options: Mapping[str, Any], chosen: Mapping[str, Any]
    ) -> None:
        """Refuses options that no part takes, or that a part is told twice."""
        check_part("attention", chosen["attention"], MultiHeadSelfAttention)
        check_part("feed_forward", chosen["feed_forward"], FeedForward, any_layer=True)
        takers: dict[str, list[str]] = {}
        for argument, part in {**_PARTS, "residual": ResidualNorm}.items():
            for name in block_options(part):
                takers.setdefault(name, []).append(argument)
        for name, value in options.items():
            if name not in takers:
                close = difflib.get_close_matches(name, takers, n=1)
                hint = f" Close to it is `{close[0]}`." if close else ""
                raise TypeError(
                    f"`{type(self).__name__}` has no argument `{name}`, and no part of "
                    f"it takes one.{hint} Received: {name}={value!r}"
                )
            if all(_is_told(name, chosen.get(each)) for each in takers[name]):
                raise ValueError(
                    f"`{name}` is told twice: as an argument, and by "
                    f"`{'` and `'.join(takers[name])}`. Received: {name}={value!r} and "
                    f"{', '.join(f'{each}={chosen[each]!r}' for each in takers[name])}"
                )
        for argument, rate, part in (
            ("attention_dropout", self._attention_dropout, "attention"),
            ("hidden_dropout", self._hidden_dropout, "feed_forward"),
        ):
            if rate is not None and _is_told("dropout", chosen[part]):
                raise ValueError(
                    f"`{argument}` is told twice: as an argument, and by `{part}`. "
                    f"Received: {argument}={rate} and {part}={chosen[part]!r}"
                )
        for part, size in (("attention", "num_heads"), ("feed_forward", "hidden_dim")):
            if size not in options and not _is_told(size, chosen[part]):
                raise TypeError(
                    f"`{type(self).__name__}` needs `{size}`, or a layer as `{part}`. "
                    "Received: neither"
                )


def make_part(make: Callable[..., Any], chosen: Any, **options: Any) -> Any:
    """Makes a part of a block from its options, or copies a layer in its place.

    Args:
        make: The class of the part.
        chosen: A dictionary of options that come before the others, or the layer.
        **options: The other options.
    """
    if _is_layer(chosen):
        return clone_layer(chosen, name=options["name"])
    return make(**{**options, **(chosen or {})})


def check_part(
    argument: str,
    chosen: Any,
    part: type,
    *,
    any_layer: bool = False,
) -> None:
    """Checks what a block got for a part: nothing, its options, or a layer.

    Raises:
        TypeError: If it is something else, or has an option that the part lacks.
    """
    accepted = keras.layers.Layer if any_layer else part
    if chosen is None or isinstance(chosen, accepted):
        return
    if not isinstance(chosen, Mapping):
        raise TypeError(
            f"`{argument}` must be a dictionary of options of `{part.__name__}`, or a "
            f"layer of the class `{accepted.__name__}`. "
            f"Received: {argument}={chosen!r}"
        )
    for name in chosen:
        if name not in part_options(part):
            parts = (*_PARTS.values(), ResidualNorm)
            takers = [one.__name__ for one in parts if name in part_options(one)]
            hint = f" `{'` and `'.join(takers)}` takes it." if takers else ""
            raise TypeError(
                f"`{argument}` takes options of `{part.__name__}`: "
                f"{sorted(part_options(part))}.{hint} "
                f"Received: {argument}={dict(chosen)!r} with {name!r}"
            )


def pick(options: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Returns the options of these names."""
    return {name: options[name] for name in names if name in options}


def _is_layer(chosen: Any) -> bool:
    return isinstance(chosen, keras.layers.Layer)


def _is_told(name: str, chosen: Any) -> bool:
    """Whether a part gets an option by the block's argument for it."""
    return _is_layer(chosen) or (chosen is not None and name in chosen)


def _first_set(rate: float | None, default: float) -> float:
    return default if rate is None else rate


def _derive_seeds(seed: int | None) -> list[int | None]:
    """Different seeds out of one, also between blocks of neighboring seeds.

    With one seed, dropouts of one shape would fall on the same positions.
    """
    count = 6  # as many as a decoder block with cross-attention needs
    if seed is None:
        return [None] * count
    states = np.random.SeedSequence(seed % 2**32).generate_state(count)
    return [int(state) % 2**31 for state in states]
