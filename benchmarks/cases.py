"""The table of comparisons: plain data, which imports no library.

Letters: B batch, T length, N heads, H head size, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

CONTENDERS = "benchmarks.contenders"
# The package that a module of `contenders` needs, apart from those of keras_mha.
PACKAGES = {
    "pytorch": "torch",
    "kerashub": "keras_hub",
    "jax_stock": "jax",
    "onnx_files": "onnxruntime",
}
BACKWARD_OPERATIONS = 3.5
PASSES = ((False, "forward"), (True, "forward and backward"))


@dataclass(frozen=True)
class Entry:
    """One contender of a comparison.

    Attributes:
        label: Its name in the results; in a group, one label is one process.
        builder: The dotted path of a function that returns a `Step`.
        settings: Its keyword arguments.
        package: The package it needs, if that may be absent.
        environment: Added to the environment of its process.
    """

    label: str
    builder: str
    settings: Mapping[str, Any]
    package: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """Entries timed in turns; ratios refer to the first.

    Attributes:
        title: The operation and the shape.
        entries: The contenders.
        operations: Floating-point operations of one step, where they are counted.
    """

    title: str
    entries: tuple[Entry, ...]
    operations: float | None = None


@dataclass(frozen=True)
class MemoryComparison:
    """Peak memory of one step, by length, each in a fresh process.

    Attributes:
        title: The operation.
        lengths: T of each measurement.
        entries: The contenders; `shape` is added to their settings.
        shape: `(B, N, H)`.
    """

    title: str
    lengths: tuple[int, ...]
    entries: tuple[Entry, ...]
    shape: tuple[int, int, int]


@dataclass(frozen=True)
class Sizes:
    """The shapes of every case; `SMOKE` has the same cases in seconds."""

    heads: tuple[tuple[int, int, int, int], ...] = (
        (1, 8, 4096, 64),
        (8, 8, 512, 64),
        (32, 4, 128, 64),
    )
    causal: tuple[int, int, int, int] = (1, 8, 4096, 64)
    windowed: tuple[int, int, int, int] = (1, 8, 16384, 64)
    window: int = 256
    memory: tuple[int, int, int] = (1, 8, 64)
    lengths: tuple[int, ...] = (1024, 4096, 16384, 65536)
    # (B, T, D, N): short reviews up to one long document
    layers: tuple[tuple[int, int, int, int], ...] = (
        (32, 32, 128, 4),
        (32, 128, 256, 4),
        (8, 512, 512, 8),
        (1, 2048, 512, 8),
    )
    block: tuple[int, int, int] = (16, 256, 512)
    decoded: tuple[int, int, int] = (1, 1024, 512)
    num_heads: int = 8
    hidden_dim: int = 2048
    reviews: Mapping[str, int] = field(
        default_factory=lambda: {
            "batch_size": 64,
            "batches": 8,
            "width": 256,
            "num_heads": 4,
            "row": 128,
        }
    )
    # (B, T, D): one text, and a batch of them
    classifiers: tuple[tuple[int, int, int], ...] = ((1, 128, 256), (8, 128, 256))
    classifier: Mapping[str, int] = field(
        default_factory=lambda: {"num_heads": 4, "hidden_dim": 512}
    )
    matrix: int = 2048


SMOKE = Sizes(
    heads=((1, 2, 24, 8),),
    causal=(1, 2, 24, 8),
    windowed=(1, 2, 48, 8),
    window=5,
    memory=(1, 2, 8),
    lengths=(32, 64),
    layers=((2, 12, 16, 2),),
    block=(2, 12, 16),
    decoded=(1, 12, 16),
    num_heads=2,
    hidden_dim=24,
    reviews={"batch_size": 4, "batches": 2, "width": 16, "num_heads": 2, "row": 64},
    classifiers=((2, 12, 16),),
    classifier={"num_heads": 2, "hidden_dim": 24},
    matrix=128,
)


def entry(label: str, builder: str, /, **settings: Any) -> Entry:
    """Makes an entry whose builder is `module.function` in `contenders`."""
    package = PACKAGES.get(builder.partition(".")[0])
    return Entry(label, f"{CONTENDERS}.{builder}", settings, package)


def attention_operations(B: int, N: int, T: int, H: int, *, backward: bool) -> float:
    """Counts two products of `T * T * H` for each head, times 3.5 with the backward.

    The backward pass has five such products where it computes the scores again.
    """
    return 4 * B * N * T * T * H * (BACKWARD_OPERATIONS if backward else 1)


def layer_operations(B: int, T: int, D: int, N: int, *, backward: bool) -> float:
    """Counts the attention, and its four projections, times three with the backward."""
    attention = attention_operations(B, N, T, D // N, backward=backward)
    return attention + 8 * B * T * D * D * (3 if backward else 1)


def core(sizes: Sizes) -> Iterator[Comparison]:
    """Compares attention from projected heads to mixed values, in float32."""
    yield from _core(sizes, "float32")


def bfloat16(sizes: Sizes) -> Iterator[Comparison]:
    """Compares the same in bfloat16."""
    yield from _core(sizes, "bfloat16")


def _core(sizes: Sizes, dtype: str) -> Iterator[Comparison]:
    for shape, (backward, name) in product(sizes.heads, PASSES):
        same: dict[str, Any] = {"shape": shape, "dtype": dtype, "backward": backward}
        yield Comparison(
            f"attention, {dtype}, (B,N,T,H) = {_text(shape)}, {name}",
            (
                entry("keras_mha, graph", "ours.attention", compiled=False, **same),
                entry(
                    "keras_mha, blockwise, graph",
                    "ours.attention",
                    compiled=False,
                    implementation="blockwise",
                    **same,
                ),
                entry("keras_mha, XLA", "ours.attention", compiled=True, **same),
                entry(
                    "keras.ops, graph", "keras_stock.attention", compiled=False, **same
                ),
                entry("keras.ops, XLA", "keras_stock.attention", compiled=True, **same),
                entry("torch SDPA", "pytorch.attention", **same),
            ),
            attention_operations(*shape, backward=backward),
        )


def causal(sizes: Sizes) -> Iterator[Comparison]:
    """Compares causal with full attention."""
    for backward, name in PASSES:
        same: dict[str, Any] = {"shape": sizes.causal, "backward": backward}
        by_graph = {**same, "compiled": False}
        yield Comparison(
            f"causal against full, (B,N,T,H) = {_text(sizes.causal)}, {name}",
            (
                entry("keras_mha, full", "ours.attention", **by_graph),
                entry(
                    "keras_mha, causal", "ours.attention", is_causal=True, **by_graph
                ),
                entry("keras.ops, full", "keras_stock.attention", **by_graph),
                entry(
                    "keras.ops, causal",
                    "keras_stock.attention",
                    is_causal=True,
                    **by_graph,
                ),
                entry("torch SDPA, full", "pytorch.attention", **same),
                entry(
                    "torch SDPA, causal", "pytorch.attention", is_causal=True, **same
                ),
            ),
        )


def window(sizes: Sizes) -> Iterator[Comparison]:
    """Compares a sliding window with full attention."""
    for backward, name in PASSES:
        same: dict[str, Any] = {"shape": sizes.windowed, "backward": backward}
        by_graph = {**same, "compiled": False}
        cut = {"sliding_window": sizes.window}
        yield Comparison(
            f"window of {sizes.window} against full, "
            f"(B,N,T,H) = {_text(sizes.windowed)}, {name}",
            (
                entry("keras_mha, full", "ours.attention", **by_graph),
                entry("keras_mha, window", "ours.attention", **cut, **by_graph),
                entry("torch SDPA, full", "pytorch.attention", **same),
                entry("torch SDPA, window", "pytorch.attention", **cut, **same),
            ),
        )


def memory(sizes: Sizes) -> Iterator[MemoryComparison]:
    """Compares peak memory of attention's forward and backward pass by length."""
    B, N, H = sizes.memory
    training: dict[str, Any] = {"backward": True}
    in_graph = {**training, "compiled": False}
    yield MemoryComparison(
        f"peak memory of forward and backward, float32, B={B} N={N} H={H}",
        sizes.lengths,
        (
            entry(
                "keras_mha, graph",
                "ours.attention",
                implementation="blockwise",
                **in_graph,
            ),
            entry("keras.ops, graph", "keras_stock.attention", **in_graph),
            entry("torch SDPA", "pytorch.attention", **training),
        ),
        sizes.memory,
    )


def layer(sizes: Sizes) -> Iterator[Comparison]:
    """Compares layers by the parts that XLA compiles: decides `jit_compile="auto"`."""
    for (B, T, D, N), (backward, name) in product(sizes.layers, PASSES):
        same: dict[str, Any] = {
            "shape": (B, T, D),
            "num_heads": N,
            "backward": backward,
        }
        ours = {"builder": "ours.layer", **same}
        stock = {"builder": "keras_stock.layer", **same}
        yield Comparison(
            f"self-attention layer, B={B} T={T} D={D} N={N}, {name}",
            (
                _called("keras_mha, auto", compiled=False, **ours),
                _called("keras_mha, True", compiled=False, jit_compile=True, **ours),
                _called("keras_mha, step in XLA", compiled=True, **ours),
                _called("keras.layers, graph", compiled=False, **stock),
                _called("keras.layers, XLA", compiled=True, **stock),
                _called("torch.nn", builder="pytorch.layer", **same),
            ),
            layer_operations(B, T, D, N, backward=backward),
        )


def encoder(sizes: Sizes) -> Iterator[Comparison]:
    """Compares training steps of an encoder block in the ways that `fit` runs them."""
    (B, T, D), N, hidden = sizes.block, sizes.num_heads, sizes.hidden_dim
    same: dict[str, Any] = {
        "shape": sizes.block,
        "num_heads": N,
        "hidden_dim": hidden,
    }
    modes = (("fit's default", "auto"), ("graph", False), ("XLA", True))
    yield Comparison(
        f"encoder block, training step, B={B} T={T} D={D} N={N} hidden={hidden}",
        (
            *(
                entry(
                    f"{library}, {mode}",
                    f"{module}.encoder_block",
                    jit_compile=value,
                    **same,
                )
                for library, module in (("keras_mha", "ours"), ("KerasHub", "kerashub"))
                for mode, value in modes
            ),
            entry("torch.nn", "pytorch.encoder_block", **same),
        ),
        layer_operations(B, T, D, N, backward=True) + 3 * 4 * B * T * D * hidden,
    )


def decoding(sizes: Sizes) -> Iterator[Comparison]:
    """Compares one more position with a cache, early and late, with computing all."""
    B, T, D = sizes.decoded
    N, hidden = sizes.num_heads, sizes.hidden_dim
    same: dict[str, Any] = {"shape": sizes.decoded, "num_heads": N}
    block = {**same, "hidden_dim": hidden}
    yield Comparison(
        f"decoding step, self-attention layer, B={B} T={T} D={D} N={N}",
        (*_decoding("keras_mha", "ours.decoding_layer", T, **same),),
    )
    yield Comparison(
        f"decoding step, decoder block, B={B} T={T} D={D} N={N} hidden={hidden}",
        (
            *_decoding("keras_mha", "ours.decoder_block", T, **block),
            *_decoding("KerasHub", "kerashub.decoder_block", T, **block),
        ),
    )


def _decoding(library: str, builder: str, T: int, **same: Any) -> Iterator[Entry]:
    for mode, compiled in (("graph", False), ("XLA", True)):
        step = {"compiled": compiled, **same}
        name = f"{library}, {mode}"
        yield entry(f"{name}, after {T - 1}", builder, position=T - 1, **step)
        yield entry(f"{name}, after none", builder, position=0, **step)
        yield entry(f"{name}, recomputing", builder, position=None, **step)


def packing(sizes: Sizes) -> Iterator[Comparison]:
    """Compares training steps on real reviews: packed, padded, bucketed."""
    reviews = sizes.reviews
    yield Comparison(
        "training step on {batch_size} reviews, two encoder blocks, D={width} "
        "N={num_heads}".format(**reviews),
        tuple(
            entry(f"keras_mha, {how}", "reviews.training", how=how, **reviews)
            for how in ("packed", "padded", "bucketed")
        ),
    )


def onnx(sizes: Sizes) -> Iterator[Comparison]:
    """Compares a classifier's ONNX files, from our exporter and plain tf2onnx."""
    for B, T, D in sizes.classifiers:
        same: dict[str, Any] = {"shape": (B, T, D), **sizes.classifier}
        yield Comparison(
            f"ONNX Runtime, one thread, two encoder blocks, B={B} T={T} D={D} "
            "N={num_heads} hidden={hidden_dim}".format(**sizes.classifier),
            tuple(
                entry(
                    f"{layers}, {exporter}",
                    "onnx_files.classifier",
                    layers=layers,
                    exporter=exporter,
                    **same,
                )
                for layers, exporter in (
                    ("keras_mha", "export_onnx"),
                    ("keras_mha", "tf2onnx"),
                    ("keras", "export_onnx"),
                    ("keras", "tf2onnx"),
                )
            ),
        )


CASES = {
    function.__name__: function
    for function in (
        core,
        bfloat16,
        causal,
        window,
        layer,
        encoder,
        decoding,
        packing,
        onnx,
        memory,
    )
}


def _called(label: str, *, builder: str, **settings: Any) -> Entry:
    """Calls `entry` with its builder among the keywords."""
    return entry(label, builder, **settings)


def _text(shape: tuple[int, ...]) -> str:
    return "({})".format(",".join(map(str, shape)))
