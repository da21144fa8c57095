"""Runs keras_mha on Keras' JAX backend and its rivals in turns on a GPU, in bfloat16.

    python -m benchmarks.gpu [case ...] [--rounds 7] [--output FOLDER] [--smoke]

With `--smoke` it runs tiny shapes on the CPU, where cuDNN is reported as failed.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from benchmarks import cases, machine, session
from benchmarks.cases import Comparison, Entry, entry
from benchmarks.coordinator import Options

DTYPE = "bfloat16"


@dataclass(frozen=True)
class Sizes:
    """The same number of tokens at each length, so that each keeps the GPU busy."""

    tokens: int = 32768
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768)
    # Of the functions without their layer.
    core_lengths: tuple[int, ...] = (1024, 4096, 32768)
    num_heads: int = 8
    head_dim: int = 128
    matrix: int = 8192
    device: str = "cuda"


SMOKE = Sizes(
    tokens=64,
    lengths=(32, 64),
    core_lengths=(32,),
    num_heads=2,
    head_dim=8,
    matrix=128,
    device="cpu",
)


def core(sizes: Sizes) -> Iterator[Comparison]:
    """Compares attention from projected heads to mixed values."""
    yield from _core(sizes, is_causal=False)


def causal(sizes: Sizes) -> Iterator[Comparison]:
    """Compares causal attention; half of the operations count."""
    yield from _core(sizes, is_causal=True)


def _core(sizes: Sizes, *, is_causal: bool) -> Iterator[Comparison]:
    N, H = sizes.num_heads, sizes.head_dim
    for T in sizes.core_lengths:
        B = sizes.tokens // T
        for backward, name in cases.PASSES:
            same: dict[str, Any] = {
                "shape": (B, N, T, H),
                "dtype": DTYPE,
                "backward": backward,
                "is_causal": is_causal,
            }
            operations = cases.attention_operations(B, N, T, H, backward=backward)
            yield Comparison(
                f"{'causal ' if is_causal else ''}attention, {DTYPE}, "
                f"B={B} N={N} T={T} H={H}, {name}",
                (
                    entry("keras_mha", "ours_on_jax.attention", **same),
                    *_by_jax("jax_stock.attention", **same),
                    entry(
                        "torch SDPA",
                        "pytorch.attention",
                        device=sizes.device,
                        **same,
                    ),
                ),
                operations / 2 if is_causal else operations,
            )


def layer(sizes: Sizes) -> Iterator[Comparison]:
    """Compares a layer with the rivals' functions between the same projections."""
    N, D = sizes.num_heads, sizes.num_heads * sizes.head_dim
    for T in sizes.lengths:
        B = sizes.tokens // T
        for backward, name in cases.PASSES:
            same: dict[str, Any] = {
                "shape": (B, T, D),
                "num_heads": N,
                "dtype": DTYPE,
                "backward": backward,
            }
            yield Comparison(
                f"self-attention layer, {DTYPE}, B={B} T={T} D={D} N={N}, {name}",
                (
                    entry("keras_mha", "ours_on_jax.layer", **same),
                    *_by_jax("jax_stock.layer", **same),
                    entry(
                        "torch SDPA",
                        "pytorch.projected",
                        device=sizes.device,
                        **same,
                    ),
                ),
                cases.layer_operations(B, T, D, N, backward=backward),
            )


def _by_jax(builder: str, **same: Any) -> Iterator[Entry]:
    yield entry("jax.nn, cuDNN", builder, implementation="cudnn", **same)
    yield entry("jax.nn, XLA", builder, implementation="xla", **same)


CASES = {function.__name__: function for function in (layer, core, causal)}


def accelerator() -> str | None:
    """Returns the GPU's name and its driver's version, or None without a GPU."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = ["--query-gpu=name,driver_version", "--format=csv,noheader"]
    done = subprocess.run(
        [command, *query], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None


def main() -> None:
    """Runs the chosen cases."""
    parser = session.parser(__doc__.splitlines()[0], CASES)
    arguments = session.checked(parser, CASES)
    sizes = SMOKE if arguments.smoke else Sizes()
    reference = entry(
        f"{sizes.matrix} x {sizes.matrix} {DTYPE} matrix product",
        "matrix_product.on_jax",
        size=sizes.matrix,
    )
    options = Options(
        reference=replace(reference, package="jax"),
        reference_operations=2.0 * sizes.matrix**3,
        rounds=arguments.rounds,
        timeout=arguments.timeout,
        environment={
            **session.thread_environment(arguments.threads),
            "KERAS_BACKEND": "jax",
            # With this name JAX fails without a GPU, instead of using the CPU.
            "JAX_PLATFORMS": sizes.device,
            # Several processes share the GPU's memory.
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "TF_CPP_MIN_LOG_LEVEL": "2",
        },
    )
    groups = {
        name: functools.partial(function, sizes)
        for name, function in CASES.items()
        if name in (arguments.cases or CASES)
    }
    described = machine.describe(arguments.threads)
    described["accelerator"] = None if arguments.smoke else accelerator()
    session.run(groups, options, described, arguments.output)


if __name__ == "__main__":
    main()
