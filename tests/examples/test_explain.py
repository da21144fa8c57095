"""The program that looks into the sentiment encoders, on a small untrained model."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import keras
import numpy as np
import pytest

import keras_mha
from keras_mha.text import WordpieceTokenizer

MODULES = ("data", "model", "report", "explain")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "fine", "dull", "film", "not", "."]
TEXTS = ["A fine film.", "Not a dull film, not a fine one."]


@pytest.fixture(scope="module")
def directory(
    example: dict[str, ModuleType], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What train.py writes and explain.py reads; weights are random."""
    path = tmp_path_factory.mktemp("sentiment")
    model = example["model"]
    keras.utils.set_random_seed(4)
    members = [
        model.build_member(len(WORDS), model.Recipe().smoke(), f"member_{i}")
        for i in range(2)
    ]
    generator = np.random.default_rng(4)
    for weight in [weight for member in members for weight in member.weights]:
        weight.assign(generator.normal(size=weight.shape))
    of_texts = model.committee(members, WordpieceTokenizer(WORDS, 16, name="tokenizer"))
    of_texts.save(path / "model.keras")
    (path / "metrics.json").write_text(json.dumps({"fold": 0, "seed": 0}))
    return path


def test_what_is_said_of_a_text(
    example: dict[str, ModuleType], directory: Path
) -> None:
    model: Any = keras.saving.load_model(directory / "model.keras")
    _, second = example["explain"].explain(model, TEXTS)
    maps = keras_mha.attention_maps(model, TEXTS)  # beside a shorter text
    wide = np.stack([scores[1] for scores in maps.values()])  # (M, N, T, T)
    T = len(second.tokens)
    assert second.tokens[:3] == ["[CLS]", "not", "a"]
    assert (len(maps), T) == (2, 12)
    means = wide.mean(axis=1)
    np.testing.assert_allclose(second.attention, means.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(second.received, means.mean(axis=1), atol=1e-5)
    # One block: half of what is received, half of each token's own.
    np.testing.assert_allclose(
        second.flow, 0.5 * second.received.mean(axis=0) + 0.5 / T, atol=1e-5
    )
    np.testing.assert_allclose(
        second.answer,
        np.asarray(model(keras.ops.convert_to_tensor(np.array(TEXTS, object))))[1],
        1e-5,
    )


def test_the_pictures_and_the_table(
    example: dict[str, ModuleType], directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    explain, data = example["explain"], example["data"]
    words = np.random.default_rng(0).choice(WORDS[4:], (60, 5))
    texts = np.array([" ".join(row) for row in words], object)
    made_up = data.Reviews(texts, np.arange(60) % 2)
    monkeypatch.setattr(explain, "load_reviews", lambda: made_up)
    arguments = ["--directory", str(directory), "--rows", "16", *TEXTS]
    assert explain.main(arguments) == 0
    for name in ("explained_0.png", "explained_1.png", "heads.png"):
        assert (directory / name).read_bytes().startswith(b"\x89PNG")
    report = (directory / "heads.md").read_text("utf-8")
    rows = [line for line in report.splitlines() if line.startswith("| ")][2:]
    assert [row.split()[1] for row in rows] == ["8", "7", "6", "5", "4", "3", "2"]


def test_a_missing_model_is_one_message(
    example: dict[str, ModuleType],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        example["explain"].main(["--directory", str(tmp_path)])
    assert "run train.py first" in capsys.readouterr().err
