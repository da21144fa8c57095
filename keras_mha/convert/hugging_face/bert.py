"""Hugging Face's BERT checkpoints into `BertEncoder`, and back.

`_slots` is the one list of a checkpoint's tensors: each with its shape, and the weight
of the encoder that it is a part of. Reading, checking and writing all go by it.

Letters: V token ids, D model width, F width of the feed-forward networks' hidden
layers, N heads, H head size.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import keras
import numpy as np
from numpy.typing import NDArray

from keras_mha.attention.numeric import plain_integer, plain_number
from keras_mha.layers.arguments import check_flag
from keras_mha.models.bert import BertEncoder, gelu_tanh

Array = NDArray[Any]

CONFIG, WEIGHTS = "config.json", "model.safetensors"
# What belongs to the encoder; everything else in a file is some task's head.
_PARTS = ("embeddings.", "encoder.", "pooler.")
_PREFIX = "bert."
# The numbers from 0, which older releases of `transformers` stored too.
_POSITION_IDS = "embeddings.position_ids"
_OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
_FLOATS = ("F64", "F32", "F16", "BF16")


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
    """What `config.json` says of the encoder, under its own names.

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


class _Slot(NamedTuple):
    """A weight of the encoder, and the tensors of a file that it is made of.

    Attributes:
        path: The names that lead from the encoder to the weight.
        shapes: Each tensor's shape by its name.
        join: Makes the weight's values from the tensors'.
        cut: The opposite.
    """

    path: str
    shapes: dict[str, tuple[int, ...]]
    join: Callable[[Sequence[Array]], Array]
    cut: Callable[[Array], Sequence[Array]]


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

    Reads `config.json` and `model.safetensors`, of `BertModel` or of a model with a
    head on it, in float64, float32, float16 or bfloat16. Nothing in them is run, and
    no pickle is read. Names may begin with `bert.`, and normalizations may have the old
    names `gamma` and `beta`. Every shape is compared with `config.json` before a weight
    is made, and every weight of the encoder is set.

    Args:
        path_or_directory: The directory of both files, or the path of the weights,
            with `config.json` beside them.
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
        ValueError: If a file is malformed, the model is no BERT or one with an option
            that the encoder has not, or a tensor is missing, unknown, or of another
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
    path = Path(path_or_directory)
    pooler = check_flag(pooler, "pooler")
    if not path.exists():
        raise FileNotFoundError(
            "`path_or_directory` must be a directory with a config.json and a "
            "model.safetensors, or that file; nothing is downloaded. Received: "
            f"{path_or_directory}, which does not exist"
        )
    directory = path if path.is_dir() else path.parent
    weights = directory / WEIGHTS if path.is_dir() or path.name == CONFIG else path
    if not weights.is_file():
        raise FileNotFoundError(
            f"`path_or_directory` must hold {WEIGHTS}, in one file; pickled weights "
            f"are not read. Received: {directory} with "
            f"{sorted(each.name for each in directory.iterdir())[:10]}"
        )
    config = _read_config(weights.with_name(CONFIG))
    slots, arrays, left_out = _read_weights(weights, config, pooler=pooler)
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
    for slot in slots:
        values = slot.join([arrays.pop(each) for each in slot.shapes])
        _follow(encoder, slot.path).assign(values)
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
        TypeError: If `encoder` is no `BertEncoder`.
        ValueError: If it is not built, is quantized, has an activation that has no
            name in checkpoints, or heads that a `config.json` cannot tell of: another
            number in some blocks than in others, or of another size than D / N, as
            `prune_heads` leaves them.
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
    tensors = {
        name: np.ascontiguousarray(part)
        for slot in _slots(config, pooler=encoder.pooler)
        for name, part in zip(
            slot.shapes, slot.cut(_value(encoder, slot.path)), strict=True
        )
    }
    _write(Path(directory), config, tensors, overwrite=overwrite)


# The tensors.


def _slots(config: _Config, *, pooler: bool) -> Iterator[_Slot]:
    """Every weight of the encoder, with the tensors that it is made of."""
    D, F = config.hidden_size, config.intermediate_size
    N = config.num_attention_heads
    for path, name, rows in (
        ("embedding.token_embedding.embeddings", "word", config.vocab_size),
        ("embedding.position_embedding", "position", config.max_position_embeddings),
        ("token_type_embedding.embeddings", "token_type", config.type_vocab_size),
    ):
        yield _as_it_is(path, f"embeddings.{name}_embeddings.weight", (rows, D))
    yield from _norm("embedding_norm", "embeddings.LayerNorm", D)
    for i in range(config.num_hidden_layers):
        block, layer = f"blocks.{i}", f"encoder.layer.{i}"
        attention = f"{block}.attention.sublayer"
        yield from _qkv(f"{attention}.qkv_dense", f"{layer}.attention.self", D, N)
        output = f"{layer}.attention.output"
        yield from _output(f"{attention}.output_dense", f"{output}.dense", D, N)
        yield from _norm(f"{block}.attention.norm", f"{output}.LayerNorm", D)
        network = f"{block}.feed_forward.sublayer"
        yield from _dense(
            f"{network}.hidden_dense", f"{layer}.intermediate.dense", D, F
        )
        yield from _dense(f"{network}.output_dense", f"{layer}.output.dense", F, D)
        yield from _norm(f"{block}.feed_forward.norm", f"{layer}.output.LayerNorm", D)
    if pooler:
        yield from _dense("pooler_dense", "pooler.dense", D, D)


def _as_it_is(path: str, name: str, shape: tuple[int, ...]) -> _Slot:
    return _Slot(path, {name: shape}, lambda parts: parts[0], lambda value: [value])


def _norm(path: str, name: str, size: int) -> Iterator[_Slot]:
    yield _as_it_is(f"{path}.gamma", f"{name}.weight", (size,))
    yield _as_it_is(f"{path}.beta", f"{name}.bias", (size,))


def _dense(path: str, name: str, inputs: int, outputs: int) -> Iterator[_Slot]:
    """Files have `(outputs, inputs)` where Keras has `(inputs, outputs)`."""
    yield _Slot(
        f"{path}.kernel",
        {f"{name}.weight": (outputs, inputs)},
        lambda parts: parts[0].T,
        lambda value: [value.T],
    )
    yield _as_it_is(f"{path}.bias", f"{name}.bias", (outputs,))


def _output(path: str, name: str, D: int, N: int) -> Iterator[_Slot]:
    """The kernel that takes the heads `(N, H)` to D."""
    yield _Slot(
        f"{path}.kernel",
        {f"{name}.weight": (D, D)},
        lambda parts: parts[0].T.reshape(N, -1, D),
        lambda value: [value.reshape(D, D).T],
    )
    yield _as_it_is(f"{path}.bias", f"{name}.bias", (D,))


def _qkv(path: str, name: str, D: int, N: int) -> Iterator[_Slot]:
    """Three matrices side by side in each head of one kernel `(D, N, 3 H)`."""
    names = [f"{name}.{part}" for part in ("query", "key", "value")]

    def join(parts: Sequence[Array]) -> Array:
        return np.concatenate([part.T.reshape(D, N, -1) for part in parts], axis=-1)

    def cut(value: Array) -> list[Array]:
        return [part.reshape(D, D).T for part in np.split(value, 3, axis=-1)]

    yield _Slot(f"{path}.kernel", {f"{n}.weight": (D, D) for n in names}, join, cut)
    yield _Slot(
        f"{path}.bias",
        {f"{n}.bias": (D,) for n in names},
        lambda parts: np.concatenate([p.reshape(N, -1) for p in parts], axis=-1),
        lambda value: [part.reshape(D) for part in np.split(value, 3, axis=-1)],
    )


def _follow(encoder: BertEncoder, path: str) -> Any:
    found: Any = encoder
    for name in path.split("."):
        found = found[int(name)] if name.isdigit() else getattr(found, name)
    return found


def _value(encoder: BertEncoder, path: str) -> Array:
    """A weight's values in float32, low-rank factors merged in."""
    owner, _, name = path.rpartition(".")
    layer = _follow(encoder, owner) if owner else encoder
    if layer.quantization_mode is not None:
        raise ValueError(
            "`encoder` must not be quantized: a checkpoint holds floats. Received: "
            f"layer '{layer.path}' with quantization mode {layer.quantization_mode!r}"
        )
    merged = getattr(layer, "merged_kernel", None)  # of our fused projection
    value = merged() if merged and name == "kernel" else getattr(layer, name)
    return np.asarray(keras.ops.convert_to_numpy(value), np.float32)


# Reading.


def _read_weights(
    path: Path, config: _Config, *, pooler: bool
) -> tuple[list[_Slot], dict[str, Array], tuple[str, ...]]:
    """The slots, all their tensors, and the names of those that have no place."""
    safetensors = _safetensors()
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            names = _plain_names(file.keys(), path)
            slots, used = [], set[str]()
            # A config may claim any number of layers; the first that lacks ends it.
            for slot in _slots(config, pooler=pooler):
                for name, shape in slot.shapes.items():
                    _check_tensor(file, names, name, shape, path)
                slots.append(slot)
                used |= {*slot.shapes}
            others = {name: names[name] for name in names if name not in used}
            _check_others(others, path, pooler=pooler)
            arrays = {name: _floats(file.get_tensor(names[name])) for name in used}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is no sound safetensors file: {error}") from error
    return slots, arrays, tuple(sorted(others.values()))


def _plain_names(stored: Sequence[str], path: Path) -> dict[str, str]:
    """The names in the file by what they are called here, without old spellings."""
    names: dict[str, str] = {}
    for name in stored:
        plain = name.removeprefix(_PREFIX)
        for old, new in _OLD_NAMES.items():
            if plain.endswith(old):
                plain = plain.removesuffix(old) + new
        if plain in names:
            raise ValueError(
                f"{path} must hold each tensor once. Received: '{names[plain]}' and "
                f"'{name}'"
            )
        names[plain] = name
    return names


def _check_tensor(
    file: Any,
    names: Mapping[str, str],
    name: str,
    shape: tuple[int, ...],
    path: Path,
) -> None:
    if name not in names:
        raise ValueError(f"{path} lacks the tensor '{name}' {shape}")
    found = file.get_slice(names[name])
    if tuple(found.get_shape()) != shape:
        raise ValueError(
            f"The tensor '{names[name]}' of {path} must have the shape {shape}, as "
            f"{CONFIG} says. Received: {tuple(found.get_shape())}"
        )
    if found.get_dtype() not in _FLOATS:
        raise ValueError(
            f"The tensor '{names[name]}' of {path} must be one of {_FLOATS}. "
            f"Received: {found.get_dtype()}"
        )


def _check_others(others: Mapping[str, str], path: Path, *, pooler: bool) -> None:
    """Refuses what looks like a part of the encoder and is none."""
    parts = _PARTS if pooler else _PARTS[:-1]
    unknown = [
        stored
        for name, stored in others.items()
        if name.startswith(parts) and name != _POSITION_IDS
    ]
    if unknown:
        raise ValueError(
            f"{path} holds tensors that a BERT of its {CONFIG} has not: "
            f"{sorted(unknown)}"
        )


def _floats(tensor: Array) -> Array:
    return tensor.astype(np.float32, copy=False)


def _read_config(path: Path) -> _Config:
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no sound JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object. Received: {content!r:.80}")
    for name, expected in (
        ("model_type", "bert"),
        ("position_embedding_type", "absolute"),
        ("is_decoder", False),
        ("add_cross_attention", False),
        # Old files name by layer the heads that their tensors lack.
        ("pruned_heads", {}),
    ):
        if content.get(name, expected) != expected:
            raise ValueError(
                f"{path} must have {name}={expected!r}, or not name it. "
                f"Received: {content[name]!r:.80}"
            )
    given = {
        field.name: _checked(path, field.name, field.type, content[field.name])
        for field in fields(_Config)
        if field.name in content
    }
    missing = [
        field.name
        for field in fields(_Config)
        if field.name not in given and not hasattr(_Config, field.name)
    ]
    if missing:
        raise ValueError(f"{path} lacks {missing}")
    config = _Config(**given)
    if not config.layer_norm_eps:
        raise ValueError(f"{path}: `layer_norm_eps` must be above 0")
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"{path}: `hidden_size` must be a multiple of `num_attention_heads`. "
            f"Received: {config.hidden_size} and {config.num_attention_heads}"
        )
    return config


def _checked(path: Path, name: str, kind: Any, value: Any) -> Any:
    """Returns an entry of a config, if it is what it must be."""
    number = plain_number(value)
    accepted, rule = {
        "int": ((plain_integer(value) or 0) > 0, "a positive integer"),
        "float": (number is not None and 0 <= number < 1, "a number from 0 to below 1"),
        "str": (
            isinstance(value, str) and value in _ACTIVATIONS,
            f"one of {sorted(_ACTIVATIONS)}",
        ),
    }[kind]
    if not accepted:
        raise ValueError(
            f"{path}: `{name}` must be {rule}. Received: {name}={value!r:.80}"
        )
    return value


# Writing.


def _config_of(encoder: BertEncoder) -> _Config:
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


def _write(
    directory: Path, config: _Config, tensors: dict[str, Array], *, overwrite: bool
) -> None:
    """Written beside and renamed, so that a file of its name is whole."""
    _safetensors()
    from safetensors.numpy import save_file

    finals = [directory / name for name in (WEIGHTS, CONFIG)]
    there = [str(path) for path in finals if path.exists()]
    if there and not overwrite:
        raise FileExistsError(f"{there} exist; pass `overwrite=True` to replace them.")
    directory.mkdir(parents=True, exist_ok=True)
    described = {"architectures": ["BertModel"], "model_type": "bert", **asdict(config)}
    with tempfile.TemporaryDirectory(prefix=".staging-", dir=directory) as staged:
        # `transformers` reads no file that does not name its origin so.
        save_file(tensors, Path(staged) / WEIGHTS, metadata={"format": "pt"})
        text = json.dumps(described, indent=2, sort_keys=True)
        (Path(staged) / CONFIG).write_text(f"{text}\n", encoding="utf-8")
        for path in finals:
            (Path(staged) / path.name).replace(path)


def _safetensors() -> ModuleType:
    try:
        import safetensors
    except ImportError as error:
        raise ImportError(
            "Checkpoints need safetensors: pip install 'keras-mha[convert]'"
        ) from error
    return safetensors
