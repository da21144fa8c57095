from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_mha.models import BertEncoder
from keras_mha.text import WordpieceTokenizer, learn_wordpiece_vocabulary
from tests.support.check_layer import LayerCase, check_layer, parts_of

VOCABULARY = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]"),
    *("a", "fine", "film", "##s", "!", "[", "]", "pad", "É", "e", "cafe"),
]
ID = {token: i for i, token in enumerate(VOCABULARY)}


def ids(*tokens: str) -> list[int]:
    return [ID[token] for token in tokens]


def rows(tokenizer: WordpieceTokenizer, texts: list[Any]) -> list[list[int]]:
    return tokenizer(tf.constant(texts)).numpy().tolist()


def test_words_pieces_and_padding() -> None:
    tokenizer = WordpieceTokenizer(VOCABULARY)
    assert rows(tokenizer, ["A fine film!", "films", "unheard films"]) == [
        ids("[CLS]", "a", "fine", "film", "!", "[SEP]"),
        [*ids("[CLS]", "film", "##s", "[SEP]"), 0, 0],
        [*ids("[CLS]", "[UNK]", "film", "##s", "[SEP]"), 0],
    ]
    assert tokenizer(tf.constant(["a"])).dtype == tf.int32


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ()),
        (" \t\n ", ()),
        ("a\x00a\x07 a", ("a", "a", "a")),
        (b"\xff\xfe a", ("[UNK]", "a")),
        (b"\xe4\xb8", ("[UNK]",)),
        ("\N{GRINNING FACE} a", ("[UNK]", "a")),
        ("[PAD] a", ("[", "pad", "]", "a")),
        ("a " * 3, ("a", "a", "a")),
        ("x" * 1000, ("[UNK]",)),
        ("CAF\N{LATIN CAPITAL LETTER E WITH ACUTE}", ("cafe",)),
    ],
)
def test_odd_texts(text: str | bytes, expected: tuple[str, ...]) -> None:
    assert rows(WordpieceTokenizer(VOCABULARY), [text]) == [
        ids("[CLS]", *expected, "[SEP]")
    ]


def test_case_and_accents_stay_when_asked() -> None:
    tokenizer = WordpieceTokenizer(VOCABULARY, lowercase=False)
    assert rows(tokenizer, ["É FILM film"]) == [
        ids("[CLS]", "É", "[UNK]", "film", "[SEP]")
    ]


@given(
    texts=st.lists(st.text(max_size=40) | st.binary(max_size=40), max_size=5),
    max_length=st.integers(2, 11),
    pad_to=st.none() | st.integers(1, 11),
)
@settings(max_examples=60)
def test_every_row_is_framed_and_padded(
    texts: list[str | bytes], max_length: int, pad_to: int | None
) -> None:
    if pad_to is not None and pad_to > max_length:
        pad_to = max_length
    tokenizer = WordpieceTokenizer(VOCABULARY, max_length=max_length, pad_to=pad_to)
    found = tokenizer(tf.constant(texts, tf.string)).numpy()
    lengths = (found != 0).sum(1)
    longest = max(lengths, default=2)
    rounded = longest if pad_to is None else -(-longest // pad_to) * pad_to
    assert found.shape == (len(texts), min(rounded, max_length))
    for row, length in zip(found, lengths, strict=True):
        assert row[0] == ID["[CLS]"]
        assert row[length - 1] == ID["[SEP]"]
        # Neither padding nor a frame inside the text.
        assert not np.isin(row[1 : length - 1], ids("[PAD]", "[CLS]", "[SEP]")).any()
        assert not row[length:].any()


def test_a_long_text_loses_its_end() -> None:
    tokenizer = WordpieceTokenizer(VOCABULARY, max_length=5)
    assert rows(tokenizer, ["fine fine a film film", "a"]) == [
        ids("[CLS]", "fine", "fine", "a", "[SEP]"),
        [*ids("[CLS]", "a", "[SEP]"), 0, 0],
    ]


def test_columns_lists_and_arrays_are_the_same() -> None:
    tokenizer = WordpieceTokenizer(VOCABULARY)
    texts = ["a film", "fine"]
    expected = rows(tokenizer, texts)
    for form in (texts, np.array(texts), np.array(texts, object), [[t] for t in texts]):
        assert np.array_equal(tokenizer(form), expected)
    column = tf.constant([[t] for t in texts])
    assert np.array_equal(tokenizer(column), expected)


def test_no_texts_give_no_rows() -> None:
    assert tokenizer_shape(pad_to=None) == (0, 2)
    assert tokenizer_shape(pad_to=7) == (0, 7)


def tokenizer_shape(pad_to: int | None) -> tuple[int, ...]:
    tokenizer = WordpieceTokenizer(VOCABULARY, max_length=7, pad_to=pad_to)
    return tuple(tokenizer(tf.zeros((0,), tf.string)).shape)


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize(("pad_to", "length"), [(None, None), (5, None), (11, 11)])
def test_in_a_model(
    shape: tuple[int, ...], pad_to: int | None, length: int | None, tmp_path: Path
) -> None:
    inputs = keras.Input(shape, dtype="string", name="texts")
    tokenizer = WordpieceTokenizer(VOCABULARY, max_length=11, pad_to=pad_to)
    outputs = tokenizer(inputs)
    assert outputs.shape == (None, length)
    assert outputs.dtype == "int32"
    model = keras.Model(inputs, outputs)
    model.compile(jit_compile="auto")
    assert model.jit_compile is False
    texts = tf.reshape(tf.constant(["a film", "fine films!", ""]), (3, *shape))
    expected = tokenizer(texts).numpy()
    assert np.array_equal(model.predict(texts, verbose=0), expected)
    path = tmp_path / "model.keras"
    model.save(path)
    loaded = keras.saving.load_model(path)
    assert np.array_equal(loaded.predict(texts, verbose=0), expected)


def test_in_a_dataset_and_made_in_its_graph() -> None:
    tokenizer = WordpieceTokenizer(VOCABULARY)
    dataset = tf.data.Dataset.from_tensor_slices(["a film", "fine"]).batch(2)
    (found,) = dataset.map(tokenizer)
    assert found.numpy().tolist() == rows(tokenizer, ["a film", "fine"])

    made: list[WordpieceTokenizer] = []

    def make(texts: tf.Tensor) -> tf.Tensor:
        made.append(WordpieceTokenizer(VOCABULARY))
        return made[-1](texts)

    (found,) = dataset.map(make)
    # Outside of that graph too.
    assert found.numpy().tolist() == rows(made[0], ["a film", "fine"])


CASE = LayerCase(
    WordpieceTokenizer,
    {"vocabulary": VOCABULARY},
    {"max_length": 13, "lowercase": False, "pad_to": 13},
    [np.array(["a fine film", "films !", ""], object)],
    carries_mask=False,
    compiles=False,
    has_policy=False,
)


@pytest.mark.parametrize("part", parts_of(CASE))
def test_the_contract_of_a_layer(part: str) -> None:
    check_layer(CASE, part)


def saved_model(path: Path, **options: Any) -> keras.Model:
    inputs = keras.Input((), dtype="string", name="texts")
    model = keras.Model(inputs, WordpieceTokenizer(VOCABULARY, **options)(inputs))
    model.save(path)
    return model


def config_in(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read("config.json"))


def test_a_file_holds_the_vocabulary_once(tmp_path: Path) -> None:
    path = tmp_path / "model.keras"
    saved_model(path)
    assert "film" not in json.dumps(config_in(path))
    with zipfile.ZipFile(path) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".txt")]
        text = archive.read(name).decode()
    assert text == "".join(f"{token}\n" for token in VOCABULARY)
    loaded: Any = keras.saving.load_model(path)
    assert loaded.layers[-1].get_vocabulary() == VOCABULARY


def test_odd_tokens_come_back(tmp_path: Path) -> None:
    vocabulary = [*VOCABULARY, "\x85", "\u2028", "\x1c", "\N{GRINNING FACE}", "a\tb"]
    tokenizer = WordpieceTokenizer(vocabulary)
    tokenizer.save_assets(str(tmp_path))
    other = WordpieceTokenizer.from_config(
        keras.saving.serialize_keras_object(tokenizer)["config"]
    )
    other.load_assets(str(tmp_path))
    assert other.get_vocabulary() == vocabulary


def test_files_with_the_vocabulary_in_their_configuration_load(tmp_path: Path) -> None:
    path, old = tmp_path / "model.keras", tmp_path / "old.keras"
    model = saved_model(path, max_length=11)
    config = config_in(path)
    (layer,) = [x for x in config["config"]["layers"] if "vocabulary" in x["config"]]
    layer["config"]["vocabulary"] = VOCABULARY
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(old, "w") as written:
        for name in archive.namelist():
            content = archive.read(name)
            if name == "config.json":
                content = json.dumps(config).encode()
            if not name.startswith("assets"):
                written.writestr(name, content)
    texts = tf.constant(["a fine film", "films !"])
    loaded: Any = keras.saving.load_model(old)
    assert np.array_equal(loaded(texts), model(texts))


@keras.saving.register_keras_serializable(package="test")
class Prompt(keras.layers.Layer):
    """A layer of a user around a tokenizer, which Keras traces when it loads it."""

    def __init__(self, tokenizer: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tokenizer = tokenizer
        self.supports_jit = False

    def call(self, texts: Any) -> Any:
        return self.tokenizer(tf.strings.join(["fine ", texts]))

    def get_config(self) -> dict[str, Any]:
        tokenizer = keras.saving.serialize_keras_object(self.tokenizer)
        return {**super().get_config(), "tokenizer": tokenizer}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        tokenizer = keras.saving.deserialize_keras_object(config["tokenizer"])
        return cls(**{**config, "tokenizer": tokenizer})


def test_inside_a_layer_of_a_user(tmp_path: Path) -> None:
    inputs = keras.Input((), dtype="string")
    model = keras.Model(inputs, Prompt(WordpieceTokenizer(VOCABULARY))(inputs))
    model.save(tmp_path / "model.keras")
    loaded: Any = keras.saving.load_model(tmp_path / "model.keras")
    texts = tf.constant(["film", "a film"])
    assert np.array_equal(loaded(texts), model(texts))
    assert rows(loaded.layers[-1].tokenizer, ["fine film"]) == [
        ids("[CLS]", "fine", "film", "[SEP]")
    ]


def test_copies_share_the_vocabulary() -> None:
    inputs = keras.Input((), dtype="string")
    model = keras.Model(inputs, WordpieceTokenizer(VOCABULARY)(inputs))
    texts = tf.constant(["a film"])
    assert np.array_equal(keras.models.clone_model(model)(texts), model(texts))


def test_a_tokenizer_without_its_vocabulary_says_so(tmp_path: Path) -> None:
    inputs = keras.Input((), dtype="string")
    model = keras.Model(inputs, WordpieceTokenizer(VOCABULARY, name="cut")(inputs))
    bare: Any = keras.models.model_from_json(model.to_json())
    message = "tokenizer 'cut' has no vocabulary: a configuration holds only its size"
    tokenizer = bare.layers[-1]
    for call in (
        lambda: tokenizer(tf.constant(["a"])),
        lambda: tokenizer.detokenize([[1]]),
        lambda: bare.save(tmp_path / "bare.keras"),
        lambda: tokenizer.load_assets(str(tmp_path)),
        lambda: bare.predict(tf.constant(["a"]), verbose=0),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    WordpieceTokenizer(VOCABULARY[:-1]).save_assets(str(tmp_path))
    with pytest.raises(ValueError, match="has 15 tokens. Received: .* with 14"):
        tokenizer.load_assets(str(tmp_path))
    WordpieceTokenizer(VOCABULARY).save_assets(str(tmp_path))
    tokenizer.load_assets(str(tmp_path))
    texts = tf.constant(["a fine film"])
    assert np.array_equal(bare.predict(texts, verbose=0), model(texts))


def test_detokenize() -> None:
    tokenizer = WordpieceTokenizer([*VOCABULARY, "##", "##film"])
    texts = ["A fine film!", "films", "unheard films", "", "[PAD] caf\xe9"]
    back = [b"a fine film !", b"films", b"[UNK] films", b"", b"[ pad ] cafe"]
    found = tokenizer(tf.constant(texts))
    assert tokenizer.detokenize(found).numpy().tolist() == back
    assert np.array_equal(tokenizer(tokenizer.detokenize(found[:2])), found[:2, :6])
    ragged = np.array([[[ID["film"], ID["##s"]]], [[ID["##s"], 0]]], "int64")
    assert tokenizer.detokenize(ragged).numpy().tolist() == [[b"films"], [b"s"]]
    assert tokenizer.detokenize([len(VOCABULARY), 4]).numpy() == b"## a"
    assert tokenizer.detokenize(np.zeros((0, 3), int)).shape == (0,)
    in_graph = tf.function(tokenizer.detokenize)(found)
    assert in_graph.numpy().tolist() == back


@pytest.mark.parametrize(
    ("numbers", "error", "message"),
    [
        ([[1.0]], TypeError, "`ids` must be integers. Received: float32"),
        (3, ValueError, r"must have the shape \(..., T\)"),
        ([[1, 15]], ValueError, "from 0 to 14.* Received: ids from 1 to 15"),
        ([-1], ValueError, "Received: ids from -1 to -1"),
    ],
)
def test_ids_that_are_no_texts(
    numbers: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        WordpieceTokenizer(VOCABULARY).detokenize(numbers)


def test_the_package_itself_registers_every_layer(tmp_path: Path) -> None:
    saved_model(tmp_path / "texts.keras")
    ids = {
        name: keras.Input((None,), dtype="int32", name=name)
        for name in ("input_ids", "attention_mask")
    }
    encoder = BertEncoder(9, 8, 6, num_layers=1, num_heads=2, hidden_dim=5)
    keras.Model(ids, encoder(ids)).save(tmp_path / "bert.keras")
    program = (
        "import sys, keras, keras_mha\n"
        "assert 'tensorflow_text' not in sys.modules\n"
        "for path in sys.argv[1:]: print(keras.saving.load_model(path).layers[-1].name)"
    )
    files = [str(tmp_path / name) for name in ("texts.keras", "bert.keras")]
    run = subprocess.run(
        [sys.executable, "-c", program, *files],
        cwd=Path(__file__).resolve().parents[2],
        check=True,
        capture_output=True,
        text=True,
    )
    assert run.stdout.split()[1] == encoder.name


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_vocabulary_from_a_file(tmp_path: Path, end: str) -> None:
    path = tmp_path / "vocab.txt"
    separator = end or "\n"
    path.write_bytes((separator.join(VOCABULARY) + end).encode())
    for form in (path, str(path)):
        assert WordpieceTokenizer(form).get_vocabulary() == VOCABULARY


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_length": 1}, ValueError, "`max_length` must be an integer of at least"),
        ({"max_length": 2.5}, ValueError, "Received: max_length=2.5"),
        ({"pad_to": 0}, ValueError, "`pad_to` must be an integer of at least 1"),
        (
            {"max_length": 7, "pad_to": 8},
            ValueError,
            "Received: pad_to=8 and max_length=7",
        ),
        ({"vocabulary": VOCABULARY[1:]}, ValueError, r"Missing: \['\[PAD\]'\]"),
        ({"vocabulary": ["a", *VOCABULARY]}, ValueError, r"twice: \['a'\]"),
        ({"vocabulary": ["b", *VOCABULARY]}, ValueError, "Received first: 'b'"),
        ({"vocabulary": [*VOCABULARY, ""]}, ValueError, "empty token"),
        ({"vocabulary": [*VOCABULARY, "a\nb"]}, ValueError, "must not contain line br"),
        ({"vocabulary": [*VOCABULARY, 5]}, TypeError, "Received: 5 of type int"),
    ],
)
def test_refused_arguments(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        WordpieceTokenizer(**{"vocabulary": VOCABULARY, **arguments})


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        (tf.constant([1, 2]), TypeError, "`inputs` must be strings. Received: int32"),
        (tf.constant("a"), ValueError, r"\(B,\) or \(B, 1\). Received: \(\)"),
        (tf.constant([["a", "b"]]), ValueError, r"Received: \(1, 2\)"),
        (tf.ragged.constant([["a"], []]), TypeError, "dense. Received: a RaggedTensor"),
    ],
)
def test_refused_inputs(
    inputs: tf.Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        WordpieceTokenizer(VOCABULARY)(inputs)


TEXTS = [
    "The film films what films film: a fine film.",
    "Finer films than this film are fine, and this is the finest!",
    "\N{GRINNING FACE} \xe9t\xe9 film \u4e2d\u6587",
]


def test_the_learned_vocabulary_covers_its_texts() -> None:
    vocabulary = learn_wordpiece_vocabulary(TEXTS, 150)
    assert vocabulary[:4] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    assert len(set(vocabulary)) == len(vocabulary) <= 150
    assert {"film", "fine", "##s", "e"} <= set(vocabulary)
    found = WordpieceTokenizer(vocabulary)(tf.constant(TEXTS)).numpy()
    assert not (found == vocabulary.index("[UNK]")).any()


@pytest.mark.parametrize(
    "words",
    [
        [chr(0x4E00 + i) for i in range(1100)],  # more than the learner counts
        ["z" * 51, "a"],  # a word longer than it looks at
        ["zq" * 40],
    ],
)
def test_every_character_is_learned(words: list[str]) -> None:
    vocabulary = learn_wordpiece_vocabulary(words * 2, 5000)
    for character in set("".join(words)):
        assert {character, f"##{character}"} <= {*vocabulary}
    assert len(vocabulary) == len({*vocabulary})


def test_the_learned_vocabulary_keeps_to_its_size() -> None:
    full = learn_wordpiece_vocabulary(TEXTS, 10_000)
    essential = [t for t in full[4:] if len(t.removeprefix("##")) == 1]
    for size in range(4 + len(essential), len(full) + 1):
        vocabulary = learn_wordpiece_vocabulary(TEXTS, size)
        assert len(vocabulary) <= size
        assert set(essential) <= set(vocabulary)
    with pytest.raises(ValueError, match="`vocabulary_size` must leave room"):
        learn_wordpiece_vocabulary(TEXTS, 3 + len(essential))


def test_rare_pieces_are_left_out() -> None:
    texts = ["often often often", "seldom"]
    assert "seldom" in learn_wordpiece_vocabulary(texts, 99, min_count=1)
    vocabulary = learn_wordpiece_vocabulary(texts, 99, min_count=2)
    assert "often" in vocabulary
    assert "seldom" not in vocabulary


def test_case_is_learned_when_asked() -> None:
    texts = ["Film Film Film"]
    assert "film" in learn_wordpiece_vocabulary(texts, 40)
    assert "Film" in learn_wordpiece_vocabulary(texts, 40, lowercase=False)


@pytest.mark.slow
def test_learning_does_not_depend_on_the_hash_seed() -> None:
    program = (
        "from keras_mha.text import learn_wordpiece_vocabulary as learn\n"
        f"print(*learn({TEXTS!r}, 120), sep='|')"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONIOENCODING": "utf-8"},
            cwd=Path(__file__).resolve().parents[2],
            check=True,
            capture_output=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1


@pytest.mark.parametrize(
    ("texts", "size", "error", "message"),
    [
        ("one text", 50, TypeError, "Received: a single str"),
        ([], 50, ValueError, "at least one word"),
        (["", "  "], 50, ValueError, "at least one word"),
        (TEXTS, 0, ValueError, "`vocabulary_size` must be an integer of at least 1"),
    ],
)
def test_refused_texts(
    texts: Any, size: int, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        learn_wordpiece_vocabulary(texts, size)


def test_without_tensorflow_text_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow_text", None)
    with pytest.raises(ImportError, match=r"keras-mha\[text\]"):
        WordpieceTokenizer(VOCABULARY)
    with pytest.raises(ImportError, match=r"keras-mha\[text\]"):
        learn_wordpiece_vocabulary(["a"], 50)
