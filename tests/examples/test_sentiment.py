"""The sentiment example, on small made-up reviews; the real ones are downloaded only
by the test marked slow."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import h5py
import numpy as np
import pytest
import tensorflow as tf

from keras_mha.export import export_saved_model, export_tflite
from keras_mha.text import WordpieceTokenizer
from tests.support.layers import randomize

MODULES = ("download", "data", "model", "report", "train", "predict")


@pytest.fixture(scope="module")
def data(example: dict[str, ModuleType]) -> ModuleType:
    return example["data"]


# The download.

ROWS = b"1\t2.0\tA fine &amp; good film.\r\n2\t-1.5\tA dull one.\r\n"


def tar(member: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        info = tarfile.TarInfo(member)
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def published(data: ModuleType, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """An archive of the published form with two reviews, and its right checksums."""
    inner = tar(data.MEMBER, ROWS)
    outer = tar(data.INNER_ARCHIVE, inner)
    contents = {data.ARCHIVE: outer, data.INNER_ARCHIVE: inner, data.MEMBER: ROWS}
    digests = {name: hashlib.sha256(c).hexdigest() for name, c in contents.items()}
    monkeypatch.setattr(data, "SHA256", digests)
    monkeypatch.setattr(data, "COUNTS", {"negative": 1, "positive": 1})
    monkeypatch.setattr(data, "POSITIVE_IDS", (range(1, 2),))
    return outer


def writes(data: ModuleType, content: bytes) -> Callable[[Path], None]:
    def fetch(directory: Path) -> None:
        (directory / data.ARCHIVE).write_bytes(content)

    return fetch


def fails(_: Path) -> None:
    raise AssertionError("Nothing should be downloaded.")


def test_download_is_read_and_kept(
    data: ModuleType, published: bytes, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    for fetch in (writes(data, published), fails):  # The second time from the cache.
        reviews = data.load_reviews(cache, fetch)
        assert reviews.texts.tolist() == ["A fine & good film.", "A dull one."]
        assert reviews.labels.tolist() == [1, 0]
    assert [path.name for path in cache.iterdir()] == [Path(data.MEMBER).name]


@pytest.mark.parametrize("change", ["truncated", "altered", "absent"])
def test_a_wrong_download_is_refused(
    data: ModuleType, published: bytes, tmp_path: Path, change: str
) -> None:
    wrong = {"truncated": published[:-7], "altered": published + b"x"}
    fetch = (
        (lambda _: None) if change == "absent" else writes(data, wrong.get(change, b""))
    )
    message = "download lacks" if change == "absent" else "truncated or altered"
    with pytest.raises(data.DataError, match=message):
        data.load_reviews(tmp_path / "cache", fetch)
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize("name", ["INNER_ARCHIVE", "MEMBER"])
def test_what_is_inside_is_checked_too(
    data: ModuleType, published: bytes, tmp_path: Path, name: str
) -> None:
    data.SHA256[getattr(data, name)] = "0" * 64
    with pytest.raises(data.DataError, match=getattr(data, name)):
        data.load_reviews(tmp_path / "cache", writes(data, published))
    assert not list(tmp_path.rglob("*"))


def test_a_damaged_cache_is_fetched_anew(
    data: ModuleType, published: bytes, tmp_path: Path
) -> None:
    file = tmp_path / Path(data.MEMBER).name
    file.write_bytes(ROWS[:-9])
    reviews = data.load_reviews(tmp_path, writes(data, published))
    assert len(reviews) == 2
    assert file.read_bytes() == ROWS
    file.write_bytes(ROWS[:-9])
    with pytest.raises(data.DataError, match="truncated or altered"):
        data.load_reviews(tmp_path, writes(data, published[:-1]))
    assert not file.exists()


def test_pip_is_asked_for_the_pinned_archive(
    data: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commands = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        requirements = Path(command[command.index("--requirement") + 1])
        commands.append((command[:4], requirements.read_text("utf-8")))
        return subprocess.CompletedProcess(command, 1, "", "no network here")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(data.DataError, match="no network here"):
        data.load_reviews(tmp_path / "cache")
    digest = data.SHA256[data.ARCHIVE]
    assert commands == [
        (
            [sys.executable, "-m", "pip", "download"],
            f"vaderSentiment==3.3.2 --hash=sha256:{digest}\n",
        )
    ]
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1\tno text\n", "without three fields"),
        ("1\t0\ta\n3\t0\tb\n", "without a gap"),
        ("1\t0\ta\n2\t0\tb\n", "Expected the labels"),
    ],
)
def test_unexpected_content_is_refused(
    data: ModuleType, monkeypatch: pytest.MonkeyPatch, content: str, message: str
) -> None:
    monkeypatch.setattr(data, "COUNTS", {"negative": 2, "positive": 0})
    with pytest.raises(data.DataError, match=message):
        data.parse(content)


def test_labels_follow_from_the_ids(data: ModuleType) -> None:
    edges = [1, 5152, 10313, 10347, 10379, 10481]
    assert [data.label_of(i) for i in edges] == [1] * 6
    beyond = [5153, 10312, 10348, 10378, 10482, 10605]
    assert [data.label_of(i) for i in beyond] == [0] * 6
    total = sum(data.COUNTS.values())
    labels = [data.label_of(i) for i in range(1, total + 1)]
    assert np.bincount(labels).tolist() == [5315, 5290]


@pytest.mark.parametrize(
    ("platform", "variable", "expected"),
    [
        ("linux", "XDG_CACHE_HOME", "{}"),
        ("linux", None, "{}/.cache"),
        ("darwin", None, "{}/Library/Caches"),
        ("win32", "LOCALAPPDATA", "{}"),
    ],
)
def test_cache_directory(
    data: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    platform: str,
    variable: str | None,
    expected: str,
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, str(tmp_path))
    found = data.cache_directory()
    assert found == Path(expected.format(tmp_path)) / "keras_mha" / "sentiment"


# The split.


def made_up(data: ModuleType, count: int = 211) -> Any:
    """Reviews of which each text names its row; two fifths are positive."""
    texts = np.array([f"review {i}" for i in range(count)], object)
    return data.Reviews(texts, (np.arange(count) % 5 < 2).astype(int))


def test_folds_part_the_reviews(data: ModuleType) -> None:
    reviews = made_up(data)
    tested: list[str] = []
    for fold in range(10):
        split = data.split_fold(reviews, fold)
        parts = [set(part.texts) for part in (split.train, split.test)]
        assert sum(map(len, parts)) == len(set().union(*parts)) == len(reviews)
        assert len(split.test) in (21, 22)
        for part in (split.train, split.test):
            assert part.labels.mean() == pytest.approx(0.4, abs=0.05)
            rows = [int(text.split()[1]) for text in part.texts]
            assert np.array_equal(reviews.labels[rows], part.labels)
        tested += split.test.texts.tolist()
    assert sorted(tested) == sorted(reviews.texts)


def test_the_split_depends_on_the_seed_alone(data: ModuleType) -> None:
    reviews = made_up(data)
    first, again = (data.split_fold(reviews, 3, seed=1) for _ in range(2))
    other = data.split_fold(reviews, 3, seed=2)
    for part in ("train", "test"):
        texts = [getattr(split, part).texts.tolist() for split in (first, again, other)]
        assert texts[0] == texts[1]
        assert texts[0] != texts[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fold": 10}, "`fold` must be from 0 to 9. Received: 10"),
        ({"fold": -1}, "`fold` must be from 0 to 9. Received: -1"),
        ({"fold": 0, "folds": 1}, "`folds` must be from 2 to 211. Received: 1"),
    ],
)
def test_refused_splits(
    data: ModuleType, arguments: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        data.split_fold(made_up(data), **arguments)


# The training.


@pytest.fixture(scope="module")
def easy(data: ModuleType) -> Any:
    """Reviews that one word decides, among words that say nothing."""
    random = np.random.default_rng(5)
    filler = ["the", "film", "was", "and", "plot", "actor", "scene"]
    labels = np.arange(240) % 2
    texts = [
        " ".join(
            random.permutation(
                [*random.choice(filler, random.integers(2, 20)), ["dull", "fine"][y]]
            )
        )
        for y in labels
    ]
    return data.Reviews(np.array(texts, object), labels)


@pytest.fixture(scope="module")
def tiny(example: dict[str, ModuleType]) -> Any:
    return example["model"].Recipe(
        members=2,
        vocabulary_size=60,
        max_length=32,
        embedding_dim=8,
        num_heads=2,
        hidden_dim=8,
        batch_size=11,
        epochs=3,
        learning_rate=0.03,
        average_momentum=0.8,
    )


@pytest.fixture(scope="module")
def trained(example: dict[str, ModuleType], easy: Any, tiny: Any) -> Any:
    split = example["data"].split_fold(easy, 0)
    return example["train"].train_fold(split, tiny, seed=7, verbose=0)


def test_what_can_be_learned_is_learned(trained: Any) -> None:
    assert trained.test_accuracy == 1.0
    assert len(trained.members) == len(trained.histories) == 2
    first, second = (history["loss"] for history in trained.histories)
    assert first != second


@pytest.mark.slow
def test_the_same_seed_gives_the_same_figures(
    example: dict[str, ModuleType], tiny: Any, trained: Any
) -> None:
    once = dataclasses.replace(tiny, members=1)

    def history(seed: int) -> dict[str, list[float]]:
        again = example["train"].train_fold(trained.split, once, seed=seed, verbose=0)
        return again.histories[0]

    assert history(7) == trained.histories[0]
    assert history(8) != trained.histories[0]


def test_only_the_training_part_is_learned_from(
    example: dict[str, ModuleType],
    data: ModuleType,
    easy: Any,
    tiny: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train = example["train"]
    split = data.split_fold(easy, 0)
    marked = data.Reviews(split.test.texts + " quokka quokka", split.test.labels)
    fitted = []

    def fit(_: Any, own: Any, *__: Any) -> dict[str, list[float]]:
        fitted.append(own)
        return {}

    monkeypatch.setattr(train, "fit_member", fit)
    recipe = dataclasses.replace(tiny, members=12)
    found = train.train_fold(data.Split(split.train, marked), recipe, seed=0)
    assert "film" in found.vocabulary
    assert "quokka" not in found.vocabulary

    every = sorted(split.train.texts)
    for own in fitted:
        assert sorted([*own.train.texts, *own.test.texts]) == every
    # Ten members validate on everything once; the eleventh begins anew.
    assert sorted(text for own in fitted[:10] for text in own.test.texts) == every
    assert fitted[10].test.texts.tolist() == fitted[0].test.texts.tolist()


def test_training_batches(example: dict[str, ModuleType], tiny: Any) -> None:
    random = np.random.default_rng(3)
    labels = np.arange(97) % 2
    # Pieces of a row tell its label: 10 to 19 or 20 to 29.
    ids = [
        np.array([2, *random.integers(10, 20, random.integers(0, 29)) + 10 * y, 3])
        for y in labels
    ]
    recipe = dataclasses.replace(tiny, token_dropout=0.25)
    dataset = example["train"].training_batches(ids, labels, recipe)
    dropped = pieces = 0
    for rows, one_hot in dataset.take(60).as_numpy_iterator():
        assert rows.shape[1] in (16, 32)
        assert len(rows) <= recipe.batch_size
        lengths = (rows != 0).sum(1)
        for row, length, label in zip(rows, lengths, one_hot.argmax(1), strict=True):
            assert rows.shape[1] - length < 16
            inside = row[1 : length - 1]
            assert (row[0], row[length - 1]) == (2, 3)
            kept = inside[inside != 1]
            assert (kept // 10 == label + 1).all()
            dropped += len(inside) - len(kept)
            pieces += len(inside)
    assert dropped / pieces == pytest.approx(0.25, abs=0.03)


def test_batches_keep_the_order(example: dict[str, ModuleType]) -> None:
    ids = [np.arange(2, 2 + n) for n in (3, 18, 5)]
    ((rows, labels),) = example["train"].batches(ids, np.array([0, 1, 1]))
    assert rows.shape == (3, 32)
    for row, expected in zip(rows.numpy(), ids, strict=True):
        assert row[row != 0].tolist() == expected.tolist()
    assert labels.numpy().tolist() == [[1, 0], [0, 1], [0, 1]]


def test_the_committee_is_one_part_on_a_device(
    example: dict[str, ModuleType], tmp_path: Path
) -> None:
    model = example["model"]
    recipe = dataclasses.replace(
        model.Recipe(), max_length=13, embedding_dim=12, num_heads=3, hidden_dim=17
    )
    members = [
        randomize(model.build_member(97, recipe, f"member_{i}"), seed=i)
        for i in range(2)
    ]
    report = export_tflite(
        model.committee(members),
        tmp_path,
        sequence_lengths=(13,),
        samples=[[3, 1, 4], [5, 9, 2, 6] * 3],
    )
    (file,) = report.files
    assert not report.notes
    assert file.delegate_partitions == 1
    assert sum(file.operators.values()) <= 91
    assert file.parity.max_absolute_difference <= 1e-6


def test_the_committee_is_its_members_mean(
    example: dict[str, ModuleType], trained: Any, tmp_path: Path
) -> None:
    import tensorflow as tf

    from keras_mha.text import WordpieceTokenizer

    model = example["model"]
    texts = trained.split.test.texts[:5]
    rows = model.encode(texts, trained.vocabulary, 32)
    dataset = example["train"].batches(rows, trained.split.test.labels[:5])
    expected = np.mean([m.predict(dataset, verbose=0) for m in trained.members], 0)
    of_ids = model.committee(trained.members)
    assert np.allclose(of_ids.predict(dataset, verbose=0), expected, atol=1e-6)
    tokenizer = WordpieceTokenizer(trained.vocabulary, max_length=32)
    of_texts = model.committee(trained.members, tokenizer)
    found = of_texts.predict(tf.constant(texts.tolist()), verbose=0)
    assert np.allclose(found, expected, atol=1e-6)
    assert of_texts.output_names == of_ids.output_names == ["probabilities"]
    # A saved file holds no optimizers.
    of_texts.save_weights(tmp_path / "model.weights.h5")
    with h5py.File(tmp_path / "model.weights.h5") as file:
        names: list[str] = []
        file.visit(names.append)
    assert names
    assert not [name for name in names if "optimizer" in name]


def test_attention_is_that_of_the_first_block(
    example: dict[str, ModuleType], trained: Any
) -> None:
    ids = np.array([2, 5, 6, 3])
    scores = example["train"].attention_of(trained.members[0], ids)
    assert scores.shape == (2, 4, 4)
    assert np.allclose(scores.sum(-1), 1.0, atol=1e-6)
    assert scores.std() > 0


# The report.


def test_wilson_interval(example: dict[str, ModuleType]) -> None:
    interval = example["report"].wilson_interval
    # The values of Newcombe 1998, "Two-sided confidence intervals", table I.
    assert interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert interval(20, 20)[1] == 1.0
    with pytest.raises(ValueError, match="Received: successes=3, trials=2"):
        interval(3, 2)


def test_comparison_has_means_deviations_and_the_published(
    example: dict[str, ModuleType],
) -> None:
    table = example["report"].comparison({"ours": [0.7, 0.8], "one": [0.5]})
    assert "| ours | 75.0 | 7.1 | 2 |" in table
    assert "| one | 50.0 |  | 1 |" in table
    assert "CNN-rand, trained from scratch (Kim 2014) | 76.1 |" in table


# The programs.


@pytest.mark.slow
def test_the_whole_program_on_made_up_reviews(
    example: dict[str, ModuleType],
    easy: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train, predict = example["train"], example["predict"]
    monkeypatch.setattr(train, "load_reviews", lambda: easy)
    monkeypatch.setattr(train, "SMOKE_ROWS", len(easy))
    arguments = ["--smoke", "--folds", "2", "--output", str(tmp_path)]
    logs = tmp_path / "logs"
    assert train.main([*arguments, "--tensorboard", str(logs)]) == 0
    printed = capsys.readouterr().out
    assert "CNN-rand" in printed
    assert list(logs.rglob("events.out.*"))
    expected = {
        *("metrics.json", "model.keras", "saved_model", "model.tflite", "vocab.txt"),
        *("labels.txt", "report.md", "report.json", "training.png", "attention.png"),
        *("model_128.tflite", "manifest.json", "snippets", "logs"),
        *("cross_validation.json", "cross_validation.md"),
    }
    assert {path.name for path in tmp_path.iterdir()} == expected

    metrics = json.loads((tmp_path / "metrics.json").read_text("utf-8"))
    low, high = metrics["test_accuracy_95"]
    assert 0 <= low <= metrics["test_accuracy"] <= high <= 1
    assert metrics["majority_rate"] == 0.5
    assert metrics["sizes"]["test"] == 24
    report = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert report["metrics"] == metrics
    assert report["tflite"]["files"][0]["inputs"][0]["shape"] == [1, 128]

    texts = ["a fine film", "", "dull \N{GRINNING FACE}", "word " * 300]
    found = {}
    for runtime in ("keras", "saved_model", "tflite"):
        options = ["--runtime", runtime, "--directory", str(tmp_path), "--json"]
        assert predict.main([*options, *texts]) == 0
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [row["text"] for row in rows] == texts
        found[runtime] = np.array([[r["negative"], r["positive"]] for r in rows])
    assert np.allclose(found["keras"].sum(1), 1.0, atol=1e-6)
    assert np.allclose(found["keras"], found["saved_model"], atol=1e-5)
    assert np.allclose(found["keras"], found["tflite"], atol=1e-5)


def test_predict_answers_hostile_texts_alike(
    example: dict[str, ModuleType],
    trained: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    committee, predict = example["model"].committee, example["predict"]
    tokenizer = WordpieceTokenizer(trained.vocabulary, 32, name="tokenizer")
    of_texts = committee(trained.members, tokenizer)
    of_texts.save(tmp_path / "model.keras")
    export_saved_model(of_texts, tmp_path / "saved_model", samples=["fine"], version=1)
    export_tflite(
        committee(trained.members), tmp_path, sequence_lengths=(32,), samples=[[2, 3]]
    )
    (tmp_path / "model_32.tflite").rename(tmp_path / "model.tflite")
    (tmp_path / "vocab.txt").write_text("\n".join(trained.vocabulary), "utf-8")
    (tmp_path / "labels.txt").write_text("negative\npositive\n", "utf-8")

    # What a shell gives: bytes that are no UTF-8 arrive as lone surrogates.
    texts = [
        *("a fine one", "", "qqqqq \u4e00", "dull " * 20_000, "x" * 100_000),
        *("dull\x01\x1b[31m\r\n\tone", "fine \udcff\udcfe one", "\udced\udca0\udc80"),
        *("\u202e\u05e1\u05e8\u05d8 fine", "\U0001f468\u200d\U0001f469 dull"),
    ]
    as_bytes = [os.fsencode(text) for text in texts]
    wanted = np.asarray(of_texts(tf.constant(as_bytes)))
    assert np.ptp(wanted, axis=0).max() > 0.2
    for runtime in ("keras", "saved_model", "tflite"):
        options = ["--runtime", runtime, "--directory", str(tmp_path)]
        assert predict.main([*options, "--json", *texts]) == 0
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        got = [[row["negative"], row["positive"]] for row in rows]
        np.testing.assert_allclose(got, wanted, atol=1e-5)
        assert rows[6]["text"] == "fine \ufffd\ufffd one"
    # Without --json each is one line, and none speaks to the terminal.
    assert predict.main([*options, *texts]) == 0
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == len(texts)
    assert "\x1b" not in printed


@pytest.mark.slow
def test_the_real_reviews(data: ModuleType, tmp_path: Path) -> None:
    reviews = data.load_reviews(tmp_path)
    assert len(reviews) == 10_605
    assert np.bincount(reviews.labels).tolist() == [5315, 5290]
    assert not any("&amp;" in text or text != text.strip() for text in reviews.texts)


def test_predict_without_a_model_says_what_to_do(
    example: dict[str, ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert example["predict"].main(["a film", "--directory", str(tmp_path)]) == 2
    assert "make sentiment" in capsys.readouterr().err


def test_a_failed_download_is_one_message(
    example: dict[str, ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train = example["train"]

    def fail() -> None:
        raise train.DataError("no network here")

    monkeypatch.setattr(train, "load_reviews", fail)
    assert train.main([]) == 1
    assert capsys.readouterr().err == "no network here\n"


@pytest.mark.parametrize("program", ["train", "predict"])
def test_help_is_printed(
    example: dict[str, ModuleType], program: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        example[program].main(["--help"])
    assert stopped.value.code == 0
    assert "default:" in capsys.readouterr().out
