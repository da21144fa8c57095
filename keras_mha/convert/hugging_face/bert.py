"""Hugging Face's BERT checkpoints into `BertEncoder`, and back.

`_slots` is the one list of a checkpoint's tensors: each with its shape, and the weight
of the encoder that it is a part of.

Letters: D model width, F width of the feed-forward networks' hidden layers, N heads,
H head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras

from keras_mha.convert.hugging_face.checkpoint import (
    Family,
    Slot,
    as_it_is,
    assign_tensors,
    attention_output,
    dense,
    find_checkpoint,
    norm,
    query_key_value,
    read_config,
    read_tensors,
    tensors_of,
    write_checkpoint,
)
from keras_mha.layers.arguments import check_flag
from keras_mha.models.bert import BertEncoder, gelu_tanh

# When written, an activation gets the first name that it has here.
_ACTIVATIONS: dict[str, Callable[..., Any]] = {
    "gelu": keras.activations.gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": keras.activations.relu,
    "silu": keras.activations.silu,
    "swish": keras.activations.silu,
    "tanh": keras.activations.tanh,
}


@dataclass(frozen=True)
class _Config:
    """Reads what `config.json` says of the encoder, under its own names.

    What has a default here has the same one in `transformers`.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    layer_norm_eps: float = 1e-12


_POOLER = "pooler."
_FAMILY = Family(
    model_type="bert",
    architecture="BertModel",
    config=_Config,
    choices={"hidden_act": _ACTIVATIONS},
    required={
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "add_cross_attention": False,
        # Old files name by layer the heads that their tensors lack.
        "pruned_heads": {},
    },
    prefix="bert.",
    parts=("embeddings.", "encoder.", _POOLER),
    old_names={
        "LayerNorm.gamma": "LayerNorm.weight",
        "LayerNorm.beta": "LayerNorm.bias",
    },
    # The numbers from 0, which older releases of `transformers` stored too.
    unread=frozenset({"embeddings.position_ids"}),
)


def load_bert(
    path_or_directory: str | Path,
    *,
    pooler: bool = False,
    dropout: float | None = None,
    attention_dropout: float | None = None,
    seed: int | None = None,
    dtype: Any = None,
    name: str | None = None,
) -> BertEncoder:
    """Returns a `BertEncoder` with the weights of a Hugging Face checkpoint.

    Reads `config.json` and `model.safetensors`, or several files of weights with an
    index, of `BertModel` or of a model with a head on it, in float64, float32, float16
    or bfloat16. Nothing in them is run, and
    no pickle is read. Names may begin with `bert.`, and normalizations may have the old
    names `gamma` and `beta`. Every shape is compared with `config.json` before a weight
    is made, and every weight of the encoder is set.

    Args:
        path_or_directory: The directory of both files, or the path of the weights,
            with `config.json` next to them.
        pooler: Whether the encoder gets the checkpoint's pooler.
        dropout: In place of the checkpoint's `hidden_dropout_prob`.
        attention_dropout: In place of its `attention_probs_dropout_prob`.
        seed: Integer seed of every dropout.
        dtype: Dtype or policy of the encoder, such as `"mixed_bfloat16"`. Defaults to
            Keras' own, whatever the file's.
        name: The encoder's name.

    Returns:
        The built encoder. Its `left_out` has the names of the file's tensors that it
        has no place for: those of heads, and of the pooler without `pooler`.

    Raises:
        ImportError: If `safetensors` is not installed.
        FileNotFoundError: If one of the files is not there.
        ValueError: If a file is malformed, the model is not a BERT or has an option
            that the encoder lacks, or a tensor is missing, unknown, or of another
            shape or dtype than it must have; the text names it.

    Example:

    >>> import tempfile
    >>> from keras_mha.convert import load_bert, save_bert
    >>> from keras_mha.models import BertEncoder
    >>> encoder = BertEncoder(30, 16, 8, num_layers=2, num_heads=2, hidden_dim=32)
    >>> encoder.build()
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     save_bert(encoder, directory)
    ...     loaded = load_bert(directory)
    >>> loaded.num_layers, loaded.left_out
    (2, ())
    """
    pooler = check_flag(pooler, "pooler")
    config_path, weights = find_checkpoint(path_or_directory)
    config = _read_config(config_path)
    slots, tensors, left_out = read_tensors(
        weights,
        _FAMILY,
        _slots(config, pooler=pooler),
        left_out=() if pooler else (_POOLER,),
    )
    if dropout is None:
        dropout = config.hidden_dropout_prob
    if attention_dropout is None:
        attention_dropout = config.attention_probs_dropout_prob
    encoder = BertEncoder(
        config.vocab_size,
        config.max_position_embeddings,
        config.hidden_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.intermediate_size,
        config.type_vocab_size,
        _ACTIVATIONS[config.hidden_act],
        dropout,
        attention_dropout,
        config.layer_norm_eps,
        pooler,
        seed=seed,
        dtype=dtype,
        name=name,
    )
    encoder.build()
    assign_tensors(encoder, slots, tensors)
    encoder.left_out = left_out
    return encoder


def save_bert(
    encoder: BertEncoder, directory: str | Path, *, overwrite: bool = False
) -> None:
    """Writes an encoder as `config.json` and `model.safetensors`, in float32.

    `transformers` reads them: `BertModel.from_pretrained(directory)`, with
    `add_pooling_layer=False` where the encoder has no pooler. The tokenizer's files
    are not among them.

    Args:
        encoder: A built encoder. Low-rank factors are merged into what is written.
        directory: Where the files go. Made if it is not there.
        overwrite: Whether files of these names are replaced.

    Raises:
        ImportError: If `safetensors` is not installed.
        TypeError: If `encoder` is not a `BertEncoder`.
        ValueError: If it is not built, is quantized, has options beyond BERT's, an
            activation that has no name in checkpoints, or heads that a `config.json`
            cannot describe: more in some blocks than in others, or of another size
            than D / N, as `prune_heads` leaves them.
        FileExistsError: If there is a file of one of the names, and `overwrite` is
            False.

    Example:

    >>> import tempfile
    >>> from pathlib import Path
    >>> from keras_mha.convert import save_bert
    >>> from keras_mha.models import BertEncoder
    >>> encoder = BertEncoder(30, 16, 8, num_layers=2, num_heads=2, hidden_dim=32)
    >>> encoder.build()
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     save_bert(encoder, directory)
    ...     sorted(path.name for path in Path(directory).iterdir())
    ['config.json', 'model.safetensors']
    """
    if not isinstance(encoder, BertEncoder):
        raise TypeError(
            f"`encoder` must be a BertEncoder. Received: a {type(encoder).__name__}"
        )
    if not encoder.built:
        raise ValueError("`save_bert` needs a built encoder: call it first.")
    config = _config_of(encoder)
    tensors = tensors_of(encoder, _slots(config, pooler=encoder.pooler))
    write_checkpoint(directory, _FAMILY, config, tensors, overwrite=overwrite)


def _slots(config: _Config, *, pooler: bool) -> Iterator[Slot]:
    """Every weight of the encoder, with the tensors that it is made of."""
    D, F = config.hidden_size, config.intermediate_size
    N = config.num_attention_heads
    for path, name, rows in (
        ("embedding.token_embedding.embeddings", "word", config.vocab_size),
        ("embedding.position_embedding", "position", config.max_position_embeddings),
        ("token_type_embedding.embeddings", "token_type", config.type_vocab_size),
    ):
        yield as_it_is(path, f"embeddings.{name}_embeddings.weight", (rows, D))
    yield from norm("embedding_norm", "embeddings.LayerNorm", D)
    for i in range(config.num_hidden_layers):
        block, layer = f"blocks.{i}", f"encoder.layer.{i}"
        attention, network = (
            f"{block}.{half}.sublayer" for half in ("attention", "feed_forward")
        )
        names = [f"{layer}.attention.self.{part}" for part in ("query", "key", "value")]
        yield from query_key_value(f"{attention}.qkv_dense", names, D, N)
        output = f"{layer}.attention.output"
        yield from attention_output(
            f"{attention}.output_dense", f"{output}.dense", D, N
        )
        yield from norm(f"{block}.attention.norm", f"{output}.LayerNorm", D)
        yield from dense(f"{network}.hidden_dense", f"{layer}.intermediate.dense", D, F)
        yield from dense(f"{network}.output_dense", f"{layer}.output.dense", F, D)
        yield from norm(f"{block}.feed_forward.norm", f"{layer}.output.LayerNorm", D)
    if pooler:
        yield from dense("pooler_dense", "pooler.dense", D, D)


def _read_config(path: Path) -> _Config:
    config = read_config(path, _FAMILY)
    if not config.layer_norm_eps:
        raise ValueError(f"{path}: `layer_norm_eps` must be above 0")
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"{path}: `hidden_size` must be a multiple of `num_attention_heads`. "
            f"Received: {config.hidden_size} and {config.num_attention_heads}"
        )
    return config


def _config_of(encoder: BertEncoder) -> _Config:
    if encoder.block_options:
        raise ValueError(
            "`encoder` must not have options beyond BERT's: `config.json` has no place "
            f"for them. Received: {', '.join(encoder.block_options)}"
        )
    names = {function: name for name, function in reversed(_ACTIVATIONS.items())}
    if encoder.activation not in names:
        raise ValueError(
            f"`encoder` must have one of the activations {sorted(_ACTIVATIONS)}. "
            f"Received: activation={encoder.activation!r}"
        )
    return _Config(
        encoder.vocabulary_size,
        encoder.embedding_dim,
        encoder.num_layers,
        _heads_of(encoder),
        encoder.hidden_dim,
        encoder.sequence_length,
        encoder.num_token_types,
        names[encoder.activation],
        encoder.dropout,
        encoder.attention_dropout,
        encoder.epsilon,
    )


def _heads_of(encoder: BertEncoder) -> int:
    """N. A configuration has one number of heads, and H is D / N."""
    heads = encoder.num_heads
    N, *others = {heads} if isinstance(heads, int) else {*heads}
    if others:
        raise ValueError(
            "`encoder` must have the same number of heads in each block: `config.json` "
            f"has one for all. Received: num_heads={heads}"
        )
    D, H = encoder.embedding_dim, encoder.key_dim
    if N * H != D:
        raise ValueError(
            "`encoder` must have heads of the size `embedding_dim / num_heads`: "
            f"`config.json` has no other. Received: embedding_dim={D}, num_heads={N} "
            f"and key_dim={H}"
        )
    return N
