from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from keras_mha.convert import load_bert, save_bert
from keras_mha.models import BertEncoder
from tests.support import checkpoints as tiny
from tests.support.checkpoints import IDS, MASK, TOKEN_TYPES, write_checkpoint

INPUTS = {"input_ids": IDS, "attention_mask": MASK.astype("int32")}
TYPED = {**INPUTS, "token_type_ids": TOKEN_TYPES}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path)


def states_of(encoder: BertEncoder, inputs: dict[str, Any]) -> list[np.ndarray]:
    """The embeddings and each block's outputs."""
    states = [encoder.embed(inputs)]
    for block in encoder.blocks:
        states.append(block(states[-1], mask=inputs["attention_mask"]))
    return [np.asarray(state) for state in states]


@pytest.mark.parametrize("inputs", [INPUTS, TYPED], ids=["one type", "two types"])
def test_every_layer_computes_what_the_checkpoint_says(
    directory: Path, inputs: dict[str, Any]
) -> None:
    tensors = tiny.random_tensors()
    expected = tiny.hidden_states(tensors, IDS, MASK, inputs.get("token_type_ids"))
    encoder = load_bert(directory, pooler=True)
    for found, wanted in zip(states_of(encoder, inputs), expected, strict=True):
        np.testing.assert_allclose(found[MASK], wanted[MASK], atol=1e-5)
    last, pooled = encoder(inputs)
    np.testing.assert_allclose(np.asarray(last)[MASK], expected[-1][MASK], atol=1e-5)
    np.testing.assert_allclose(pooled, tiny.pooled(tensors, expected[-1]), atol=1e-5)


@pytest.mark.parametrize("name", sorted(tiny.random_tensors()))
def test_every_tensor_counts(tmp_path: Path, name: str) -> None:
    # A tensor read into the wrong place, or nowhere, would leave the outputs as they
    # are, or change them in another way than the oracle's.
    tensors = tiny.random_tensors()
    tensors[name] = tensors[name][..., ::-1].copy()
    encoder = load_bert(write_checkpoint(tmp_path, tensors), pooler=True)
    states = tiny.hidden_states(tensors, IDS, MASK, TOKEN_TYPES)
    before = tiny.hidden_states(tiny.random_tensors(), IDS, MASK, TOKEN_TYPES)
    last, pooled = (np.asarray(each) for each in encoder(TYPED))
    np.testing.assert_allclose(last[MASK], states[-1][MASK], atol=1e-5)
    np.testing.assert_allclose(pooled, tiny.pooled(tensors, states[-1]), atol=1e-5)
    same = tiny.pooled(tiny.random_tensors(), before[-1])
    # The keys' biases add the same to all scores of a query: softmax drops them.
    if not name.endswith("self.key.bias"):
        assert not np.allclose(pooled, same, atol=1e-3)


def test_every_weight_is_set(directory: Path) -> None:
    encoder = load_bert(directory, pooler=True)
    sizes = [tensor.size for tensor in tiny.random_tensors().values()]
    assert encoder.count_params() == sum(sizes)
    held = np.sort(np.concatenate([np.ravel(w) for w in encoder.get_weights()]))
    stored = np.concatenate([np.ravel(t) for t in tiny.random_tensors().values()])
    np.testing.assert_array_equal(held, np.sort(stored))


def prefixed(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"bert.{name}": value for name, value in tensors.items()}


def old(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): value
        for name, value in tensors.items()
    }


@pytest.mark.parametrize("spell", [prefixed, old, lambda t: prefixed(old(t))])
def test_spellings(tmp_path: Path, directory: Path, spell: Callable[..., Any]) -> None:
    other = tmp_path / "other"
    other.mkdir()
    write_checkpoint(other, spell(tiny.random_tensors()))
    found, expected = load_bert(other)(INPUTS), load_bert(directory)(INPUTS)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(np.float64, 1e-5), (np.float16, 2e-2), (ml_dtypes.bfloat16, 0.2)],
)
def test_dtypes_of_the_file(tmp_path: Path, dtype: Any, tolerance: float) -> None:
    tensors = {n: t.astype(dtype) for n, t in tiny.random_tensors().items()}
    encoder = load_bert(write_checkpoint(tmp_path, tensors))
    assert {weight.dtype for weight in encoder.weights} == {"float32"}
    expected = tiny.hidden_states(tiny.random_tensors(), IDS, MASK)[-1]
    found = np.asarray(encoder(INPUTS))
    np.testing.assert_allclose(found[MASK], expected[MASK], atol=tolerance)


def test_what_is_left_out_is_named(tmp_path: Path) -> None:
    heads = {
        "cls.predictions.bias": np.ones(tiny.V, np.float32),
        "classifier.weight": np.ones((2, tiny.D), np.float32),
        "bert.embeddings.position_ids": np.arange(tiny.LONGEST)[None],
    }
    tensors = {**prefixed(tiny.random_tensors()), **heads}
    write_checkpoint(tmp_path, tensors)
    pooler = {"bert.pooler.dense.bias", "bert.pooler.dense.weight"}
    assert load_bert(tmp_path).left_out == tuple(sorted({*heads, *pooler}))
    assert load_bert(tmp_path, pooler=True).left_out == tuple(sorted(heads))


def test_options(directory: Path) -> None:
    encoder = load_bert(directory)
    block = encoder.blocks[1]
    assert encoder.dropout == block.attention.dropout == block.feed_forward.dropout
    assert (encoder.dropout, encoder.attention_dropout) == (0.3, 0.2)
    assert block.attention.sublayer.dropout == 0.2
    # BERT has none between the two dense layers.
    assert block.feed_forward.sublayer.dropout == 0.0
    options = {"dropout": 0.0, "attention_dropout": 0.05, "seed": 5, "name": "mini"}
    encoder = load_bert(
        directory / "model.safetensors", dtype="mixed_bfloat16", **options
    )
    assert {name: getattr(encoder, name) for name in options} == options
    assert encoder(INPUTS).dtype == "bfloat16"


@pytest.mark.parametrize(
    ("name", "approximate"),
    [("gelu", False), ("gelu_new", True), ("gelu_pytorch_tanh", True)],
)
def test_both_gelus(tmp_path: Path, name: str, approximate: bool) -> None:
    encoder = load_bert(write_checkpoint(tmp_path, hidden_act=name))
    x = np.linspace(-3, 3, 7, dtype=np.float32)
    activation = encoder.blocks[0].feed_forward.sublayer.activation
    expected = keras.ops.gelu(x, approximate=approximate)
    np.testing.assert_allclose(activation(x), expected, atol=1e-6)
    assert not np.allclose(expected, keras.ops.gelu(x, approximate=not approximate))


# Writing.


@pytest.mark.parametrize("pooler", [True, False])
def test_what_is_written_is_what_was_read(tmp_path: Path, pooler: bool) -> None:
    directory = write_checkpoint(tmp_path)
    written = tmp_path / "below" / "written"
    save_bert(load_bert(directory, pooler=pooler), written)
    assert sorted(path.name for path in written.iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    tensors = load_file(written / "model.safetensors")
    expected = tiny.random_tensors()
    if not pooler:
        expected = {n: t for n, t in expected.items() if not n.startswith("pooler")}
    assert sorted(tensors) == sorted(expected)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, expected[name], err_msg=name)
    content = json.loads((written / "config.json").read_text("utf-8"))
    assert content == tiny.CONFIG


def test_low_rank_factors_are_merged_in(tmp_path: Path, directory: Path) -> None:
    encoder = load_bert(directory)
    block = encoder.blocks[0]
    block.attention.sublayer.enable_lora(2)
    block.feed_forward.sublayer.hidden_dense.enable_lora(2)
    for variable in encoder.trainable_variables:
        if "lora" in variable.path:
            variable.assign(np.random.default_rng(1).normal(size=variable.shape))
    expected = np.asarray(encoder(INPUTS))
    assert not np.allclose(expected, load_bert(directory)(INPUTS), atol=1e-2)
    save_bert(encoder, tmp_path / "merged")
    found = np.asarray(load_bert(tmp_path / "merged")(INPUTS))
    np.testing.assert_allclose(found[MASK], expected[MASK], atol=1e-4)


def test_files_are_replaced_when_asked(tmp_path: Path, directory: Path) -> None:
    encoder = load_bert(directory)
    before = (directory / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match=r"model.safetensors.*overwrite=True"):
        save_bert(encoder, directory)
    assert (directory / "model.safetensors").read_bytes() == before
    save_bert(encoder, directory, overwrite=True)
    assert not list(directory.glob(".staging-*"))
    np.testing.assert_array_equal(load_bert(directory)(INPUTS), encoder(INPUTS))
    del tmp_path


def test_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="`encoder` must be a BertEncoder.*a Dense"):
        save_bert(keras.layers.Dense(3), tmp_path)
    sizes = {"num_layers": 1, "num_heads": 2, "hidden_dim": 12}
    with pytest.raises(ValueError, match="needs a built encoder"):
        save_bert(BertEncoder(9, 7, 8, **sizes), tmp_path)
    encoder = BertEncoder(9, 7, 8, **sizes, activation="elu")
    encoder.build()
    with pytest.raises(ValueError, match=r"one of the activations .*activation=.*elu"):
        save_bert(encoder, tmp_path)
    encoder = BertEncoder(9, 7, 8, **sizes)
    encoder.build()
    encoder.blocks[0].attention.sublayer.quantize("int8")
    with pytest.raises(ValueError, match="must not be quantized.*'int8'"):
        save_bert(encoder, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("heads", [1, 5, 15])
def test_any_divisor_of_the_width_is_read_and_written(
    tmp_path: Path, heads: int
) -> None:
    encoder = load_bert(
        write_checkpoint(tmp_path, num_attention_heads=heads), pooler=True
    )
    layer = encoder.blocks[1].attention.sublayer
    assert (encoder.num_heads, encoder.key_dim) == (heads, tiny.D // heads)
    assert layer.qkv_dense.kernel.shape == (tiny.D, heads, 3 * tiny.D // heads)
    save_bert(encoder, tmp_path / "written")
    content = json.loads((tmp_path / "written" / "config.json").read_text("utf-8"))
    assert content == {**tiny.CONFIG, "num_attention_heads": heads}
    tensors = load_file(tmp_path / "written" / "model.safetensors")
    for name, tensor in tiny.random_tensors().items():
        np.testing.assert_array_equal(tensors[name], tensor, err_msg=name)


@pytest.mark.parametrize(
    ("heads", "size", "message"),
    [
        ((3, 2), 5, r"the same number .* Received: num_heads=\(3, 2\)"),
        ((2, 2), 5, "`embedding_dim / num_heads`.*=15, num_heads=2 and key_dim=5"),
        (3, 7, "`embedding_dim / num_heads`.*=15, num_heads=3 and key_dim=7"),
    ],
)
def test_heads_that_no_configuration_tells_of(
    tmp_path: Path, heads: Any, size: int, message: str
) -> None:
    encoder = BertEncoder(9, 7, 15, 2, heads, 17, key_dim=size)
    encoder.build()
    with pytest.raises(ValueError, match=message):
        save_bert(encoder, tmp_path)
    assert not list(tmp_path.iterdir())


def test_heads_of_each_block_that_are_as_many(tmp_path: Path) -> None:
    encoder = BertEncoder(tiny.V, 13, 15, 2, (3, 3), 17, key_dim=5)
    encoder.build()
    save_bert(encoder, tmp_path)
    loaded = load_bert(tmp_path)
    assert (loaded.num_heads, loaded.key_dim) == (3, 5)
    np.testing.assert_array_equal(loaded(INPUTS), encoder(INPUTS))


# What is not right is named.


def without(name: str) -> dict[str, np.ndarray]:
    return {n: t for n, t in tiny.random_tensors().items() if n != name}


QUERY = "encoder.layer.1.attention.self.query.weight"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (without(QUERY), rf"lacks the tensor '{QUERY}' \(15, 15\)"),
        (
            {**tiny.random_tensors(), QUERY: np.ones((15, 5), np.float32)},
            rf"'{QUERY}' of .* must have the shape \(15, 15\).*Received: \(15, 5\)",
        ),
        (
            {**tiny.random_tensors(), QUERY: np.ones((15, 15), np.int32)},
            rf"'{QUERY}' of .* must be one of .*Received: I32",
        ),
        (
            {**tiny.random_tensors(), "encoder.layer.2.x": np.ones(1, np.float32)},
            r"does not have: \['encoder.layer.2.x'\]",
        ),
        (
            {**tiny.random_tensors(), f"bert.{QUERY}": np.ones(1, np.float32)},
            rf"each tensor once. Received: '(bert.)?{QUERY}' and '(bert.)?{QUERY}'",
        ),
    ],
)
def test_wrong_tensors(tmp_path: Path, tensors: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_bert(write_checkpoint(tmp_path, tensors))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "roberta"}, "model_type='bert'.*Received: 'roberta'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type='absol"),
        ({"is_decoder": True}, "is_decoder=False.*Received: True"),
        ({"pruned_heads": {"0": [1]}}, r"pruned_heads=\{\}.*Received: \{'0': \[1\]\}"),
        ({"hidden_act": "quick_gelu"}, "`hidden_act` must be one of .*quick_gelu"),
        ({"hidden_act": ["gelu"]}, "`hidden_act` must be one of"),
        ({"vocab_size": None}, r"lacks \['vocab_size'\]"),
        ({"vocab_size": 32}, r"'embeddings.word_embeddings.weight'.*\(32, 15\)"),
        ({"vocab_size": 3e1}, "`vocab_size` must be a positive integer.*30.0"),
        ({"num_hidden_layers": True}, "`num_hidden_layers` must be a positive"),
        # Refused by what the file lacks, before anything is made of it.
        ({"num_hidden_layers": 10**9}, "lacks the tensor 'encoder.layer.2."),
        ({"hidden_size": 15 * 10**12}, "must have the shape"),
        ({"num_attention_heads": 4}, "multiple of `num_attention_heads`.*15 and 4"),
        ({"layer_norm_eps": -1e-12}, "`layer_norm_eps` must be"),
        ({"layer_norm_eps": 0}, "`layer_norm_eps` must be"),
        ({"hidden_dropout_prob": float("nan")}, "`hidden_dropout_prob` must be"),
        ({"hidden_dropout_prob": "0.1"}, "`hidden_dropout_prob` must be"),
    ],
)
def test_wrong_configs(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_bert(write_checkpoint(tmp_path, **config))


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 10**5])
def test_a_config_that_is_none(directory: Path, content: bytes) -> None:
    (directory / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config.json (is not sound JSON|must hold)"):
        load_bert(directory)


def header(content: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(content).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04K\x01.",  # a pickle
        b"\xff" * 100,
        header({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}),
        header({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 9]}}, b"x" * 9),
    ],
)
def test_weights_that_are_none(directory: Path, content: bytes) -> None:
    (directory / "model.safetensors").write_bytes(content)
    with pytest.raises(
        ValueError, match="model.safetensors is not a sound safetensors"
    ):
        load_bert(directory)


def test_every_cut_of_the_file_is_refused(directory: Path) -> None:
    path = directory / "model.safetensors"
    whole = path.read_bytes()
    for length in np.linspace(0, len(whole) - 1, 40).astype(int):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="not a sound safetensors"):
            load_bert(directory)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_that_is_not_there(directory: Path, name: str) -> None:
    (directory / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_bert(directory)


def test_a_path_that_is_none_says_that_nothing_is_downloaded(directory: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing is downloaded.*no-such-bert"):
        load_bert("no-such-bert")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="pickled.*pytorch_model.bin"):
        load_bert(directory)


def test_the_configurations_path_will_do(directory: Path) -> None:
    assert load_bert(directory / "config.json").num_layers == tiny.LAYERS
    with pytest.raises(ValueError, match="`pooler` must be True or False"):
        load_bert(directory, pooler="yes")  # pyright: ignore[reportArgumentType]


WITHOUT = """
import sys
sys.modules["{package}"] = None
{program}
"""


def run_without(package: str, program: str, **environment: str) -> str:
    import os

    run = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(package=package, program=program)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    return run.stdout + run.stderr


def test_without_safetensors_the_extra_is_named(directory: Path) -> None:
    program = f"from keras_mha.convert import load_bert; load_bert({str(directory)!r})"
    assert "pip install 'keras-mha[convert]'" in run_without("safetensors", program)


def test_jax_without_tensorflow(directory: Path) -> None:
    pytest.importorskip("jax", reason="JAX is not installed: the extra `backends`")
    program = (
        "import numpy as np, keras_mha\n"
        "from keras_mha.convert import load_bert\n"
        "ids = np.array([[3, 4, 5, 0]])\n"
        f"encoder = load_bert({str(directory)!r})\n"
        "outputs = encoder({'input_ids': ids, 'attention_mask': ids != 0})\n"
        "print(np.abs(np.asarray(outputs)).sum())\n"
    )
    ids = np.array([[3, 4, 5, 0]])
    expected = load_bert(directory)({"input_ids": ids, "attention_mask": ids != 0})
    printed = run_without("tensorflow", program, KERAS_BACKEND="jax")
    np.testing.assert_allclose(
        float(printed.split()[-1]), np.abs(expected).sum(), rtol=1e-5
    )
