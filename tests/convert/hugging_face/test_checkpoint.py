"""Checkpoints in several files: what the index says is what is read, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from keras_mha.convert import load_bert
from tests.support import checkpoints as tiny
from tests.support.checkpoints import write_checkpoint

SHARDS = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def split(directory: Path, tensors: dict[str, np.ndarray]) -> dict[str, str]:
    """Writes the tensors in turns into two files; returns the index' map."""
    names = sorted(tensors)
    for place, shard in enumerate(SHARDS):
        part = {name: tensors[name] for name in names[place::2]}
        save_file(part, directory / shard, metadata={"format": "pt"})
    return {name: SHARDS[place % 2] for place, name in enumerate(names)}


def write_index(directory: Path, content: Any) -> None:
    (directory / INDEX).write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def shards(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A checkpoint in two files, and the map of its index."""
    directory = tmp_path / "shards"
    directory.mkdir()
    write_checkpoint(directory, tiny.random_tensors())
    (directory / "model.safetensors").unlink()
    listed = split(directory, tiny.random_tensors())
    write_index(directory, {"metadata": {}, "weight_map": listed})
    return directory, listed


def test_several_files_are_read_as_one(
    tmp_path: Path, shards: tuple[Path, dict[str, str]]
) -> None:
    write_checkpoint(tmp_path, tiny.random_tensors())
    one = load_bert(tmp_path, pooler=True)
    for path in (shards[0], shards[0] / INDEX, shards[0] / "config.json"):
        several = load_bert(path, pooler=True)
        for weight, other in zip(several.weights, one.weights, strict=True):
            np.testing.assert_array_equal(weight, other)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda listed: {**listed, "x": SHARDS[0]}, ValueError, r"in one of them only"),
        (lambda listed: {**listed, "x": "../other.safetensors"}, ValueError, "its own"),
        (lambda listed: {**listed, "x": 3}, ValueError, "its own directory.*3"),
        (lambda listed: {**listed, "x": "absent"}, FileNotFoundError, "absent"),
        (lambda _: {}, ValueError, "must hold a `weight_map`"),
        (lambda _: [1], ValueError, r"must hold a `weight_map`. Received: \[1\]"),
    ],
)
def test_an_index_that_does_not_fit(
    shards: tuple[Path, dict[str, str]], change: Any, error: Any, message: str
) -> None:
    directory, listed = shards
    write_index(directory, {"weight_map": change(listed)})
    with pytest.raises(error, match=message):
        load_bert(directory)


def test_a_tensor_that_the_index_leaves_out(
    shards: tuple[Path, dict[str, str]],
) -> None:
    directory, listed = shards
    del listed["embeddings.word_embeddings.weight"]
    write_index(directory, {"weight_map": listed})
    with pytest.raises(ValueError, match=r"embeddings.word_embeddings.* one of them"):
        load_bert(directory)
