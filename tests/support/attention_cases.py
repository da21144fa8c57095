"""What every implementation of attention is compared on, and how.

A case is one combination of options. The same NumPy arrays go to an implementation,
by the public function, and to the oracle.

Letters: B batch, T query length, S key length, N query heads, K key/value heads, H
head size of queries and keys, V head size of values.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops
from typing_extensions import override

from keras_mha import dot_product_attention
from keras_mha.attention.dropout import as_seed, draw_pair_noise, keep_pairs
from keras_mha.attention.mask_parts import MaskParts
from keras_mha.attention.masks import Mask
from tests.support import reference as oracle

BACKEND = keras.config.backend()
MODES: tuple[str, ...] = {
    "tensorflow": ("eager", "graph", "xla"),
    "jax": ("eager", "jit"),
    "torch": ("eager",),
}[BACKEND]
# JAX has float64 only where it is switched on; on torch, Keras multiplies in float32.
WIDEST = "float64" if BACKEND == "tensorflow" else "float32"

B, T, S, N, K, H, V = 2, 11, 13, 3, 3, 5, 7
SEED = 11


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def pairs(*shape: int, seed: int = 4) -> np.ndarray:
    """A random mask that hides about half, never a whole row."""
    visible = np.random.default_rng(seed).random(shape) < 0.5
    visible[..., 0] |= ~visible.any(axis=-1)
    return visible


def _without_rows(visible: np.ndarray) -> np.ndarray:
    visible[0, 1, 2] = visible[1, 0, 0] = visible[1, :, 4] = False
    return visible


QUERY_PADDING = np.random.default_rng(5).random((B, T)) < 0.6
KEY_PADDING = np.random.default_rng(6).random((B, S)) < 0.6
QUERY_SEGMENTS = np.repeat([[0, 1, 2], [5, 3, -1]], [3, 6, 2], axis=1).astype("int32")
KEY_SEGMENTS = np.repeat([[1, 0, 7, 2], [3, 3, -1, 5]], [4, 3, 5, 1], axis=1).astype(
    "int32"
)


class MaskWords(NamedTuple):
    """What hides pairs, in the oracle's words; see `reference.visible_pairs`."""

    query_padding: Any = None
    key_padding: Any = None
    pairs: Any = None
    is_causal: bool = False
    sliding_window: int | None = None
    query_segments: Any = None
    key_segments: Any = None
    offset: Any = 0

    def parts(self) -> MaskParts:
        """The same in the words of the implementations."""
        beyond = None if self.sliding_window is None else self.sliding_window - 1
        upper = self.offset if self.is_causal else None
        if beyond is not None and not self.is_causal:
            upper = self.offset + beyond
        return MaskParts(
            self.query_padding,
            self.key_padding,
            self.pairs,
            None if beyond is None else self.offset - beyond,
            upper,
            self.query_segments,
            self.key_segments,
        )

    def value(self) -> Mask:
        """The same as a mask value."""
        return _GivenMask(self.parts())


class _GivenMask(Mask):
    """Of any parts, boolean paddings too, which layers alone make otherwise."""

    def __init__(self, parts: MaskParts) -> None:
        self.given = parts

    @override
    def take_apart(self) -> MaskParts:
        return self.given

    @override
    def visible(self, queries: Any, keys: Any) -> Any:
        raise NotImplementedError


class Case(NamedTuple):
    """One combination of options; the defaults leave each of them out.

    Attributes:
        mask: With NumPy arrays for tensors.
        heads: N and K.
        lengths: T and S.
        head_size: H.
        size: Standard deviation of queries and keys.
        bias: Shape of the additive tensor.
        distances: Heads of a table of biases for distances, given as a callable.
        sinks: Whether there are any.
        scale: Factor of the scores.
        logits_soft_cap: Bound of the scores.
        dropout: Share of the probabilities to drop.
        return_scores: Whether the probabilities are wanted.
    """

    mask: MaskWords = MaskWords()
    heads: tuple[int, int] = (N, K)
    lengths: tuple[int, int] = (T, S)
    head_size: int = H
    size: float = 1.0
    bias: tuple[int, ...] | None = None
    distances: int | None = None
    sinks: bool = False
    scale: float | None = None
    logits_soft_cap: float | None = None
    dropout: float = 0.0
    return_scores: bool = False

    @property
    def options(self) -> set[str]:
        """The names of the options in use, the mask's by its fields."""
        return {
            name
            for of, default in ((self, Case()), (self.mask, MaskWords()))
            for name, field in of._asdict().items()
            if field is not default._asdict()[name] and name != "mask"
        }

    @property
    def pair_shape(self) -> tuple[int, int, int, int]:
        """`(B, N, T, S)`."""
        return B, self.heads[0], *self.lengths

    def without(self, option: str) -> Case:
        """The same with one option at its default."""
        if option in MaskWords._fields:
            segments = dict.fromkeys(("query_segments", "key_segments"))
            default = (
                segments
                if option in segments
                else {option: MaskWords()._asdict()[option]}
            )
            return self._replace(mask=self.mask._replace(**default))
        return self._replace(**{option: Case()._asdict()[option]})


CASES = {
    "plain": Case(),
    "grouped": Case(heads=(12, 3)),
    "multi-query": Case(heads=(3, 1)),
    "one query": Case(lengths=(1, S)),
    "one key": Case(lengths=(T, 1)),
    "one pair": Case(lengths=(1, 1)),
    "causal": Case(MaskWords(is_causal=True)),
    "causal, more queries": Case(MaskWords(is_causal=True), lengths=(S, 5)),
    "causal after a cache": Case(MaskWords(is_causal=True, offset=2)),
    "causal before its keys": Case(MaskWords(is_causal=True, offset=-3)),
    "window": Case(MaskWords(sliding_window=3)),
    "window past the keys": Case(MaskWords(sliding_window=2), lengths=(S, 5)),
    "causal window after a cache": Case(
        MaskWords(is_causal=True, sliding_window=4, offset=2)
    ),
    "keys": Case(MaskWords(key_padding=KEY_PADDING)),
    "queries": Case(MaskWords(query_padding=QUERY_PADDING)),
    "padding": Case(MaskWords(QUERY_PADDING, KEY_PADDING)),
    "lengths": Case(MaskWords(np.array([T, 4], "int32"), np.array([6, S], "int32"))),
    "no keys": Case(MaskWords(key_padding=np.array([0, S], "int32"))),
    "segments": Case(
        MaskWords(query_segments=QUERY_SEGMENTS, key_segments=KEY_SEGMENTS)
    ),
    "segments of all rows": Case(
        MaskWords(query_segments=QUERY_SEGMENTS[0], key_segments=KEY_SEGMENTS[0])
    ),
    "pairs TS": Case(MaskWords(pairs=pairs(T, S))),
    "pairs BTS": Case(MaskWords(pairs=pairs(B, T, S))),
    "pairs BNTS, empty rows": Case(MaskWords(pairs=_without_rows(pairs(B, N, T, S)))),
    "pairs B11S": Case(MaskWords(pairs=pairs(B, 1, 1, S))),
    "pairs of groups": Case(MaskWords(pairs=pairs(B, 12, T, S)), heads=(12, 3)),
    "bias TS": Case(bias=(T, S)),
    "bias BTS": Case(bias=(B, T, S)),
    "bias BNTS": Case(bias=(B, N, T, S)),
    "bias 1N1S": Case(bias=(1, N, 1, S)),
    "distances": Case(distances=N),
    "distances of all heads": Case(distances=1, lengths=(S, T)),
    "sinks": Case(sinks=True),
    "sinks, empty rows": Case(
        MaskWords(key_padding=np.array([0, 5], "int32")), sinks=True
    ),
    "scale": Case(scale=-0.7),
    "soft cap": Case(logits_soft_cap=1.5),
    "soft cap, then bias": Case(logits_soft_cap=1.5, bias=(T, S)),
    "dropout": Case(dropout=0.3),
    "scores": Case(MaskWords(is_causal=True), return_scores=True),
    "large logits": Case(size=60.0, head_size=23),
}

FACTORS: dict[str, tuple[Any, ...]] = {
    "is_causal": (False, True),
    "sliding_window": (None, 4),
    "offset": (0, 2),
    "padding": (
        {},
        {"query_padding": QUERY_PADDING, "key_padding": KEY_PADDING},
        {"key_padding": np.array([7, S], "int32")},
    ),
    "segments": (
        {},
        {"query_segments": QUERY_SEGMENTS, "key_segments": KEY_SEGMENTS},
    ),
    "pairs": (None, (T, S), (B, "N", T, S)),
    "heads": ((3, 3), (12, 3), (3, 1)),
    "bias": (None, (T, S), (B, "N", T, S), "distances"),
    "sinks": (False, True),
    "scale": (None, 0.3),
    "logits_soft_cap": (None, 1.5),
    "dropout": (0.0, 0.3),
    "return_scores": (False, True),
    "dtype": ("float32", "float16", "bfloat16"),
    "mode": MODES,
}


def sample_pairwise(
    factors: Mapping[str, Sequence[Any]], seed: int
) -> list[dict[str, Any]]:
    """Combinations such that any two levels of any two factors meet in one.

    Greedy: each is the best of some random ones that hold a pair not met before.
    """
    random = np.random.default_rng(seed)
    names = list(factors)
    left = {
        ((one, i), (other, j))
        for one, other in itertools.combinations(range(len(names)), 2)
        for i in range(len(factors[names[one]]))
        for j in range(len(factors[names[other]]))
    }
    rows = []
    while left:
        needed = min(left)
        tries = random.integers(
            [len(levels) for levels in factors.values()], size=(64, len(names))
        )
        for place, level in needed:
            tries[:, place] = level
        met = [
            left & set(itertools.combinations(enumerate(map(int, row)), 2))
            for row in tries
        ]
        best = max(range(len(tries)), key=lambda i: len(met[i]))
        left -= met[best]
        rows.append(
            {name: factors[name][i] for name, i in zip(names, tries[best], strict=True)}
        )
    return rows


def combine(levels: Mapping[str, Any]) -> Case:
    """The case of one level of each of `FACTORS`, other than dtype and mode."""
    heads, bias, hidden = levels["heads"], levels["bias"], levels["pairs"]

    def shape(letters: tuple[Any, ...]) -> tuple[int, ...]:
        return tuple(heads[0] if size == "N" else size for size in letters)

    return Case(
        MaskWords(
            **levels["padding"],
            **levels["segments"],
            pairs=None if hidden is None else pairs(*shape(hidden)),
            is_causal=levels["is_causal"],
            sliding_window=levels["sliding_window"],
            offset=levels["offset"],
        ),
        heads=heads,
        bias=shape(bias) if isinstance(bias, tuple) else None,
        distances=heads[0] if bias == "distances" else None,
        **{
            name: levels[name]
            for name in (
                "sinks",
                "scale",
                "logits_soft_cap",
                "dropout",
                "return_scores",
            )
        },
    )


def heads(case: Case = CASES["plain"]) -> list[np.ndarray]:
    """Queries, keys and values."""
    return list(arrays_of(case).values())[:3]


def arrays_of(case: Case, poison: Sequence[float] = ()) -> dict[str, np.ndarray]:
    """The floating arrays of a case, by name.

    Args:
        case: The case.
        poison: Numbers that stand in padded queries, keys and values, in turn.
    """
    (queries, shared), (t, s) = case.heads, case.lengths
    arrays = {
        "query": case.size * draw(B, t, queries, case.head_size, seed=1),
        "key": case.size * draw(B, s, shared, case.head_size, seed=2),
        "value": draw(B, s, shared, V, seed=3),
    }
    if poison:
        rows, columns = padding_of(case)
        for name, real in (("query", rows), ("key", columns), ("value", columns)):
            hidden = arrays[name][~real]
            arrays[name][~real] = np.resize(poison, hidden.size).reshape(hidden.shape)
    if case.bias is not None:
        arrays["bias"] = draw(*case.bias, seed=5)
    if case.distances is not None:
        arrays["distances"] = draw(case.distances, t + s - 1, seed=6)
    if case.sinks:
        # large enough to take a good share of the weight from the keys
        arrays["sinks"] = 2.0 + draw(queries, seed=7)
    return arrays


def padding_of(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Which queries `(B, T)` and keys `(B, S)` are no padding."""
    mask = case.mask
    rows, columns = (
        oracle.spell_padding(padding, (B, length))
        & np.asarray(True if ids is None else ids >= 0)
        for padding, ids, length in (
            (mask.query_padding, mask.query_segments, case.lengths[0]),
            (mask.key_padding, mask.key_segments, case.lengths[1]),
        )
    )
    return rows, columns


def upstream_of(case: Case) -> list[np.ndarray]:
    """What the gradients of the outputs, one or two, are multiplied with."""
    upstream = [draw(B, case.lengths[0], case.heads[0], V, seed=8)]
    return [*upstream, draw(*case.pair_shape, seed=9)][: 1 + case.return_scores]


def visible(case: Case) -> np.ndarray:
    return oracle.visible_pairs(case.pair_shape, **case.mask._asdict())


def expect(
    case: Case, arrays: Mapping[str, np.ndarray], upstream: Sequence[np.ndarray]
) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """The oracle's outputs, and its gradients by name."""
    keep = None
    if case.dropout > 0:
        noise = draw_pair_noise(as_seed(SEED), case.pair_shape[:3], case.pair_shape[3])
        kept = np.asarray(ops.convert_to_numpy(keep_pairs(noise, case.dropout)))
        keep = kept / (1.0 - case.dropout)
    *outputs, gradients = oracle.attend_and_gradients(
        **arrays,
        visible=visible(case),
        keep=keep,
        scale=case.scale,
        logits_soft_cap=case.logits_soft_cap,
        **dict(zip(("upstream", "scores_upstream"), upstream, strict=False)),
    )
    return outputs[: len(upstream)], {
        name: gradient
        for name, gradient in gradients._asdict().items()
        if gradient is not None
    }


def attention_of(
    case: Case, implementation: str, names: Sequence[str]
) -> Callable[..., Any]:
    """The public function as one of tensors: those of `names`, then the mask's."""
    fields = list(mask_arrays_of(case))

    def function(*tensors: Any) -> Any:
        given = dict(zip([*names, *fields], tensors, strict=True))
        mask = case.mask._replace(**{field: given.pop(field) for field in fields})
        distances = given.pop("distances", None)
        if distances is not None:
            first = case.lengths[0] - 1
            given["bias"] = lambda where: ops.take(distances, where + first, axis=1)
        return dot_product_attention(
            **given,
            mask=mask.value(),
            scale=case.scale,
            logits_soft_cap=case.logits_soft_cap,
            dropout=case.dropout,
            seed=SEED if case.dropout > 0 else None,
            return_scores=case.return_scores,
            implementation=implementation,
        )

    return function


def mask_arrays_of(case: Case) -> dict[str, np.ndarray]:
    """The arrays of a case's mask, by field."""
    return {
        name: field
        for name, field in case.mask._asdict().items()
        if isinstance(field, np.ndarray)
    }


def run(
    case: Case,
    implementation: str,
    arrays: Mapping[str, Any],
    upstream: Sequence[np.ndarray],
    mode: str = "eager",
) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """An implementation's outputs, and its gradients by name, in float64.

    Batch and lengths are unknown to TensorFlow's graphs; XLA knows them.
    """
    hidden = mask_arrays_of(case)
    outputs, gradients = value_and_gradients(
        attention_of(case, implementation, list(arrays)),
        list(arrays.values()),
        upstream,
        mode,
        constants=list(map(ops.convert_to_tensor, hidden.values())),
        shapes=[
            _shape_to_trace(name, array.shape)
            for name, array in [*arrays.items(), *hidden.items()]
        ],
    )
    return outputs, dict(zip(arrays, gradients, strict=True))


def _shape_to_trace(name: str, shape: Sequence[int]) -> tuple[int | None, ...]:
    """A shape with batch and lengths unknown."""
    if name in ("query", "key", "value"):
        return (None, None, *shape[2:])
    if name == "sinks":
        return tuple(shape)
    if name == "distances":
        return shape[0], None
    # Of a mask or a bias, the heads are known, and which axes it is repeated along.
    return tuple(
        size if size == 1 or (axis == 1 and len(shape) == 4) else None
        for axis, size in enumerate(shape)
    )


def value_and_gradients(
    function: Callable[..., Any],
    arrays: Sequence[Any],
    upstream: Sequence[np.ndarray],
    mode: str = "eager",
    *,
    constants: Sequence[Any] = (),
    shapes: Sequence[tuple[int | None, ...]] | None = None,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Outputs of a function and the gradients of `sum(output * upstream)`, in float64.

    Args:
        function: Maps `arrays` and then `constants` to a tensor, or a tuple of some.
        arrays: Floating tensors; each gets a gradient.
        upstream: One for each output, cast to its dtype.
        mode: One of `MODES`.
        constants: Tensors without gradient.
        shapes: Of arrays and constants, as a TensorFlow graph is traced. Defaults
            to their own.
    """

    def outputs_of(*tensors: Any) -> list[Any]:
        outputs = function(*tensors)
        return list(outputs) if isinstance(outputs, tuple | list) else [outputs]

    run_in = {
        "tensorflow": _run_in_tensorflow,
        "jax": _run_in_jax,
        "torch": _run_in_torch,
    }[BACKEND]
    outputs, gradients = run_in(
        outputs_of, list(arrays), list(constants), list(upstream), mode, shapes
    )
    return list(map(numbers, outputs)), list(map(numbers, gradients))


def _run_in_tensorflow(
    function: Callable[..., list[Any]],
    arrays: list[Any],
    constants: list[Any],
    upstream: list[np.ndarray],
    mode: str,
    shapes: Sequence[tuple[int | None, ...]] | None,
) -> tuple[list[Any], list[Any]]:
    import tensorflow as tf

    def step(arrays: list[Any], constants: list[Any], upstream: list[Any]) -> Any:
        with tf.GradientTape() as tape:
            arrays = tf.nest.map_structure(tf.convert_to_tensor, arrays)
            tape.watch(arrays)
            outputs = function(*arrays, *constants)
        upstream = [
            tf.cast(one, output.dtype)
            for one, output in zip(upstream, outputs, strict=True)
        ]
        return outputs, tape.gradient(outputs, arrays, upstream)

    arguments = (arrays, constants, [tf.constant(one) for one in upstream])
    if mode == "graph":
        specs = tf.nest.map_structure(
            lambda x: tf.TensorSpec(x.shape, x.dtype), arguments
        )
        if shapes is not None:
            flat = iter(shapes)
            specs = (
                *(
                    [tf.TensorSpec(next(flat), spec.dtype) for spec in group]
                    for group in specs[:2]
                ),
                specs[2],
            )
        step = tf.function(step, input_signature=specs)
    elif mode == "xla":
        step = tf.function(step, jit_compile=True)
    return step(*arguments)


def _run_in_jax(
    function: Callable[..., list[Any]],
    arrays: list[Any],
    constants: list[Any],
    upstream: list[np.ndarray],
    mode: str,
    shapes: object,
) -> tuple[list[Any], list[Any]]:
    del shapes  # always known
    import jax  # pyright: ignore[reportMissingImports] - where it is the backend

    def step(arrays: list[Any], constants: list[Any], upstream: list[Any]) -> Any:
        outputs, pull = jax.vjp(lambda *x: function(*x, *constants), *arrays)
        return outputs, pull(
            [
                one.astype(output.dtype)
                for one, output in zip(upstream, outputs, strict=True)
            ]
        )

    step = jax.jit(step) if mode == "jit" else step
    return step(arrays, constants, [one.astype("float32") for one in upstream])


def _run_in_torch(
    function: Callable[..., list[Any]],
    arrays: list[Any],
    constants: list[Any],
    upstream: list[np.ndarray],
    mode: str,
    shapes: object,
) -> tuple[list[Any], list[Any]]:
    del mode, shapes  # eager alone
    import torch  # pyright: ignore[reportMissingImports] - likewise

    leaves = [array.detach().requires_grad_() for array in arrays]
    outputs = function(*leaves, *constants)
    return outputs, list(
        torch.autograd.grad(
            outputs,
            leaves,
            [
                torch.as_tensor(one).to(output.dtype)
                for one, output in zip(upstream, outputs, strict=True)
            ],
        )
    )


def cast(arrays: Sequence[Any], dtype: str) -> list[Any]:
    return [ops.convert_to_tensor(array, dtype=dtype) for array in arrays]


def numbers(tensor: Any) -> np.ndarray:
    """A tensor of any floating dtype, bfloat16 too, as float64."""
    return np.asarray(ops.convert_to_numpy(tensor)).astype(np.float64)


def check_close(found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Compares arrays; the error counts against the largest number, or one."""
    largest = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * largest)


def check_gradients(
    function: Callable[..., Any],
    expected: Callable[..., np.ndarray],
    arrays: Sequence[np.ndarray],
) -> None:
    """Compares the gradients of `function` with the slopes of `expected`."""
    upstream = draw(*expected(*arrays).shape, seed=7)
    _, found = value_and_gradients(function, cast(arrays, WIDEST), [upstream])
    tolerance = 1e-7 if WIDEST == "float64" else 1e-5
    check_slopes(found, expected, arrays, upstream, tolerance)


def check_slopes(
    found: Sequence[np.ndarray],
    expected: Callable[..., np.ndarray],
    arrays: Sequence[np.ndarray],
    upstream: np.ndarray,
    tolerance: float = 1e-7,
) -> None:
    """Compares gradients with central differences of the oracle `expected`.

    Each array moves along one random direction: a gradient that is wrong in any
    element is wrong along it.
    """

    def loss(*moved: np.ndarray) -> float:
        return float(np.sum(expected(*moved) * upstream))

    for place, gradient in enumerate(found):
        direction = draw(*arrays[place].shape, seed=8 + place)
        slope = oracle.directional_derivative(loss, arrays, place, direction)
        error = abs(float(np.sum(gradient * direction)) - slope)
        assert error <= tolerance * (float(np.linalg.norm(gradient)) + 1.0)
