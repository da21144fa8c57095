"""The reference implementation beyond the contract, and the oracle that it meets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from keras_mha.attention.bias import Bias
from keras_mha.attention.dropout import as_seed
from keras_mha.attention.mask_parts import NOTHING, MaskParts
from keras_mha.attention.reference import attend
from tests.support import reference as oracle
from tests.support.attention_cases import (
    CASES,
    WIDEST,
    B,
    Case,
    H,
    MaskWords,
    N,
    S,
    T,
    V,
    arrays_of,
    cast,
    check_close,
    check_slopes,
    draw,
    expect,
    heads,
    numbers,
    pairs,
    run,
    upstream_of,
    value_and_gradients,
    visible,
)

needs_float64 = pytest.mark.skipif(
    WIDEST != "float64", reason="float64 is TensorFlow's alone"
)
EVERYTHING = Case(
    MaskWords(pairs=pairs(B, 12, T, S), is_causal=True, offset=4),
    heads=(12, 3),
    bias=(B, 1, T, S),
    distances=12,
    sinks=True,
    scale=0.7,
    logits_soft_cap=1.5,
    dropout=0.3,
    return_scores=True,
)


def mix(*arrays: Any, mask: MaskParts = NOTHING, **more: Any) -> Any:
    """Values mixed, without any of the other options."""
    return attend(*arrays, mask, Bias(), scale=H**-0.5, **more)


@pytest.mark.parametrize("shape", [(T, S), (B, T, S), (B, 12, T, S), (1, 12, 1, S)])
@pytest.mark.parametrize("shared", [False, True], ids=["heads", "shared"])
def test_the_oracles_gradients_are_its_slopes(
    shape: tuple[int, ...], shared: bool
) -> None:
    """The oracle is held to central differences, with every option at once."""
    case = EVERYTHING._replace(bias=shape, distances=1 if shared else 12)
    arrays, upstream = arrays_of(case), upstream_of(case)
    _, gradients = expect(case, arrays, upstream)
    assert gradients.keys() == set(oracle.Gradients._fields)

    def loss(*moved: np.ndarray) -> np.ndarray:
        outputs, _ = expect(case, dict(zip(arrays, moved, strict=True)), upstream)
        return np.concatenate(
            [(x * up).ravel() for x, up in zip(outputs, upstream, strict=True)]
        )

    found = [gradients[name] for name in arrays]
    assert [x.shape for x in found] == [x.shape for x in arrays.values()]
    check_slopes(found, loss, list(arrays.values()), np.ones(1))
    found[2] = 1.001 * found[2]
    with pytest.raises(AssertionError):
        check_slopes(found, loss, list(arrays.values()), np.ones(1))


@needs_float64
@pytest.mark.parametrize("name", CASES)
def test_float64_is_exact(name: str) -> None:
    case = CASES[name]
    arrays, upstream = arrays_of(case), upstream_of(case)
    tensors = dict(zip(arrays, cast(list(arrays.values()), "float64"), strict=True))
    outputs, gradients = run(case, "reference", tensors, upstream)
    expected = expect(case, arrays, upstream)
    for one, other in zip(outputs, expected[0], strict=True):
        check_close(one, other, 1e-11 if name == "large logits" else 1e-13)
    for array, other in expected[1].items():
        check_close(gradients[array], other, 1e-11)


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize(
    "mask",
    [
        MaskWords(is_causal=True, offset=-3),
        MaskWords(sliding_window=2, offset=4),
        MaskWords(pairs=pairs(B, N, T, S) & (np.arange(S) % 3 > 0)),
        MaskWords(pairs=pairs(B, 1, T, S) & (draw(B, N, 1, S) > 0)),
    ],
    ids=["causal", "window", "pairs", "pairs by head"],
)
def test_poison_where_nobody_looks_is_harmless(poison: float, mask: MaskWords) -> None:
    """In keys that no query sees and queries that see none, not in padding alone."""
    case = Case(mask)
    arrays, shown = arrays_of(case), visible(case)
    unseen = ~shown.any(axis=2).transpose(0, 2, 1)  # (B, S, N)
    blind = ~shown.any(axis=3).transpose(0, 2, 1)  # (B, T, N)
    assert unseen.any() or blind.any()
    for name, hidden in (("query", blind), ("key", unseen), ("value", unseen)):
        arrays[name][hidden] = poison
    tensors = dict(zip(arrays, cast(list(arrays.values()), "float32"), strict=True))
    upstream = upstream_of(case)
    (found,), gradients = run(case, "reference", tensors, upstream)
    (expected,), slopes = expect(case, arrays_of(case), upstream)
    check_close(found, expected, 1e-6)
    for name, slope in slopes.items():
        check_close(gradients[name], slope, 1e-6)


def test_longer_padding_changes_nothing() -> None:
    arrays, padding = heads(), CASES["padding"].mask
    short, _ = mix(*cast(arrays, WIDEST), mask=_as_tensors(*padding[:2]))
    longer = [
        np.pad(x, ((0, 0), (0, 4), (0, 0), (0, 0)), constant_values=9.0) for x in arrays
    ]
    paddings = [np.pad(x, ((0, 0), (0, 4))) for x in padding[:2]]
    long, _ = mix(*cast(longer, WIDEST), mask=_as_tensors(*paddings))
    np.testing.assert_allclose(numbers(long)[:, :T], numbers(short), atol=1e-6)
    assert np.all(numbers(long)[:, T:] == 0)


def _as_tensors(*paddings: Any) -> MaskParts:
    return MaskParts(*cast(paddings, "bool"))


def test_probabilities_are_those_before_dropout() -> None:
    arrays, seed = cast(heads(), "float32"), as_seed(3)
    plain, scores = mix(*arrays)
    dropped, same = mix(*arrays, dropout=0.5, seed=seed)
    np.testing.assert_array_equal(numbers(same), numbers(scores))
    assert np.abs(numbers(dropped) - numbers(plain)).max() > 0.1


def test_dropped_probabilities_mix_the_values() -> None:
    query, key, value = cast(heads(), "float32")
    # With unit vectors for values, the output is the dropped probabilities.
    (unit,) = cast([np.broadcast_to(np.eye(S)[None, :, None], (B, S, N, S))], "float32")
    kept, scores = mix(query, key, unit, dropout=0.5, seed=as_seed(3))
    ratio = numbers(kept).transpose(0, 2, 1, 3) / numbers(scores)
    assert np.all(np.isclose(ratio, 0) | np.isclose(ratio, 2))
    assert 0.4 < np.isclose(ratio, 0).mean() < 0.6
    expected = np.einsum("btns,bsnv->btnv", numbers(kept), numbers(value))
    found, _ = mix(query, key, value, dropout=0.5, seed=as_seed(3))
    np.testing.assert_allclose(numbers(found), expected, atol=1e-5)


def test_worked_example() -> None:
    # One head of size 4, so queries are halved; scores 0 and log 3: weights 1/4, 3/4.
    query = np.array([2.0, 0, 0, 0]).reshape(1, 1, 1, 4)
    key = np.array([[0.0] * 4, [np.log(3), 0, 0, 0]]).reshape(1, 2, 1, 4)
    value = np.array([8.0, 16.0]).reshape(1, 2, 1, 1)
    arrays = cast([query, key, value], "float32")
    found, scores = attend(*arrays, NOTHING, Bias(), scale=0.5)
    np.testing.assert_allclose(numbers(scores).ravel(), [0.25, 0.75], rtol=1e-6)
    np.testing.assert_allclose(numbers(found).ravel(), [14.0], rtol=1e-6)
    # The oracle is held to the same figures.
    np.testing.assert_allclose(oracle.attend(query, key, value)[0].ravel(), [14.0])
    # A sink of log 4 doubles the sum of 1 + 3, so it halves the weights.
    (sink,) = cast([np.log([4.0])], "float32")
    _, halved = attend(*arrays, NOTHING, Bias(sinks=sink), scale=0.5)
    np.testing.assert_allclose(numbers(halved).ravel(), [0.125, 0.375], rtol=1e-6)
    _, expected = oracle.attend(query, key, value, sinks=np.log([4.0]))
    np.testing.assert_allclose(expected.ravel(), [0.125, 0.375])


def test_groups_read_their_heads_in_order() -> None:
    case = CASES["grouped"]
    query, key, value = heads(case)
    each = [np.repeat(x, 4, axis=2) for x in (key, value)]
    found, _ = mix(*cast([query, key, value], "float32"))
    expected, _ = mix(*cast([query, *each], "float32"))
    np.testing.assert_allclose(numbers(found), numbers(expected), atol=1e-6)
    np.testing.assert_allclose(
        oracle.attend(query, key, value)[0], oracle.attend(query, *each)[0], atol=1e-14
    )


def test_scores_are_stored_in_the_dtype_and_no_narrower() -> None:
    """Softmax in float32: near keys keep their order, which 16-bit scores lose."""
    query, key, value = heads()
    query[:], key[:] = 16.0, 16.0
    key[:, 1:] += 0.125  # exact in bfloat16; the scores are one part in 128 apart
    arrays = cast([query, key, value], "bfloat16")
    _, scores = mix(*arrays)
    _, expected = oracle.attend(*map(numbers, arrays))
    np.testing.assert_allclose(numbers(scores), expected, atol=2e-3)
    assert expected[0, 0, 0, 0] < 0.1 * expected[0, 0, 0, 1]


def test_upstream_of_no_weight_gives_no_gradient() -> None:
    _, gradients = value_and_gradients(
        lambda *x: mix(*x)[0], cast(heads(), "float32"), [np.zeros((B, T, N, V))]
    )
    for gradient in gradients:
        assert np.all(gradient == 0)
