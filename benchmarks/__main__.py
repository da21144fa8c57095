"""Runs keras_mha and its rivals in turns on this machine's CPU.

python -m benchmarks [case ...] [--rounds 7] [--output FOLDER] [--smoke]
"""

from __future__ import annotations

import functools

from benchmarks import cases, machine, session
from benchmarks.coordinator import Options

# Bytes left to the rest of the machine while memory is measured.
RESERVE = 2**30


def main() -> None:
    """Runs the chosen cases."""
    parser = session.parser(__doc__.splitlines()[0], cases.CASES)
    parser.add_argument(
        "--memory-limit",
        type=float,
        metavar="GIB",
        default=(machine.memory("MemAvailable") - RESERVE) / 2**30,
        help="most memory for a step when that is measured (default: what is free)",
    )
    arguments = session.checked(parser, cases.CASES)
    sizes = cases.SMOKE if arguments.smoke else cases.Sizes()
    size = sizes.matrix
    options = Options(
        reference=cases.entry(
            f"{size} x {size} float32 matrix product",
            "matrix_product.on_tensorflow",
            size=size,
        ),
        reference_operations=2.0 * size**3,
        rounds=arguments.rounds,
        timeout=arguments.timeout,
        memory_limit=int(arguments.memory_limit * 2**30),
        environment={
            **session.thread_environment(arguments.threads),
            "KERAS_BACKEND": "tensorflow",
            "TF_CPP_MIN_LOG_LEVEL": "2",
            # Measure the CPU, even if the machine has a GPU.
            "CUDA_VISIBLE_DEVICES": "-1",
        },
    )
    groups = {
        name: functools.partial(function, sizes)
        for name, function in cases.CASES.items()
        if name in (arguments.cases or cases.CASES)
    }
    described = machine.describe(arguments.threads)
    session.run(groups, options, described, arguments.output)


if __name__ == "__main__":
    main()
