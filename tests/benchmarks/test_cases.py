"""The table of cases fits the builders, and the builders compute the same."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import cases, gpu
from benchmarks.cases import SMOKE, Comparison, Entry, MemoryComparison
from benchmarks.contenders import graph, keras_stock, ours, reviews

CONTENDERS = Path(cases.__file__).parent / "contenders"


def comparisons() -> Iterator[Comparison | MemoryComparison]:
    for sizes in (cases.Sizes(), SMOKE):
        for group in cases.CASES.values():
            yield from group(sizes)
    for sizes in (gpu.Sizes(), gpu.SMOKE):
        for group in gpu.CASES.values():
            yield from group(sizes)


def builders() -> dict[str, ast.FunctionDef]:
    """Every function of the contenders, read and not imported."""
    return {
        f"{cases.CONTENDERS}.{path.stem}.{node.name}": node
        for path in CONTENDERS.glob("*.py")
        for node in ast.parse(path.read_text("utf-8")).body
        if isinstance(node, ast.FunctionDef)
    }


def test_every_entry_has_a_builder_that_takes_its_settings() -> None:
    known = builders()
    for comparison in comparisons():
        for entry in comparison.entries:
            arguments = known[entry.builder].args
            names = [a.arg for a in (*arguments.args, *arguments.kwonlyargs)]
            optional = [
                *arguments.args[len(arguments.args) - len(arguments.defaults) :],
                *(
                    argument
                    for argument, default in zip(
                        arguments.kwonlyargs, arguments.kw_defaults, strict=True
                    )
                    if default is not None
                ),
            ]
            settings = set(entry.settings)
            if isinstance(comparison, MemoryComparison):
                settings.add("shape")
            assert settings <= set(names), entry
            assert set(names) - {a.arg for a in optional} <= settings, entry


def test_every_comparison_starts_with_ours_and_names_each_contender_once() -> None:
    for comparison in comparisons():
        labels = [entry.label for entry in comparison.entries]
        assert labels[0].startswith("keras_mha")
        assert len(set(labels)) == len(labels)


def test_titles_tell_comparisons_apart() -> None:
    titles = [c.title for g in cases.CASES.values() for c in g(cases.Sizes())]
    assert len(set(titles)) == len(titles)


def test_rivals_name_the_package_they_need() -> None:
    found = {
        entry.builder.split(".")[2]: entry.package
        for comparison in comparisons()
        for entry in comparison.entries
    }
    assert found["pytorch"] == "torch"
    assert found["kerashub"] == "keras_hub"
    assert found["jax_stock"] == "jax"
    assert found["onnx_files"] == "onnxruntime"
    assert found["ours"] is None


def test_operations_are_those_counted_by_hand() -> None:
    # Two products of 5 x 5 x 7, each 2 operations an element, for 2 * 3 heads.
    assert cases.attention_operations(2, 3, 5, 7, backward=False) == 2 * 3 * 2 * 350
    assert cases.attention_operations(2, 3, 5, 7, backward=True) == 3.5 * 4200
    # Four products of 5 x 21 x 21 for two sequences.
    projections = 2 * 4 * 2 * 5 * 21 * 21
    assert cases.layer_operations(2, 5, 21, 3, backward=False) == 4200 + projections
    assert cases.layer_operations(2, 5, 21, 3, backward=True) == 14700 + 3 * projections


# The contenders.

SHAPE = (2, 3, 11, 5)


def result(step: Any) -> list[np.ndarray]:
    """What a step of the core gives, in the layout `(B, T, N, H)`."""
    found = step.call()
    if isinstance(found, tuple) and len(found) == 2:
        found = found[1]
    leaves = found if isinstance(found, tuple) else (found,)
    return [np.asarray(leaf) for leaf in leaves]


@pytest.mark.parametrize("compiled", [False, True], ids=["graph", "XLA"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_ours_and_keras_compute_the_same(
    compiled: bool, backward: bool, is_causal: bool
) -> None:
    settings = {"compiled": compiled, "backward": backward, "is_causal": is_causal}
    wanted = result(keras_stock.attention(SHAPE, **settings))
    found = result(ours.attention(SHAPE, **settings))
    assert len(found) == (3 if backward else 1)
    for ours_, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours_, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changed", [{}, {"is_causal": True}, {"sliding_window": 3}])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_ours_and_torch_compute_the_same(
    backward: bool, changed: dict[str, Any]
) -> None:
    pytest.importorskip("torch")
    from benchmarks.contenders import pytorch

    found = result(ours.attention(SHAPE, backward=backward, compiled=False, **changed))
    rival = pytorch.attention(SHAPE, backward=backward, **changed).call()
    wanted = rival if backward else (rival,)
    for ours_, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(
            ours_, theirs.transpose(1, 2).numpy(), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("compiled", [False, True], ids=["graph", "XLA"])
@pytest.mark.parametrize(
    ("build", "settings"),
    [(ours.decoding_layer, {}), (ours.decoder_block, {"hidden_dim": 24})],
    ids=["layer", "block"],
)
def test_a_decoding_step_gives_what_recomputing_gives(
    build: Any, settings: dict[str, Any], compiled: bool
) -> None:
    import keras

    def last(position: int | None) -> np.ndarray:
        keras.utils.set_random_seed(3)
        step = build((1, 7, 16), 2, compiled=compiled, position=position, **settings)
        found = step.call()
        return np.asarray(found[0] if isinstance(found, tuple) else found)

    np.testing.assert_allclose(last(6), last(None), rtol=1e-4, atol=1e-5)


def made_up_reviews() -> list[np.ndarray]:
    lengths = np.random.default_rng(0).integers(1, 40, 50)
    return reviews.draw_reviews(lengths, 30, 24)


def test_reviews_are_cut_and_drawn_alike_each_time() -> None:
    drawn = made_up_reviews()
    assert max(map(len, drawn)) == 24
    assert min(review.min() for review in drawn) > 0
    for one, other in zip(drawn, made_up_reviews(), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("how", ["padded", "bucketed", "packed"])
def test_every_arrangement_has_the_same_tokens(how: str) -> None:
    drawn = made_up_reviews()
    batches = reviews.arrange(how, drawn, 10, 24)
    assert len(batches) == 3
    tokens = np.concatenate([batch[0].ravel() for batch in batches])
    np.testing.assert_array_equal(
        np.sort(tokens[tokens != 0]), np.sort(np.concatenate(drawn))
    )


def test_bucketing_and_packing_leave_less_padding() -> None:
    sizes = {
        how: sum(b[0].size for b in reviews.arrange(how, made_up_reviews(), 10, 24))
        for how in ("padded", "bucketed", "packed")
    }
    assert sizes["bucketed"] < sizes["padded"]
    assert sizes["packed"] < sizes["padded"]


@pytest.mark.parametrize("how", ["padded", "packed"])
def test_a_training_step_on_reviews_changes_the_weights(how: str) -> None:
    encoder = reviews.Encoder(16, 2)
    batches = reviews.arrange(how, made_up_reviews(), 10, 24)
    step = graph.of_batches(encoder, batches, 16)
    before = [weight.numpy() for weight in encoder.trainable_variables]
    losses = step.call()
    assert len(losses) == step.parts == 3
    assert np.isfinite(losses).all()
    changed = [
        not np.array_equal(old, new.numpy())
        for old, new in zip(before, encoder.trainable_variables, strict=True)
    ]
    assert np.mean(changed) > 0.8


@pytest.mark.parametrize("jit_compile", ["auto", False, True])
def test_an_encoder_block_trains_in_every_mode(jit_compile: Any) -> None:
    step = ours.encoder_block((2, 5, 16), 2, 24, jit_compile=jit_compile)
    first, second = float(step.call()), float(step.call())
    assert second < first


def every_entry(case: str) -> list[Entry]:
    return [e for c in cases.CASES[case](SMOKE) for e in c.entries]


@pytest.mark.parametrize(
    "entry", every_entry("layer"), ids=lambda entry: f"{entry.label}"
)
def test_layers_run(entry: Entry) -> None:
    if entry.package:
        pytest.importorskip(entry.package)
    from benchmarks import worker

    assert worker.timed(worker.build(entry.builder, entry.settings), 1) > 0
