"""Blockwise attention on `keras.ops`, in blocks so small that there are several.

The contract suite holds it to the oracle at its own block sizes, and TensorFlow's
kernels with it. Here each call goes through the loops, whatever the backend.
"""

from __future__ import annotations

import itertools
import re
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from keras import backend, ops

from keras_mha.attention import reference
from keras_mha.attention.bias import Bias
from keras_mha.attention.dispatch import IMPLEMENTATIONS
from keras_mha.attention.dropout import as_seed
from keras_mha.attention.mask_parts import MaskParts, materialize
from tests.support.attention_cases import (
    BACKEND,
    CASES,
    FACTORS,
    KEY_PADDING,
    MODES,
    QUERY_PADDING,
    WIDEST,
    Case,
    MaskWords,
    S,
    T,
    arrays_of,
    cast,
    check_close,
    combine,
    draw,
    expect,
    heads,
    numbers,
    run,
    sample_pairwise,
    upstream_of,
    value_and_gradients,
)

# The very module that the public function calls: pytest imports a file of which it
# runs the doctests once more.
blockwise: Any = IMPLEMENTATIONS["blockwise"]
loops: Any = blockwise.loops
Blocks, attend_in_loops = loops.Blocks, loops.attend
POISON = (np.nan, np.inf, -np.inf, 6e4)
TOLERANCE = {"float64": 1e-12, "float32": 2e-6, "float16": 2e-3, "bfloat16": 1e-2}
COMBINATIONS = sample_pairwise(
    {
        **FACTORS,
        "return_scores": (False,),
        "dtype": (WIDEST,),
        "mode": ("eager",),
        "blocks": (Blocks(1, 4, 5), Blocks(2, 3, 4), Blocks(1, 16, 3)),
    },
    seed=2,
)
# T, S and the axes of the bias repeated are such that neither blocks nor lengths agree.
EVERYTHING = Case(
    MaskWords(
        QUERY_PADDING,
        KEY_PADDING,
        is_causal=True,
        sliding_window=9,
        offset=2,
        query_segments=np.arange(T, dtype="int32")[None] // 6,
        key_segments=np.arange(S, dtype="int32")[None] // 6,
    ),
    heads=(12, 3),
    bias=(1, 12, 1, S),
    sinks=True,
    logits_soft_cap=1.5,
    dropout=0.3,
)


@pytest.fixture
def in_blocks(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Sends the calls of "blockwise" through the loops, in blocks of some sizes."""

    def choose(blocks: Any) -> None:
        def attend(*tensors: Any, **options: Any) -> Any:
            del options["keys_are_finite"]  # a promise to the reference
            return attend_in_loops(*tensors, **options, blocks=blocks), None

        monkeypatch.setattr(blockwise, "attend", attend)

    return choose


def check(case: Case, dtype: str, mode: str) -> None:
    arrays = arrays_of(case, POISON)
    tensors = dict(zip(arrays, cast(list(arrays.values()), dtype), strict=True))
    # From the rounded numbers: what is left is the implementation's own error.
    upstream = [numbers(x) for x in cast(upstream_of(case), dtype)]
    rounded = {name: numbers(x) for name, x in tensors.items()}
    (output,), gradients = expect(case, rounded, upstream)
    (found,), slopes = run(case, "blockwise", tensors, upstream, mode)
    tolerance = TOLERANCE[dtype]
    if dtype != "float64" and case.size > 1:
        # What float32 cannot tell of scores some times their deviation in size.
        tolerance += 5e-7 * case.size**2 * case.head_size**0.5
    check_close(found, output, tolerance)
    assert slopes.keys() == gradients.keys()
    for name, gradient in gradients.items():
        check_close(slopes[name], gradient, tolerance)


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if not c.return_scores])
def test_each_option_alone(in_blocks: Any, name: str) -> None:
    in_blocks(Blocks(1, 4, 5))
    check(CASES[name], WIDEST, "eager")


@pytest.mark.parametrize("number", range(len(COMBINATIONS)))
def test_options_together(in_blocks: Any, number: int) -> None:
    levels = dict(COMBINATIONS[number])
    in_blocks(levels.pop("blocks"))
    check(combine(levels), WIDEST, "eager")


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("bias", ["pairs", "distances"])
def test_everything_compiled(in_blocks: Any, mode: str, bias: str) -> None:
    case = EVERYTHING
    if bias == "distances":
        case = case._replace(bias=None, distances=12)
    in_blocks(Blocks(1, 4, 5))
    check(case, "float32", mode)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["padding", "dropout", "bias BNTS", "large logits"])
def test_16_bits(in_blocks: Any, name: str, dtype: str) -> None:
    in_blocks(Blocks(1, 4, 5))
    case = CASES[name]
    check(case, dtype, "eager")
    output = attend_in_loops(*cast(heads(), dtype), MaskParts(), Bias(), scale=0.5)
    assert backend.standardize_dtype(output.dtype) == dtype


@pytest.mark.parametrize("part", ["key", "value", "query", "bias", "sinks"])
def test_the_comparison_fails_for_a_wrong_gradient(
    in_blocks: Any, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    in_blocks(Blocks(1, 4, 5))
    right = loops._backward

    def wrong(*arguments: Any) -> Any:
        found = right(*arguments)
        if part in ("bias", "sinks"):
            field = "pairs" if part == "bias" else part
            altered = getattr(found.bias, field) * 1.001
            return found._replace(bias=found.bias._replace(**{field: altered}))
        return found._replace(**{part: getattr(found, part) * 1.001})

    monkeypatch.setattr(loops, "_backward", wrong)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check(Case(bias=(T, S), sinks=True), "float32", "eager")


def test_rows_that_see_nothing(in_blocks: Any) -> None:
    """Zeros and no gradient, even where the upstream gradient is not a number."""
    in_blocks(Blocks(1, 4, 5))
    case = Case(MaskWords(key_padding=np.array([0, 9], "int32")), sinks=True)
    arrays, (upstream,) = arrays_of(case), upstream_of(case)
    for array in (arrays["query"], arrays["key"], arrays["value"], upstream):
        array[0] = np.nan
    tensors = dict(zip(arrays, cast(list(arrays.values()), "float32"), strict=True))
    (found,), gradients = run(case, "blockwise", tensors, [upstream])
    assert np.all(found[0] == 0)
    assert np.all(np.isfinite(gradients.pop("sinks")))
    for gradient in gradients.values():
        assert np.all(gradient[0] == 0)
        assert np.all(np.isfinite(gradient[1]))
        assert np.any(gradient[1] != 0)


SEGMENTS = np.arange(40, dtype="int32")[None] // 10
SPARSE = {
    "causal": MaskParts(upper=0),
    "window": MaskParts(lower=-4, upper=4),
    "causal window after a cache": MaskParts(lower=-1, upper=3),
    "segments": MaskParts(query_segments=SEGMENTS, key_segments=SEGMENTS),
}


@pytest.mark.parametrize("name", SPARSE)
def test_blocks_ruled_out_are_never_read(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Hidden values are not cleared here, so that reading one NaN shows.

    A hidden one in a block that also holds visible ones shows; the others do not.
    """
    monkeypatch.setattr(loops.layout, "clear_unseen", lambda x, *_: x)
    blocks, length, mask = Blocks(1, 10, 10), 40, SPARSE[name]
    arrays = [draw(1, length, 1, 3, seed=seed) for seed in range(3)]
    table = ops.convert_to_numpy(materialize(mask, length, length))[0, 0]

    def finite(rows: slice, hidden: np.ndarray) -> tuple[bool, bool]:
        """Whether the output of some queries is, and their gradient."""
        poisoned = [array.copy() for array in arrays]
        poisoned[1][:, hidden] = poisoned[2][:, hidden] = np.nan
        (output,), gradients = value_and_gradients(
            lambda *x: attend_in_loops(*x, mask, Bias(), scale=0.5, blocks=blocks)[
                :, rows
            ],
            cast(poisoned, "float32"),
            [np.ones((1, blocks.t, 1, 3))],
        )
        return (
            bool(np.isfinite(output).all()),
            bool(np.isfinite(gradients[0][:, rows]).all()),
        )

    skipped = read = 0
    for start in range(0, length, blocks.t):
        rows = slice(start, start + blocks.t)
        visible = table[rows].any(axis=0)
        far = np.repeat(~visible.reshape(-1, blocks.s).any(axis=1), blocks.s)
        near = ~visible & ~far
        skipped += far.any()
        read += near.any()
        assert finite(rows, far) == (True, True)
        assert not near.any() or finite(rows, near) == (False, False)
    assert skipped
    assert read or name in ("causal", "segments")  # which end with a block here


@pytest.mark.skipif(BACKEND != "tensorflow", reason="lengths are known elsewhere")
@pytest.mark.parametrize(
    "blocks", [pytest.param(None, marks=pytest.mark.slow), Blocks(1, 4, 5)], ids=str
)
def test_unknown_lengths_in_xla(blocks: Any) -> None:
    import tensorflow as tf

    def step(attend: Callable[..., Any], *arrays: Any) -> Any:
        *tensors, padding = arrays
        query, key, value, pairs, distances, sinks = tensors
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            output = attend(
                *(query, key, value),
                MaskParts(key_padding=padding, lower=-8, upper=0),
                Bias(pairs, distances, sinks),
                scale=0.5,
                dropout=0.2,
                seed=as_seed(3),
            )
            loss = tf.reduce_sum(output * tf.sin(output))
        return output, *tape.gradient(loss, tensors)

    four = [None] * 4
    shapes = [[None, None, 6, 3], [None, None, 3, 3], [None, None, 3, 2], four]
    compiled = tf.function(
        lambda *x: step(lambda *a, **k: attend_in_loops(*a, **k, blocks=blocks), *x),
        input_signature=[
            *(tf.TensorSpec(shape) for shape in [*shapes, [None, None], [6]]),
            tf.TensorSpec([None, None], tf.bool),
        ],
        jit_compile=True,
    )
    for batch, length, keys, bias in [
        (2, 11, 13, (2, 6, 11, 13)),
        (1, 1, 1, (1, 1, 1, 1)),
        (3, 7, 5, (1, 1, 7, 1)),
    ]:
        shapes = [(batch, length, 6, 3), (batch, keys, 3, 3), (batch, keys, 3, 2)]
        shapes += [bias, (6, length + keys - 1), (6,)]
        arrays = cast([draw(*x, seed=i) for i, x in enumerate(shapes)], "float32")
        padding = tf.constant(draw(batch, keys, seed=9) < 0.8)
        wanted = step(lambda *a, **k: reference.attend(*a, **k)[0], *arrays, padding)
        for one, other in zip(compiled(*arrays, padding), wanted, strict=True):
            check_close(numbers(one), numbers(other), 2e-6)


def largest_buffer(attend: Callable[..., Any], arrays: list[Any]) -> int:
    """Elements of the largest array in the compiled code of value and gradients."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        @tf.function(jit_compile=True)
        def step(*arrays: Any) -> Any:
            with tf.GradientTape() as tape:
                tape.watch(arrays)
                output = attend(*arrays)
            return output, tape.gradient(output, arrays)

        text = step.experimental_get_compiler_ir(*arrays)(stage="optimized_hlo")
    else:
        import jax  # pyright: ignore[reportMissingImports] - likewise

        def step(*arrays: Any) -> Any:
            output, pull = jax.vjp(attend, *arrays)
            return output, pull(output)

        text = jax.jit(step).lower(*arrays).compile().as_text()
    shapes = re.findall(r"\b[a-z]+\d*\[([\d,]+)\]", text)
    assert shapes
    return max(int(np.prod([int(n) for n in x.split(",")])) for x in set(shapes))


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "tensorflow", reason="these are TensorFlow's kernels")
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("offset", [-3, -1, 0, 2])
def test_the_edges_of_causal_blocks(
    monkeypatch: pytest.MonkeyPatch, offset: int, window: int | None
) -> None:
    """Blocks of one, two and four queries, before, across and past their keys."""
    from keras_mha.attention.blockwise import tiles_tensorflow

    monkeypatch.setattr(tiles_tensorflow, "_ROWS", 4)
    mask = MaskWords(is_causal=True, offset=offset, sliding_window=window).parts()
    for length, keys in itertools.product((2, 5, 6), (1, 3, 6)):
        arrays = cast([draw(1, n, 2, 3, seed=n) for n in (length, keys, keys)], WIDEST)
        found, expected = (
            value_and_gradients(
                lambda *heads, attend=attend: attend(*heads, mask, Bias(), scale=1.0)[
                    0
                ],
                arrays,
                [draw(1, length, 2, 3, seed=9).astype(WIDEST)],
                "graph" if keys % 2 else "eager",
            )
            for attend in (blockwise.attend, reference.attend)
        )
        for one, other in zip(found, expected, strict=True):
            for a, b in zip(one, other, strict=True):
                np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.skipif(BACKEND == "torch", reason="torch compiles nothing here")
def test_no_table_of_scores_stands_in_the_compiled_code() -> None:
    ids = ops.arange(1024, dtype="int32")[None] // 300
    options = {"scale": 0.5, "dropout": 0.2, "seed": as_seed(3)}
    mask = MaskParts(
        key_padding=ids < 3,
        lower=-499,
        upper=0,
        query_segments=ids,
        key_segments=ids,
    )

    def by(attend: Callable[..., Any]) -> Callable[..., Any]:
        return lambda query, key, value, distances, sinks: attend(
            query, key, value, mask, Bias(None, distances, sinks), **options
        )

    shapes = [(1, 1024, 2, 4)] * 3 + [(2, 2047), (2,)]
    arrays = cast([draw(*x, seed=i) for i, x in enumerate(shapes)], "float32")
    scores = 2 * 1024 * 1024
    blocks = Blocks(1, 64, 64)
    found = largest_buffer(
        by(lambda *a, **k: attend_in_loops(*a, **k, blocks=blocks)), arrays
    )
    assert found <= scores / 64
    assert largest_buffer(by(lambda *a, **k: reference.attend(*a, **k)[0]), arrays) >= (
        scores
    )


def test_blocks_fit_the_sizes() -> None:
    choose = loops._choose_blocks
    assert choose((6, 3, 300, 1024)) == Blocks(1, 152, 256)
    assert choose((6, 3, 5, 13)) == Blocks(6, 8, 16)
    assert choose((6, 3, 256, 256)) == Blocks(3, 256, 256)
    assert choose((6, 512, 256, 256)) == Blocks(1, 256, 256)
    assert choose((None, 3, None, 13)) == Blocks(1, 256, 16)


@pytest.mark.skipif(BACKEND != "torch", reason="others keep no output of their own")
def test_the_output_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    right, kept = loops._forward, []

    def forward(*arguments: Any) -> Any:
        found = right(*arguments)
        kept.append(weakref.ref(found[0]))
        return found

    monkeypatch.setattr(loops, "_forward", forward)
    arrays = [x.requires_grad_() for x in cast(heads(), "float32")]
    output = attend_in_loops(*arrays, MaskParts(), Bias(), scale=0.5)
    assert kept[-1]() is not None
    del output
    assert kept[-1]() is None
