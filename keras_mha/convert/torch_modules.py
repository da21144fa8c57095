"""Attention modules of PyTorch into our layers.

Letters: B batch, T query length, S key length, N heads, H head size, D width of the
queries and of the outputs, F hidden width of the feed-forward network.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import keras

from keras_mha.convert.torch_weights import (
    PARTS,
    Arrays,
    assign,
    assign_fused,
    take_attention,
    take_linear,
    take_with_bias,
    to_array,
)
from keras_mha.layers.arguments import check_flag
from keras_mha.layers.encoder_block import TransformerEncoderBlock
from keras_mha.layers.multi_head_attention import MultiHeadAttention
from keras_mha.layers.self_attention import MultiHeadSelfAttention

# What no keyword of our layers may say otherwise.
_TOLD = {
    *("key_dim", "value_dim", "output_shape", "use_bias", "num_key_value_heads"),
    *("hidden_dim", "gated", "placement", "normalization", "epsilon"),
}
_TORCH_EPSILON = 1e-5


def from_torch(
    source: Any,
    *,
    num_heads: int | None = None,
    norm_first: bool | None = None,
    activation: Any = None,
    layer_norm_eps: float | None = None,
    dropout: float | None = None,
    self_attention: bool = False,
    **kwargs: Any,
) -> Any:
    """Turns a module of PyTorch, or the weights of one, into a layer of ours.

    `torch.nn.MultiheadAttention` becomes `MultiHeadAttention`, or with
    `self_attention=True` `MultiHeadSelfAttention`, whose projection is fused as
    torch's is; `torch.nn.TransformerEncoderLayer` becomes `TransformerEncoderBlock`.
    The layer is built and has a copy of the weights, cast to its own dtype (`dtype`;
    Keras' global policy by default). A module tells its options; a state dict does
    not, and the keywords say what it leaves open. Weights that are frozen in
    torch (`requires_grad`) are not frozen here. PyTorch need not be installed for a
    state dict of NumPy arrays.

    What is called otherwise than in torch:

    - The arguments are `(query, value, key)`, in this order.
    - Inputs are `(B, T, D)`. `batch_first` changes no weight: for a module with
      `batch_first=False` transpose what it took as `(T, B, D)`.
    - Masks say what may be seen. torch's True means "not allowed":
      `key_padding_mask` becomes `value_mask=~key_padding_mask`, or
      `mask=~key_padding_mask` in self-attention and blocks; `attn_mask` becomes
      `attention_mask=~attn_mask`. A floating `attn_mask` is an `attention_bias`;
      `(B * N, T, S)` is `(B, N, T, S)` here.
    - `mask` hides padded queries as well as keys. A query that sees no key gets zeros
      from the attention, NaN in torch.
    - `return_attention_scores=True` gives each head's probabilities, not their mean.

    Args:
        source: The module, of one of the two classes itself, or its state dict, with
            the names that it has in the module: a mapping to tensors or arrays.
        num_heads: N; needed with a state dict.
        norm_first: Needed with an encoder layer's state dict.
        activation: `"relu"` or `"gelu"`, or another activation of Keras; needed with
            an encoder layer's state dict.
        layer_norm_eps: For an encoder layer's state dict. Defaults to 1e-5, as in
            torch.
        dropout: For a state dict: share dropped in training. Defaults to 0. Of an
            encoder layer's attention `attention_dropout` may tell another.
        self_attention: Whether an attention module is only called on one sequence.
        **kwargs: Further arguments of our layer, such as `name`, `dtype` and
            `jit_compile`.

    Returns:
        A built `MultiHeadAttention`, `MultiHeadSelfAttention` or
        `TransformerEncoderBlock`.

    Raises:
        TypeError: If the source is something else, or weights are not floating.
        ValueError: If a weight is missing, unexpected or of the wrong shape; a keyword
            is missing, or passed though the module or the weights tell it; or the
            module has
            `add_bias_kv` (`bias_k`, `bias_v`), `add_zero_attn` or an activation that
            we have not.

    Example:

    >>> import numpy as np
    >>> from keras_mha.convert import from_torch
    >>> weights = {
    ...     "in_proj_weight": np.random.normal(size=(18, 6)),
    ...     "out_proj.weight": np.random.normal(size=(6, 6)),
    ... }
    >>> layer = from_torch(weights, num_heads=2, self_attention=True)
    >>> tuple(layer(np.ones((3, 5, 6), "float32")).shape)
    (3, 5, 6)
    """
    keywords = {
        "num_heads": num_heads,
        "norm_first": norm_first,
        "activation": activation,
        "layer_norm_eps": layer_norm_eps,
        "dropout": dropout,
    }
    keywords["attention_dropout"] = kwargs.pop("attention_dropout", None)
    keywords = {name: value for name, value in keywords.items() if value is not None}
    if told := sorted(_TOLD & {*kwargs}):
        raise ValueError(
            "The weights, or other keywords of `from_torch`, decide this. Received: "
            f"{', '.join(told)}"
        )
    self_attention = check_flag(self_attention, "self_attention")
    if isinstance(source, Mapping):
        options, weights = keywords, source
    else:
        options, weights = _read_module(source, keywords), source.state_dict()
    arrays = Arrays({name: to_array(name, each) for name, each in weights.items()})
    if "self_attn.out_proj.weight" in arrays.left or "linear1.weight" in arrays.left:
        if self_attention:
            raise ValueError(
                "`self_attention` is for attention modules; an encoder layer has no "
                "other. Received: self_attention=True"
            )
        converted = _make_block(arrays, options, kwargs)
    else:
        converted = _make_attention(arrays, options, self_attention, kwargs)
    arrays.check_all_taken()
    return converted


# Options from modules.


def _read_module(module: Any, keywords: dict[str, Any]) -> dict[str, Any]:
    # Who has a module has imported torch.
    torch: Any = sys.modules.get("torch")
    if torch is None or not isinstance(module, torch.nn.Module):
        raise TypeError(
            "`source` must be a `torch.nn.MultiheadAttention`, a "
            "`torch.nn.TransformerEncoderLayer`, or the state dict of one. "
            f"Received: {type(module).__name__}"
        )
    if keywords:
        raise ValueError(
            "A module tells this itself; the keywords are for a state dict. "
            f"Received: {', '.join(keywords)}"
        )
    if type(module) is torch.nn.MultiheadAttention:
        return _read_attention(module)
    if type(module) is torch.nn.TransformerEncoderLayer:
        return _read_encoder_layer(module, torch)
    hint = "Of a module that computes the same, pass the `state_dict()`"
    if isinstance(module, torch.nn.TransformerEncoder):
        hint = "Convert `[from_torch(layer) for layer in module.layers]`"
    raise TypeError(
        "`source` must be a `torch.nn.MultiheadAttention` or a "
        f"`torch.nn.TransformerEncoderLayer` itself. {hint}. "
        f"Received: {type(module).__module__}.{type(module).__qualname__}"
    )


def _read_attention(module: Any) -> dict[str, Any]:
    if module.add_zero_attn:
        raise ValueError(
            "Our attention has no key of zeros. Received: module with "
            "add_zero_attn=True"
        )
    return {"num_heads": module.num_heads, "dropout": module.dropout}


def _read_encoder_layer(module: Any, torch: Any) -> dict[str, Any]:
    epsilons = {module.norm1.eps, module.norm2.eps}
    rates = {module.dropout.p, module.dropout1.p, module.dropout2.p}
    if len(epsilons) > 1 or len(rates) > 1:
        raise ValueError(
            "Our block has one epsilon, and one dropout apart from the attention's. "
            f"Received: module with epsilons {sorted(epsilons)} and dropouts "
            f"{sorted(rates)}"
        )
    attention = _read_attention(module.self_attn)
    return {
        "num_heads": attention["num_heads"],
        "norm_first": module.norm_first,
        "activation": _read_activation(module.activation, torch),
        "layer_norm_eps": epsilons.pop(),
        "dropout": rates.pop(),
        "attention_dropout": attention["dropout"],
    }


def _read_activation(activation: Any, torch: Any) -> str:
    functional, nn = torch.nn.functional, torch.nn
    if activation in (functional.relu, torch.relu) or type(activation) is nn.ReLU:
        return "relu"
    if activation is functional.gelu or (
        type(activation) is nn.GELU and activation.approximate == "none"
    ):
        return "gelu"
    raise ValueError(
        "A module's activation must be ReLU or exact GELU. For another, pass the "
        "module's `state_dict()` and an `activation` of Keras. "
        f"Received: activation={activation}"
    )


# Layers from weights.


def _make_attention(
    arrays: Arrays, options: dict[str, Any], self_attention: bool, kwargs: Any
) -> Any:
    _check_options(options, ("num_heads",), ("dropout",))
    use_bias = "in_proj_bias" in arrays.left
    sizes, weights = take_attention(arrays, "", options["num_heads"], use_bias)
    width, value_width, key_width, num_heads = sizes
    arguments = {
        "num_heads": num_heads,
        "key_dim": width // num_heads,
        "dropout": options.get("dropout", 0.0),
        "use_bias": use_bias,
        **kwargs,
    }
    if not self_attention:
        converted = MultiHeadAttention(**arguments)
        converted.build(*((None, None, D) for D in (width, value_width, key_width)))
        for name in PARTS:
            assign(getattr(converted, f"{name}_dense"), weights[name])
        assign(converted.output_dense, weights["output"])
        return converted
    if not width == value_width == key_width:
        raise ValueError(
            "Self-attention has queries, keys and values of one width. Received: "
            f"self_attention=True and widths {width}, {key_width} and {value_width}"
        )
    layer = MultiHeadSelfAttention(**arguments)
    layer.build((None, None, width))
    assign_fused(layer, weights)
    return layer


def _make_block(arrays: Arrays, options: dict[str, Any], kwargs: Any) -> Any:
    needed = ("num_heads", "norm_first", "activation")
    _check_options(options, needed, ("layer_norm_eps", "dropout", "attention_dropout"))
    use_bias = "self_attn.in_proj_bias" in arrays.left
    sizes, weights = take_attention(
        arrays, "self_attn.", options["num_heads"], use_bias
    )
    width, _, _, num_heads = sizes
    hidden_dim = arrays.size_of("linear2.weight", 1)
    norms = [
        take_with_bias(arrays, f"{name}.", (width,), use_bias)
        for name in ("norm1", "norm2")
    ]
    dense = [
        take_linear(arrays, "linear1.", hidden_dim, width, use_bias),
        take_linear(arrays, "linear2.", width, hidden_dim, use_bias),
    ]
    epsilon = options.get("layer_norm_eps", _TORCH_EPSILON)
    normalization: dict[str, Any] = {"normalization": "layer", "epsilon": epsilon}
    if not use_bias:
        normalization = {
            "normalization": keras.layers.LayerNormalization(
                epsilon=epsilon, center=False, dtype=kwargs.get("dtype")
            )
        }
    block = TransformerEncoderBlock(
        num_heads=num_heads,
        hidden_dim=hidden_dim,
        activation=options["activation"],
        placement=(
            "pre" if check_flag(options["norm_first"], "norm_first") else "post"
        ),
        dropout=options.get("dropout", 0.0),
        attention_dropout=options.get("attention_dropout"),
        use_bias=use_bias,
        **normalization,
        **kwargs,
    )
    block.build((None, None, width))
    assign_fused(block.attention.sublayer, weights)
    network = block.feed_forward.sublayer
    for layer, values in zip(
        (network.hidden_dense, network.output_dense), dense, strict=True
    ):
        assign(layer, values)
    for part, (scale, offset) in zip(
        (block.attention, block.feed_forward), norms, strict=True
    ):
        part.norm.gamma.assign(scale)
        if offset is not None:
            part.norm.beta.assign(offset)
    return block


def _check_options(
    options: dict[str, Any], needed: tuple[str, ...], taken: tuple[str, ...]
) -> None:
    missing = [name for name in needed if name not in options]
    if missing:
        raise ValueError(
            "A state dict does not tell all: pass "
            f"{', '.join(f'`{name}`' for name in missing)} as keywords. "
            f"Received: {sorted(options) or 'no keywords'}"
        )
    others = [name for name in options if name not in (*needed, *taken)]
    if others:
        raise ValueError(
            "Attention has no such thing; the weights of an encoder layer would be "
            f"named `linear1.weight` and so on. Received: {', '.join(others)}"
        )
