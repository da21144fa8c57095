"""Reads, checks and writes checkpoints in Hugging Face's format.

A checkpoint is a directory with `config.json` and either `model.safetensors` or
several such files with an index. A family of models says what its configuration and
its tensors are (`Family`); nothing here knows any.

A family lists its tensors once, as `Slot`s: each weight of a model with the names and
shapes of the tensors that it is made of. Reading, checking and writing go by the list.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, NamedTuple, TypeVar

import keras
import numpy as np
from numpy.typing import NDArray

from keras_mha.attention.numeric import plain_integer, plain_number

Array = NDArray[Any]

CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
_FLOATS = ("F64", "F32", "F16", "BF16")


class Slot(NamedTuple):
    """A weight of a model, and the tensors of a checkpoint that it is made of.

    Attributes:
        path: The names that lead from the model to the weight.
        shapes: Each tensor's shape by its name.
        join: Makes the weight's values from the tensors'.
        cut: The opposite.
    """

    path: str
    shapes: dict[str, tuple[int, ...]]
    join: Callable[[Sequence[Array]], Array]
    cut: Callable[[Array], Sequence[Array]]


C = TypeVar("C")


@dataclass(frozen=True)
class Family(Generic[C]):
    """Describes the checkpoints of one family of models.

    Attributes:
        model_type: The family's name in `config.json`.
        architecture: The name of the class in `transformers` that reads what is
            written.
        config: A dataclass of the entries of `config.json` that are read, each of
            the type `int`, `float` or `str`. What has a default there has the same
            one in `transformers`.
        choices: The values that an entry of type `str` may have, by its name.
        required: Values that other entries must have where they are present.
        prefix: With which the names of all tensors may begin.
        parts: How the names of the model's tensors begin; all others belong to some
            task's head.
        old_names: Former endings of names, and what took their place.
        unread: Tensors of the model that hold no weight.
    """

    model_type: str
    architecture: str
    config: type[C]
    choices: Mapping[str, Iterable[str]]
    required: Mapping[str, Any]
    prefix: str
    parts: tuple[str, ...]
    old_names: Mapping[str, str] = field(default_factory=dict)
    unread: frozenset[str] = frozenset()


# Slots that families share.


def as_it_is(path: str, name: str, shape: tuple[int, ...]) -> Slot:
    """A weight that is one tensor."""
    return Slot(path, {name: shape}, lambda parts: parts[0], lambda value: [value])


def norm(path: str, name: str, size: int) -> Iterator[Slot]:
    """The weights of a `LayerNormalization`."""
    yield as_it_is(f"{path}.gamma", f"{name}.weight", (size,))
    yield as_it_is(f"{path}.beta", f"{name}.bias", (size,))


def dense(path: str, name: str, inputs: int, outputs: int) -> Iterator[Slot]:
    """The weights of a `Dense`: files have `(outputs, inputs)`, Keras the transpose."""
    yield Slot(
        f"{path}.kernel",
        {f"{name}.weight": (outputs, inputs)},
        lambda parts: parts[0].T,
        lambda value: [value.T],
    )
    yield as_it_is(f"{path}.bias", f"{name}.bias", (outputs,))


def attention_output(path: str, name: str, D: int, N: int) -> Iterator[Slot]:
    """The projection of the heads `(N, H)` to the width D."""
    yield Slot(
        f"{path}.kernel",
        {f"{name}.weight": (D, D)},
        lambda parts: parts[0].T.reshape(N, -1, D),
        lambda value: [value.reshape(D, D).T],
    )
    yield as_it_is(f"{path}.bias", f"{name}.bias", (D,))


def query_key_value(path: str, names: Sequence[str], D: int, N: int) -> Iterator[Slot]:
    """Three projections side by side in each head of one kernel `(D, N, 3 H)`."""

    def join(parts: Sequence[Array]) -> Array:
        return np.concatenate([part.T.reshape(D, N, -1) for part in parts], axis=-1)

    def cut(value: Array) -> list[Array]:
        return [part.reshape(D, D).T for part in np.split(value, 3, axis=-1)]

    yield Slot(f"{path}.kernel", {f"{n}.weight": (D, D) for n in names}, join, cut)
    yield Slot(
        f"{path}.bias",
        {f"{n}.bias": (D,) for n in names},
        lambda parts: np.concatenate([p.reshape(N, -1) for p in parts], axis=-1),
        lambda value: [part.reshape(D) for part in np.split(value, 3, axis=-1)],
    )


# Between a model and its tensors.


def assign_tensors(
    model: keras.Model, slots: Iterable[Slot], tensors: dict[str, Array]
) -> None:
    """Gives a built model the values of a checkpoint, and empties `tensors`."""
    for slot in slots:
        values = slot.join([tensors.pop(name) for name in slot.shapes])
        _follow(model, slot.path).assign(values)


def tensors_of(model: keras.Model, slots: Iterable[Slot]) -> dict[str, Array]:
    """Returns a built model's values as the tensors of a checkpoint, in float32.

    Raises:
        ValueError: If a layer is quantized.
    """
    return {
        name: np.ascontiguousarray(part)
        for slot in slots
        for name, part in zip(
            slot.shapes, slot.cut(_value(model, slot.path)), strict=True
        )
    }


def _follow(model: keras.Model, path: str) -> Any:
    place: Any = model
    for name in path.split("."):
        place = place[int(name)] if name.isdigit() else getattr(place, name)
    return place


def _value(model: keras.Model, path: str) -> Array:
    """A weight's values in float32, low-rank factors merged in."""
    owner, _, name = path.rpartition(".")
    layer = _follow(model, owner) if owner else model
    if layer.quantization_mode is not None:
        raise ValueError(
            "The model must not be quantized: a checkpoint holds floats. Received: "
            f"layer '{layer.path}' with quantization mode {layer.quantization_mode!r}"
        )
    merged = getattr(layer, "merged_kernel", None)  # of our fused projection
    value = merged() if merged and name == "kernel" else getattr(layer, name)
    return np.asarray(keras.ops.convert_to_numpy(value), np.float32)


# Reading.


def find_checkpoint(path_or_directory: str | Path) -> tuple[Path, Path]:
    """Returns the paths of the configuration, and of the weights or their index.

    Raises:
        FileNotFoundError: If one of them is not there.
    """
    path = Path(path_or_directory)
    if not path.exists():
        raise FileNotFoundError(
            f"`path_or_directory` must be a directory with a {CONFIG} and a "
            f"{WEIGHTS}, or that file; nothing is downloaded. Received: "
            f"{path_or_directory}, which does not exist"
        )
    directory = path if path.is_dir() else path.parent
    if path.is_dir() or path.name == CONFIG:
        names = (WEIGHTS, INDEX)
        paths = [directory / name for name in names if (directory / name).is_file()]
        if not paths:
            raise FileNotFoundError(
                f"`path_or_directory` must hold {WEIGHTS} or {INDEX}; pickled weights "
                f"are not read. Received: {directory} with "
                f"{sorted(each.name for each in directory.iterdir())[:10]}"
            )
        path = paths[0]
    config = path.with_name(CONFIG)
    if not config.is_file():
        raise FileNotFoundError(f"{config} does not exist")
    return config, path


def read_config(path: Path, family: Family[C]) -> C:
    """Reads and checks the entries of a `config.json` that a family has.

    Raises:
        ValueError: If the file is not sound JSON, is of another family, lacks an
            entry, or has one with a value that is not accepted.
    """
    content = _read_object(path)
    required = {"model_type": family.model_type, **family.required}
    for name, expected in required.items():
        if content.get(name, expected) != expected:
            raise ValueError(
                f"{path} must have {name}={expected!r}, or not name it. "
                f"Received: {content[name]!r:.80}"
            )
    kind: Any = family.config
    entries = {
        each.name: _checked(path, each.name, each.type, content[each.name], family)
        for each in fields(kind)
        if each.name in content
    }
    missing = [
        each.name
        for each in fields(kind)
        if each.name not in entries and not hasattr(kind, each.name)
    ]
    if missing:
        raise ValueError(f"{path} lacks {missing}")
    return kind(**entries)


def read_tensors(
    path: Path,
    family: Family[Any],
    slots: Iterable[Slot],
    left_out: tuple[str, ...] = (),
) -> tuple[list[Slot], dict[str, Array], tuple[str, ...]]:
    """Reads the tensors of all slots, in float32.

    Args:
        path: A safetensors file, or the index of several.
        family: The model's family.
        slots: May be many more than the file has: the first that it lacks raises.
        left_out: The parts of the family that no slot is from.

    Returns:
        The slots, the tensors by their plain names, and the names in the files of
        those that no slot asks for.

    Raises:
        ImportError: If `safetensors` is not installed.
        ValueError: If a file is malformed, or a tensor is missing, unknown, or of
            another shape or dtype than it must have.
    """
    with _open(path) as files:
        names = _plain_names(files, path, family)
        taken, used = list[Slot](), set[str]()
        for slot in slots:
            for name, shape in slot.shapes.items():
                _check_tensor(files, names, name, shape, path)
            taken.append(slot)
            used |= {*slot.shapes}
        others = {name: names[name] for name in names if name not in used}
        parts = tuple(part for part in family.parts if part not in left_out)
        unknown = sorted(
            stored
            for name, stored in others.items()
            if name.startswith(parts) and name not in family.unread
        )
        if unknown:
            raise ValueError(
                f"{path} holds tensors that a model of its {CONFIG} does not have: "
                f"{unknown}"
            )
        tensors = {
            name: files[names[name]]
            .get_tensor(names[name])
            .astype(np.float32, copy=False)
            for name in used
        }
    return taken, tensors, tuple(sorted(others.values()))


@contextmanager
def _open(path: Path) -> Iterator[dict[str, Any]]:
    """Opens a file, or all files of an index; gives each tensor's file by its name."""
    safetensors = _safetensors()
    shards: dict[str, set[str] | None] = {path.name: None}
    if path.name.endswith(".json"):
        shards = _read_index(path)
    files: dict[str, Any] = {}
    with ExitStack() as stack:
        try:
            for shard, expected in shards.items():
                opened = safetensors.safe_open(path.with_name(shard), framework="numpy")
                file = stack.enter_context(opened)
                stored = {*file.keys()}
                if expected is not None and stored != expected:
                    raise ValueError(
                        f"{shard} must hold the tensors that {path} says. Received: "
                        f"{sorted(stored ^ expected)[:10]} in one of them only"
                    )
                files |= dict.fromkeys(stored, file)
            yield files
        except safetensors.SafetensorError as error:
            raise ValueError(
                f"{path} is not a sound safetensors file: {error}"
            ) from error


def _read_index(path: Path) -> dict[str, set[str] | None]:
    """The names of the tensors in each file of an index."""
    listed = _read_object(path).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ValueError(f"{path} must hold a `weight_map`. Received: {listed!r:.80}")
    shards: dict[str, set[str] | None] = {}
    for name, shard in listed.items():
        # A name with a directory in it could lead anywhere.
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ValueError(
                f"{path} must name files of its own directory. Received: {shard!r:.80}"
            )
        held = shards.setdefault(shard, set())
        if held is not None:
            held.add(name)
    for shard in shards:
        if not path.with_name(shard).is_file():
            raise FileNotFoundError(f"{path.with_name(shard)} does not exist")
    return shards


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not sound JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object. Received: {content!r:.80}")
    return content


def _checked(path: Path, name: str, kind: Any, value: Any, family: Family[Any]) -> Any:
    """Returns an entry of a configuration, if it is what it must be."""
    number = plain_number(value)
    choices = sorted(family.choices.get(name, ()))
    accepted, rule = {
        "int": ((plain_integer(value) or 0) > 0, "a positive integer"),
        "float": (number is not None and 0 <= number < 1, "a number from 0 to below 1"),
        "str": (isinstance(value, str) and value in choices, f"one of {choices}"),
    }[kind]
    if not accepted:
        raise ValueError(
            f"{path}: `{name}` must be {rule}. Received: {name}={value!r:.80}"
        )
    return value


def _plain_names(
    stored: Iterable[str], path: Path, family: Family[Any]
) -> dict[str, str]:
    """The names in the files by the names of the slots, without old spellings."""
    names: dict[str, str] = {}
    for name in stored:
        plain = name.removeprefix(family.prefix)
        for old, new in family.old_names.items():
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
    files: Mapping[str, Any],
    names: Mapping[str, str],
    name: str,
    shape: tuple[int, ...],
    path: Path,
) -> None:
    if name not in names:
        raise ValueError(f"{path} lacks the tensor '{name}' {shape}")
    stored = files[names[name]].get_slice(names[name])
    if tuple(stored.get_shape()) != shape:
        raise ValueError(
            f"The tensor '{names[name]}' of {path} must have the shape {shape}, as "
            f"{CONFIG} says. Received: {tuple(stored.get_shape())}"
        )
    if stored.get_dtype() not in _FLOATS:
        raise ValueError(
            f"The tensor '{names[name]}' of {path} must be one of {_FLOATS}. "
            f"Received: {stored.get_dtype()}"
        )


# Writing.


def write_checkpoint(
    directory: str | Path,
    family: Family[C],
    config: C,
    tensors: dict[str, Array],
    *,
    overwrite: bool,
) -> None:
    """Writes `config.json` and `model.safetensors`.

    Each is written in a temporary directory and then moved, so that no file of its
    name is ever half written.

    Raises:
        ImportError: If `safetensors` is not installed.
        FileExistsError: If there is a file of one of the names, and `overwrite` is
            False.
    """
    _safetensors()
    from safetensors.numpy import save_file

    directory = Path(directory)
    finals = [directory / name for name in (WEIGHTS, CONFIG)]
    there = [str(path) for path in finals if path.exists()]
    if there and not overwrite:
        raise FileExistsError(f"{there} exist; pass `overwrite=True` to replace them.")
    directory.mkdir(parents=True, exist_ok=True)
    entries: Any = config
    described = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **asdict(entries),
    }
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
