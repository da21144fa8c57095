"""`BertEncoder` beside the model of `transformers`, on the real checkpoint."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keras_mha.convert import load_bert, save_bert
from tests.support.checkpoints import write_checkpoint

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "sentiment"

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
torch: Any = pytest.importorskip("torch", reason="needs the extra `transformers`")
transformers: Any = pytest.importorskip(
    "transformers", reason="needs the extra `transformers`"
)

SENTENCES = [
    "The rock is destined to be the 21st century's new Conan.",
    "Dull.",
    "",
    "A sometimes tedious film, although it is not without its small pleasures, among "
    "them two performances that deserve a better script and a shorter running time.",
    "simplistic, silly and tedious",
]


@pytest.fixture(scope="module")
def checkpoint() -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLE))
        for name in ("checkpoint", "download"):
            patch.delitem(sys.modules, name, raising=False)
        yield importlib.import_module("checkpoint").load_checkpoint()


def states(model: Any, inputs: dict[str, np.ndarray]) -> tuple[list[np.ndarray], Any]:
    """Their embeddings' and layers' outputs, and what their pooler made."""
    tensors = {name: torch.tensor(array) for name, array in inputs.items()}
    with torch.no_grad():
        outputs = model.eval()(**tensors, output_hidden_states=True)
    hidden = [state.numpy() for state in outputs.hidden_states]
    return hidden, outputs.pooler_output.numpy()


def check(directory: Path, inputs: dict[str, np.ndarray], tolerance: float) -> None:
    theirs = transformers.BertModel.from_pretrained(directory)
    expected, expected_pooled = states(theirs, inputs)
    encoder = load_bert(directory, pooler=True)
    seen = inputs["attention_mask"] == 1
    assert 0 < seen.mean() < 1
    found = [encoder.embed(inputs)]
    for block in encoder.blocks:
        found.append(block(found[-1], mask=inputs["attention_mask"]))
    for layer, (ours, wanted) in enumerate(zip(found, expected, strict=True)):
        difference = np.abs(np.asarray(ours) - wanted)[seen].max()
        assert difference < tolerance, f"layer {layer}"
    last, pooled = encoder(inputs)
    np.testing.assert_allclose(
        np.asarray(last)[seen], expected[-1][seen], atol=tolerance
    )
    np.testing.assert_allclose(pooled, expected_pooled, atol=tolerance)


def test_real_sentences(checkpoint: Path) -> None:
    tokenizer = transformers.BertTokenizerFast.from_pretrained(checkpoint)
    batch = dict(tokenizer(SENTENCES, padding=True, return_tensors="np"))
    assert len(set(batch["attention_mask"].sum(1))) > 3
    check(checkpoint, batch, 1e-4)


def test_pairs_of_sentences(checkpoint: Path) -> None:
    tokenizer = transformers.BertTokenizerFast.from_pretrained(checkpoint)
    pairs = list(zip(SENTENCES, SENTENCES[::-1], strict=True))
    batch = dict(tokenizer(pairs, padding=True, return_tensors="np"))
    assert {0, 1} == {*np.unique(batch["token_type_ids"])}
    check(checkpoint, batch, 1e-4)


def test_transformers_reads_what_is_written(checkpoint: Path, tmp_path: Path) -> None:
    encoder = load_bert(checkpoint, pooler=True)
    save_bert(encoder, tmp_path)
    before = transformers.BertModel.from_pretrained(checkpoint).state_dict()
    model, loading = transformers.BertModel.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(loading.values()), loading
    after = model.state_dict()
    assert sorted(before) == sorted(after)
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name].numpy(), tensor.numpy(), name)


def test_a_tiny_model_that_transformers_wrote(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=31,
        hidden_size=15,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=17,
        max_position_embeddings=13,
        hidden_act="gelu_new",
    )
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path)
    encoder = load_bert(tmp_path)
    assert any(name.startswith("cls.") for name in encoder.left_out)
    ids = np.random.default_rng(0).integers(1, 31, (3, 7))
    mask = np.arange(7) < np.array([[7], [3], [1]])
    inputs = {"input_ids": ids, "attention_mask": mask.astype("int64")}
    theirs = transformers.BertForMaskedLM.from_pretrained(tmp_path).bert
    with torch.no_grad():
        expected = theirs.eval()(
            **{name: torch.tensor(array) for name, array in inputs.items()}
        ).last_hidden_state.numpy()
    found = np.asarray(encoder(inputs))
    np.testing.assert_allclose(found[mask], expected[mask], atol=1e-5)


def test_the_tiny_checkpoint_of_the_other_tests(tmp_path: Path) -> None:
    # Their NumPy model is as good as this.
    ids = np.random.default_rng(0).integers(1, 31, (3, 7))
    mask = np.arange(7) < np.array([[7], [3], [1]])
    inputs = {"input_ids": ids, "attention_mask": mask.astype("int64")}
    check(write_checkpoint(tmp_path), inputs, 1e-4)
