"""One contract for every implementation: the oracle's values and gradients.

Each option alone, and a sample in which any two levels of any two options meet. What
an implementation does not serve is declared here and it must refuse it; where its
domain ends in numbers rather than options, `test_portable.py` stands at the edge.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pytest
from keras import backend, ops

from keras_mha.attention.blockwise import front as blockwise
from keras_mha.attention.dispatch import IMPLEMENTATIONS
from keras_mha.attention.fused import cudnn_jax as fused_jax
from tests.support.attention_cases import (
    BACKEND,
    CASES,
    FACTORS,
    MODES,
    Case,
    S,
    T,
    arrays_of,
    attention_of,
    cast,
    check_close,
    combine,
    expect,
    heads,
    numbers,
    padding_of,
    run,
    sample_pairwise,
    upstream_of,
    value_and_gradients,
    visible,
)

DTYPES = ("float32", "float16", "bfloat16")
FLOAT32_STEP = float(np.finfo("float32").eps)
BLOCK = 8


class Domain(NamedTuple):
    """What an implementation serves, and how exactly.

    Attributes:
        tolerance: Error of outputs and gradients by dtype, relative to the largest
            number of each, or to one. That of a float32 score of this size comes on
            top.
        refuses: What its error says of options that it refuses, by their names.
        padding: Numbers that may stand in padding.
        largest_score: What scaled scores must stay under.
        quick: The dtypes in which each option alone is tried in the default run, by
            mode; the slow run has the rest.
    """

    tolerance: Mapping[str, float]
    refuses: Mapping[str, str] = {}
    padding: tuple[float, ...] = (np.nan, np.inf, -np.inf, 6e4)
    largest_score: float = np.inf
    quick: Mapping[str, tuple[str, ...]] = {
        "eager": DTYPES,
        "graph": DTYPES,
        "xla": ("float32",),
        "jit": ("float32",),
    }

    def refusal(self, case: Case) -> str | None:
        """What its error says of a case, if it is to be refused."""
        texts = [text for name, text in self.refuses.items() if name in case.options]
        return texts[0] if texts else None

    @property
    def widest(self) -> str:
        """The first of `DTYPES` that it takes."""
        return next(dtype for dtype in DTYPES if dtype in self.tolerance)

    def dtype_refusal(self, dtype: str) -> str | None:
        """What its error says of a dtype, if it takes others only."""
        return None if dtype in self.tolerance else f"not {dtype}"


DOMAINS = {
    "reference": Domain({"float32": 2e-6, "float16": 2e-3, "bfloat16": 1e-2}),
    "blockwise": Domain(
        {"float32": 2e-6, "float16": 2e-3, "bfloat16": 1e-2},
        refuses={"return_scores": "computes no table of scores"},
        # Its loops take seconds to compile; options together compile in any case.
        quick={"eager": DTYPES, "graph": ("float32",)},
    ),
    "portable": Domain(
        {"float32": 2e-6, "float16": 5e-3, "bfloat16": 6e-2},
        refuses={"dropout": "is for inference and has no dropout"},
        padding=(30.0, -20.0),
        largest_score=5e3,
    ),
}
NO_MORE = "takes no soft cap, no bias and no sinks"
FUSED = Domain(
    {"float32": 2e-6, "float16": 5e-3, "bfloat16": 4e-2},
    refuses={
        "return_scores": "computes no table of scores",
        "dropout": "drops other positions",
        **dict.fromkeys(("logits_soft_cap", "bias", "distances", "sinks"), NO_MORE),
    },
)
if BACKEND == "torch":
    DOMAINS["fused"] = FUSED
elif BACKEND == "jax":
    narrow = {dtype: FUSED.tolerance[dtype] for dtype in ("float16", "bfloat16")}
    # cuDNN multiplies the probabilities in the dtype of the values.
    DOMAINS["fused"] = FUSED._replace(tolerance=narrow)
COMBINATIONS = sample_pairwise(FACTORS, seed=1)


def largest_score(case: Case) -> float:
    """The largest scaled score, before cap and bias."""
    query, key = list(arrays_of(case).values())[:2]
    key = np.repeat(key, case.heads[0] // case.heads[1], axis=2)
    scale = case.head_size**-0.5 if case.scale is None else case.scale
    return float(np.abs(scale * np.einsum("btnh,bsnh->bnts", query, key)).max())


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that the lengths fill more than once and do not divide."""
    monkeypatch.setattr(blockwise.loops, "_LONGEST", BLOCK)
    if BACKEND == "tensorflow":
        from keras_mha.attention.blockwise import tiles_tensorflow

        monkeypatch.setattr(tiles_tensorflow, "_TILE", BLOCK**2)
        monkeypatch.setattr(tiles_tensorflow, "_ROWS", BLOCK // 2)
        monkeypatch.setattr(tiles_tensorflow, "_FEWEST_ROWS", BLOCK // 2)
    if BACKEND == "jax" and fused_jax.largest_head_size() is None:
        # Where there is no GPU, all but the kernel is tried.
        monkeypatch.setattr(fused_jax, "largest_head_size", lambda: 128)
        monkeypatch.setattr(fused_jax, "_KERNEL", "xla")


@functools.cache
def _case(name: str | int) -> Case:
    return CASES[name] if isinstance(name, str) else combine(COMBINATIONS[name])


@functools.cache
def _problem(name: str | int, dtype: str, padding: tuple[float, ...]) -> Any:
    """Tensors, upstream gradients, and what the oracle makes of them."""
    case = _case(name)
    arrays = arrays_of(case, padding)
    tensors = dict(zip(arrays, cast(list(arrays.values()), dtype), strict=True))
    # From the rounded numbers: what is left is the implementation's own error.
    upstream = [numbers(x) for x in cast(upstream_of(case), dtype)]
    rounded = {name: numbers(x) for name, x in tensors.items()}
    return tensors, upstream, expect(case, rounded, upstream)


def _check(implementation: str, name: str | int, dtype: str, mode: str) -> None:
    domain, case = DOMAINS[implementation], _case(name)
    tensors, upstream, (outputs, gradients) = _problem(name, dtype, domain.padding)
    refusal = domain.dtype_refusal(dtype) or domain.refusal(case)
    if refusal is not None:
        with pytest.raises(ValueError, match=refusal):
            run(case, implementation, tensors, upstream, mode)
        return
    found = run(case, implementation, tensors, upstream, mode)
    tolerance = domain.tolerance[dtype] + FLOAT32_STEP * largest_score(case)
    for one, other in zip(found[0], outputs, strict=True):
        check_close(one, other, tolerance)
    assert found[1].keys() == gradients.keys()
    for array, other in gradients.items():
        check_close(found[1][array], other, tolerance)


def _alone() -> list[Any]:
    return [
        pytest.param(
            implementation,
            name,
            dtype,
            mode,
            marks=[] if dtype in domain.quick.get(mode, ()) else [pytest.mark.slow],
            id=f"{implementation}-{name}-{dtype}-{mode}",
        )
        for implementation, domain in DOMAINS.items()
        for name, dtype, mode in itertools.product(CASES, DTYPES, MODES)
        if largest_score(CASES[name]) < domain.largest_score
    ]


@pytest.mark.parametrize(("implementation", "name", "dtype", "mode"), _alone())
def test_each_option_alone(
    implementation: str, name: str, dtype: str, mode: str
) -> None:
    _check(implementation, name, dtype, mode)


@pytest.mark.parametrize("number", range(len(COMBINATIONS)))
@pytest.mark.parametrize("implementation", DOMAINS)
def test_options_together(implementation: str, number: int) -> None:
    levels = COMBINATIONS[number]
    _check(implementation, number, levels["dtype"], levels["mode"])


def test_any_two_levels_meet() -> None:
    for (one, ones), (other, others) in itertools.combinations(FACTORS.items(), 2):
        met = [(row[one], row[other]) for row in COMBINATIONS]
        for pair in itertools.product(ones, others):
            assert any(a is pair[0] and b is pair[1] for a, b in met)


def test_every_implementation_is_here() -> None:
    assert DOMAINS.keys() | {"fused"} == IMPLEMENTATIONS.keys()


@pytest.mark.skipif("fused" in DOMAINS, reason="here it serves calls")
def test_fused_says_what_it_needs() -> None:
    text = "`implementation='fused'` (needs the backend|is cuDNN on JAX).*these can"
    with pytest.raises(ValueError, match=text):
        attention_of(Case(), "fused", ["query", "key", "value"])(
            *cast(heads(Case()), "float32")
        )


def _options_that_count() -> list[Any]:
    return [
        pytest.param(name, option, id=f"{name}: {option}")
        for name, case in CASES.items()
        for option in sorted(
            case.options
            - {"heads", "lengths", "head_size", "size", "return_scores", "key_segments"}
        )
    ]


@pytest.mark.parametrize(("name", "option"), _options_that_count())
def test_the_comparison_fails_without_an_option(name: str, option: str) -> None:
    case = CASES[name]
    _, _, ((expected, *_), _) = _problem(name, "float32", ())
    without = case.without(option)
    arrays = arrays_of(without)
    tensors = dict(zip(arrays, cast(list(arrays.values()), "float32"), strict=True))
    (found, *_), _ = run(without, "reference", tensors, upstream_of(without))
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check_close(found, expected, DOMAINS["portable"].tolerance["bfloat16"])


@pytest.mark.parametrize("name", ["query", "key", "value", "bias", "sinks"])
def test_the_comparison_fails_for_a_wrong_gradient(name: str) -> None:
    case = Case(bias=(T, S), sinks=True)
    arrays = arrays_of(case)
    place = list(arrays).index(name)
    right = attention_of(case, "reference", list(arrays))

    def wrong(*tensors: Any) -> Any:
        """The same numbers, one gradient larger by a ten-thousandth."""
        moved = list(tensors)
        moved[place] = tensors[place] + 1e-4 * (
            tensors[place] - ops.stop_gradient(tensors[place])
        )
        return right(*moved)

    upstream = upstream_of(case)
    tensors = cast(list(arrays.values()), "float32")
    wanted = list(expect(case, arrays, upstream)[1].values())
    for function, fails in ((right, set()), (wrong, {place})):
        _, found = value_and_gradients(function, tensors, upstream)
        assert fails == {
            i
            for i, (one, other) in enumerate(zip(found, wanted, strict=True))
            if np.abs(one - other).max() > 1e-6 * max(1.0, np.abs(other).max())
        }


@pytest.mark.parametrize(
    ("implementation", "name"),
    [
        (implementation, name)
        for implementation, domain in DOMAINS.items()
        for name, case in CASES.items()
        if not visible(case).any(-1).all() and domain.refusal(case) is None
    ],
)
def test_a_query_that_sees_no_key_gives_zeros_and_no_gradient(
    implementation: str, name: str
) -> None:
    case, domain = CASES[name], DOMAINS[implementation]
    tensors, (upstream, *_), _ = _problem(name, domain.widest, domain.padding)
    empty = ~visible(case).any(axis=-1).transpose(0, 2, 1)  # (B, T, N)
    (found,), gradients = run(
        case, implementation, tensors, [upstream * empty[..., None]]
    )
    assert np.all(found[empty] == 0)
    for gradient in gradients.values():
        assert np.all(gradient == 0)


def test_padding_is_poisoned() -> None:
    for name in ("padding", "lengths", "segments"):
        case = CASES[name]
        arrays = arrays_of(case, DOMAINS["reference"].padding)
        rows, columns = padding_of(case)
        assert not rows.all() or not columns.all()
        for array, real in (("query", rows), ("key", columns), ("value", columns)):
            bad = np.isnan(arrays[array]).any(axis=(2, 3))
            np.testing.assert_array_equal(bad, ~real)


def test_blocks_do_not_divide_the_lengths() -> None:
    assert min(T, S) > BLOCK
    for case in CASES.values():
        assert all(length % BLOCK for length in case.lengths)


def test_large_logits_are_beyond_float16() -> None:
    case = CASES["large logits"]
    unscaled = largest_score(case) * case.head_size**0.5
    assert unscaled > float(np.finfo("float16").max)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("implementation", DOMAINS)
def test_the_dtype_is_the_querys(implementation: str, dtype: str) -> None:
    if DOMAINS[implementation].dtype_refusal(dtype) is not None:
        pytest.skip(f"it does not take {dtype}")
    for name in ("causal", "scores"):
        case = CASES[name]
        if DOMAINS[implementation].refusal(case) is not None:
            continue
        tensors, _, _ = _problem(name, dtype, ())
        found = attention_of(case, implementation, list(tensors))(*tensors.values())
        for output in found if case.return_scores else [found]:
            assert backend.standardize_dtype(output.dtype) == dtype


@pytest.mark.parametrize(
    ("implementation", "option"),
    [
        (name, option)
        for name, domain in DOMAINS.items()
        for option in sorted(domain.refuses.keys() & {"dropout", "return_scores"})
    ],
)
def test_a_refusal_names_those_that_can(implementation: str, option: str) -> None:
    case = Case(**{option: 0.5 if option == "dropout" else True})
    function = attention_of(case, implementation, ["query", "key", "value"])
    text = rf"`implementation='{implementation}'` .*; these can: \['reference'"
    with pytest.raises(ValueError, match=text):
        function(*cast(heads(case), DOMAINS[implementation].widest))
