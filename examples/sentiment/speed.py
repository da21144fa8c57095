"""Times an epoch of fine-tuning, and one in PyTorch with transformers.

Both train on the same rows in batches of 32 with AdamW and dropout, each in its own
process, in turns; compilation is not counted. PyTorch pads each drawn batch to its
longest row, as its users do; here a batch holds rows of similar length.

Example:
    python examples/sentiment/speed.py --data ids.npz --rows 1600 --rounds 3
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
from finetune import FineTuning, build_classifier, compile_classifier
from rows import Batches, Rows, pad, unpack

from keras_mha.convert import load_bert

LENGTHS = (16, 24, 32, 40, 48, 64)
RECIPE = FineTuning(epochs=1, batch_size=32)
EPOCH_ROWS = 9544  # nine tenths of the reviews


def time_ours(checkpoint: Path, rows: Rows) -> float:
    """Returns the seconds that `model.fit` takes for one pass over the rows."""
    encoder = load_bert(checkpoint)
    model = build_classifier(encoder, RECIPE)
    compile_classifier(model, encoder, RECIPE, steps=1000)
    batches = Batches(rows, RECIPE.batch_size, LENGTHS, seed=0)
    model.fit(batches, epochs=1, steps_per_epoch=4, shuffle=False, verbose=0)  # pyright: ignore[reportArgumentType]
    start = time.perf_counter()
    model.fit(batches, epochs=1, shuffle=False, verbose=0)  # pyright: ignore[reportArgumentType]
    return time.perf_counter() - start


def time_torch(checkpoint: Path, rows: Rows) -> float:
    """Returns the seconds that a plain loop over PyTorch's model takes."""
    import torch  # pyright: ignore[reportMissingImports] - `transformers`
    from transformers import BertForSequenceClassification  # pyright: ignore[reportMissingImports] - likewise

    model = BertForSequenceClassification.from_pretrained(checkpoint, num_labels=2)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RECIPE.learning_rate)

    def step(where: np.ndarray) -> None:
        some = [rows.ids[i][:64] for i in where]
        ids = torch.tensor(pad(some, [max(map(len, some))]), dtype=torch.long)
        labels = torch.tensor(rows.labels[where], dtype=torch.long)
        optimizer.zero_grad()
        model(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels)[
            "loss"
        ].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    order = np.random.default_rng(0).permutation(len(rows))
    size = RECIPE.batch_size
    parts = [order[i : i + size] for i in range(0, len(order), size)]
    for part in parts[:2]:
        step(part)
    start = time.perf_counter()
    for part in parts:
        step(part)
    return time.perf_counter() - start


CONTENDERS: dict[str, Callable[[Path, Rows], float]] = {
    "keras_mha": time_ours,
    "torch": time_torch,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="file that encode.py wrote")
    add("--checkpoint", type=Path, help="its directory (default: the downloaded one)")
    add("--rows", type=int, default=1600, help="default: %(default)s")
    add("--rounds", type=int, default=3, help="default: %(default)s")
    add("--only", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    checkpoint = options.checkpoint
    if checkpoint is None:
        from checkpoint import load_checkpoint

        checkpoint = load_checkpoint()
    if options.only:
        with np.load(options.data) as file:
            every = unpack(dict(file), "mr")
        chosen = np.random.default_rng(0).permutation(len(every))[: options.rows]
        seconds = CONTENDERS[options.only](checkpoint, every.take(chosen))
        print(json.dumps(seconds))
        return 0
    seconds_of: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for _ in range(options.rounds):
        for name, times in seconds_of.items():
            command = [sys.executable, __file__, "--only", name]
            command += ["--data", str(options.data), "--rows", str(options.rows)]
            command += ["--checkpoint", str(checkpoint)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
            times.append(float(done.stdout.split()[-1]))
    medians = {name: float(np.median(times)) for name, times in seconds_of.items()}
    for name, seconds in medians.items():
        print(
            f"{name}: {seconds:.1f} s for {options.rows} rows, "
            f"{seconds * EPOCH_ROWS / options.rows:.0f} s an epoch; "
            f"rounds {[round(each, 1) for each in seconds_of[name]]}"
        )
    print(f"torch's time over ours: {medians['torch'] / medians['keras_mha']:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
