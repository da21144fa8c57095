from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_mha
from keras_mha.export import ParityError, VerificationError, export_tflite
from keras_mha.export.runtimes import fresh_process, litert, tflite_schema
from keras_mha.export.runtimes.descriptor import File
from keras_mha.export.runtimes.tflite_schema import pack, unpack
from keras_mha.export.tflite import text as tflite_text
from keras_mha.text import WordpieceTokenizer
from tests.support import small_models, tflite_files
from tests.support.small_models import HOSTILE, TEXTS, VOCABULARY

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="tensorflow-text registers its operations on Linux"
)


def encoded(texts: list[Any]) -> np.ndarray:
    array = np.empty((len(texts),), object)
    array[:] = [text.encode() if isinstance(text, str) else text for text in texts]
    return array


def answers(path: str, texts: list[Any]) -> np.ndarray:
    """What the file says to each text, in a process of its own."""
    found, _ = fresh_process.run_in_fresh_process(
        litert.RUNTIME,
        File(Path(path), "tflite/text"),
        [{"text": encoded([text])} for text in texts],
        timeout=60,
    )
    return np.concatenate([answer["probabilities"] for answer in found])


def ids_and_text(directory: Path, **settings: Any) -> list[Any]:
    arguments = {"sequence_lengths": (7,), "samples": TEXTS} | settings
    model = arguments.pop("model", None) or small_models.text_model()
    report = export_tflite(model, directory, text=True, **arguments)
    return list(report.files)


def test_strings_in_and_probabilities_out(tmp_path: Path) -> None:
    model = small_models.text_model()
    of_ids, of_texts = ids_and_text(tmp_path, model=model)
    assert (of_ids.kind, of_texts.kind) == ("ids", "text")
    assert of_texts.path == str(tmp_path / "text_7.tflite")
    (given,), (got,) = of_texts.inputs, of_texts.outputs
    assert (given.name, given.dtype, given.shape) == ("text", "string", (1,))
    assert (got.name, got.dtype, got.shape) == ("probabilities", "float32", (1, 3))
    assert set(of_texts.custom_operations) == tflite_text.OPERATIONS
    assert not [name for name in of_texts.operators if "Flex" in name]
    assert of_texts.parity.samples == len(TEXTS)
    assert of_texts.parity.max_absolute_difference < 1e-6

    wanted = model(encoded(TEXTS)).numpy()
    assert np.ptp(wanted, axis=0).min() > 1e-3
    np.testing.assert_allclose(answers(of_texts.path, TEXTS), wanted, atol=1e-6)
    assert (tmp_path / "vocab.txt").read_text("utf-8").split("\n")[:-1] == VOCABULARY


def test_hostile_texts_have_the_models_answer(tmp_path: Path) -> None:
    model = small_models.text_model()
    _, of_texts = ids_and_text(tmp_path, model=model, samples=HOSTILE)
    assert of_texts.parity.samples == len(HOSTILE)
    wanted = model(encoded(HOSTILE)).numpy()
    # Not all the same: most have a word that is known.
    assert len(np.unique(wanted.round(4), axis=0)) >= 5
    np.testing.assert_allclose(answers(of_texts.path, HOSTILE), wanted, atol=1e-6)


def test_the_model_behind_the_tokenizer_is_that_of_the_ids_file(tmp_path: Path) -> None:
    of_ids, of_texts = ids_and_text(tmp_path)
    whole = unpack(Path(of_texts.path).read_bytes())
    part = unpack(Path(of_ids.path).read_bytes())
    behind = whole.subgraphs[0].operators[-len(part.subgraphs[0].operators) :]

    def described(model: Any, operators: list[Any]) -> list[Any]:
        tensors = model.subgraphs[0].tensors
        return [
            (
                model.operatorCodes[operator.opcodeIndex].builtinCode,
                vars(operator.builtinOptions) if operator.builtinOptions else None,
                [
                    bytes(data)
                    for number in operator.inputs
                    if (data := model.buffers[tensors[number].buffer].data) is not None
                ],
            )
            for operator in operators
        ]

    assert described(whole, behind) == described(part, part.subgraphs[0].operators)
    # The delegate takes it over as it takes the file of ids.
    assert of_texts.delegate_partitions == of_ids.delegate_partitions == 1
    assert not Counter(of_ids.operators) - Counter(of_texts.operators)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["dynamic_int8", "float16", "int8_dense"])
def test_quantized(tmp_path: Path, quantization: str) -> None:
    keywords: dict[str, Any] = {"quantization": quantization}
    if quantization == "int8_dense":
        keywords["representative_data"] = TEXTS * 3
    tokenizer = WordpieceTokenizer(VOCABULARY, max_length=7)
    texts = keras.Input((), dtype="string", name="text")
    hidden = keras_mha.TokenAndPositionEmbedding(len(VOCABULARY), 7, 32)(
        tokenizer(texts)
    )
    hidden = keras_mha.TransformerEncoderBlock(2, 48)(hidden)
    hidden = keras.layers.GlobalAveragePooling1D()(hidden)
    head = keras.layers.Dense(3, activation="softmax", name="probabilities")
    model = small_models.randomize(keras.Model(texts, head(hidden)))
    of_ids, of_texts = ids_and_text(
        tmp_path, model=model, quantized_tolerance=0.3, **keywords
    )
    # What the two files answer is the same, whatever the model would.
    ids = tokenizer(encoded(TEXTS)).numpy()
    ids = np.pad(ids, ((0, 0), (0, 7 - ids.shape[1])))
    found, _ = fresh_process.run_in_fresh_process(
        litert.RUNTIME,
        File(Path(of_ids.path), "tflite"),
        [{"ids": row[np.newaxis]} for row in ids],
        timeout=60,
    )
    wanted = np.concatenate([answer["probabilities"] for answer in found])
    np.testing.assert_allclose(answers(of_texts.path, TEXTS), wanted, atol=1e-6)
    assert of_texts.parity.max_absolute_difference > 0


@pytest.mark.slow
def test_batches_and_lengths_unlike_the_tokenizers(tmp_path: Path) -> None:
    # The samples fit into 5 ids, and the tokenizer makes up to 6.
    texts = ["good movie", "a bad movie", "", "badly"]
    model = small_models.text_model()
    files = ids_and_text(
        tmp_path, model=model, samples=texts, sequence_lengths=(5, 11), batch_size=3
    )
    assert [(f.kind, f.sequence_length) for f in files] == [
        *(("ids", 5), ("text", 5)),
        *(("ids", 11), ("text", 11)),
    ]
    assert [file.inputs[0].shape for file in files][1::2] == [(3,), (3,)]
    assert all(file.parity.batch_sizes == (3,) for file in files)
    # What is longer than the file's length is cut as by a tokenizer of that length.
    long = ["good movie a badly bad movie", "a a a", "movie"]
    tokenizer = WordpieceTokenizer(VOCABULARY, max_length=5)
    given = keras.Input((), dtype="string", name="text")
    shorter = keras.Model(given, model.layers[-1](model.layers[-2](tokenizer(given))))
    found, _ = fresh_process.run_in_fresh_process(
        litert.RUNTIME,
        File(Path(files[1].path), "tflite/text"),
        [{"text": encoded(long)}],
        timeout=60,
    )
    wanted = shorter(encoded(long)).numpy()
    np.testing.assert_allclose(found[0]["probabilities"], wanted, atol=1e-6)
    assert np.abs(wanted - model(encoded(long)).numpy()).max() > 1e-3


def test_inputs_with_an_axis_of_one(tmp_path: Path) -> None:
    texts = keras.Input((1,), dtype="string", name="text")
    tokenizer = WordpieceTokenizer(VOCABULARY, max_length=7)
    head = keras.layers.Identity(name="probabilities")
    model = keras.Model(texts, head(small_models.ids_model()(tokenizer(texts))))
    _, of_texts = ids_and_text(tmp_path, model=model)
    assert of_texts.inputs[0].shape == (1, 1)


def test_another_vocabulary_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_length = tflite_text._of_length

    def swapped(tokenizer: WordpieceTokenizer, length: int) -> WordpieceTokenizer:
        config = of_length(tokenizer, length).get_config()
        words = list(config["vocabulary"])
        words[4], words[5] = words[5], words[4]  # good and bad
        return WordpieceTokenizer.from_config({**config, "vocabulary": words})

    monkeypatch.setattr(tflite_text, "_of_length", swapped)
    with pytest.raises(ParityError, match="'probabilities' .* LiteRT"):
        ids_and_text(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_the_operations_the_file_does_not_run(tmp_path: Path) -> None:
    _, of_texts = ids_and_text(tmp_path)
    with pytest.raises(VerificationError, match="FastBertNormalize"):
        fresh_process.run_in_fresh_process(
            litert.RUNTIME,
            File(Path(of_texts.path), "tflite"),  # as if it held ids
            [{"text": encoded(["good"])}],
            timeout=60,
        )


def test_operations_that_are_not_registered_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fewer = tflite_text.OPERATIONS - {"FastBertNormalize"}
    monkeypatch.setattr(tflite_text, "OPERATIONS", fewer)
    with pytest.raises(ValueError, match=r"does not register.*\['FastBertNormalize'\]"):
        ids_and_text(tmp_path / "out")


def test_weights_stand_where_every_processor_can_load_them(tmp_path: Path) -> None:
    _, of_texts = ids_and_text(tmp_path)
    content = Path(of_texts.path).read_bytes()
    model = unpack(content)
    found = 0
    for buffer in model.buffers:
        data = b"" if buffer.data is None else bytes(buffer.data)
        if len(data) >= 64 and content.count(data) == 1:
            assert content.index(data) % 16 == 0
            found += 1
    assert found >= 3
    assert tflite_files.contents(pack(model)) == tflite_files.contents(content)


def test_what_was_converted_is_parsed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed = []

    def watch(content: bytes) -> Any:
        parsed.append(len(content))
        return unpack(content)

    monkeypatch.setattr(tflite_schema, "unpack", watch)
    of_ids, of_texts = ids_and_text(tmp_path)
    # The file of ids, and the tokenizer to be put before it.
    assert parsed[0] == of_ids.size_bytes
    assert parsed[1] < of_texts.size_bytes - of_ids.size_bytes + 4096
    assert len(parsed) == 2


# What is refused.


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    texts = keras.Input((), dtype="string", name="text")
    lengths = keras.layers.Lambda(
        lambda given: tf.strings.length(given)[:, tf.newaxis], output_shape=(1,)
    )(texts)
    model = keras.Model(texts, keras.layers.Embedding(11, 3)(lengths))
    with pytest.raises(ValueError, match=r"call a `keras_mha.text.Word.* 0 such calls"):
        export_tflite(model, tmp_path, samples=["a"], text=True)


def test_a_model_of_ids_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`text=True`.* one input, of str.*'ids': 'i"):
        export_tflite(small_models.ids_model(), tmp_path, samples=[[1, 2]], text=True)


def test_the_gpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`text=True` is for the CPU.*target='gpu'"):
        ids_and_text(tmp_path, target="gpu")


def test_a_text_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a row of 6 ids for the length 5"):
        ids_and_text(tmp_path / "out", sequence_lengths=(5,))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["tensorflow_text", "tflite_registrar.so"])
def test_missing_operations_name_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    find = importlib.util.find_spec
    if missing == "tensorflow_text":
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name: None if name == missing else find(name),
        )
    else:
        exists = Path.exists
        monkeypatch.setattr(
            Path, "exists", lambda path: path.name != missing and exists(path)
        )
    with pytest.raises(
        ImportError, match=r"registrar.so is missing: pip install 'keras-mha\[text\]'"
    ):
        ids_and_text(tmp_path)
