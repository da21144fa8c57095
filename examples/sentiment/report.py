"""Reports of a training run: figures, text and pictures."""

from __future__ import annotations

import json
import math
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import keras_mha

# Kim 2014, "Convolutional neural networks for sentence classification", table 2, column
# MR: accuracy in percent, mean of ten folds.
PUBLISHED = {
    "CNN-rand, trained from scratch (Kim 2014)": 76.1,
    "RAE (Socher et al. 2011)": 77.7,
    "MNB, uni- and bigrams (Wang and Manning 2012)": 79.0,
    "NBSVM, uni- and bigrams (Wang and Manning 2012)": 79.4,
    "CNN-static, pretrained word vectors (Kim 2014)": 81.0,
    "CNN-non-static, pretrained word vectors (Kim 2014)": 81.5,
}
PACKAGES = ("keras", "numpy", "scikit-learn", "tensorflow", "tensorflow-text")


def wilson_interval(
    successes: int, trials: int, z: float = 1.959964
) -> tuple[float, float]:
    """Returns the 95 % interval of a share (Wilson 1927), valid at 0 and 1 too.

    Raises:
        ValueError: If `trials` is not positive, or `successes` not from 0 to `trials`.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(
            "`successes` must be from 0 to `trials`, and `trials` at least 1. "
            f"Received: successes={successes}, trials={trials}"
        )
    share = successes / trials
    scale = 1 + z**2 / trials
    middle = (share + z**2 / (2 * trials)) / scale
    half = z * math.sqrt(share * (1 - share) / trials + (z / (2 * trials)) ** 2) / scale
    return max(0.0, middle - half), min(1.0, middle + half)


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages behind the figures."""
    return {
        "python": platform.python_version(),
        "keras-mha": keras_mha.__version__,
        **{name: metadata.version(name) for name in PACKAGES},
    }


def comparison(scores: Mapping[str, Sequence[float]]) -> str:
    """Returns a Markdown table of each method's scores, and of published ones."""
    rows = [
        (name, 100 * float(np.mean(folds)), _deviation(folds), len(folds))
        for name, folds in scores.items()
    ]
    lines = ["| method | accuracy % | deviation | folds |", "| --- | --: | --: | --: |"]
    lines += [f"| {n} | {mean:.1f} | {dev} | {k} |" for n, mean, dev, k in rows]
    lines += [f"| {name} | {mean:.1f} | | 10 |" for name, mean in PUBLISHED.items()]
    return "\n".join(lines)


def _deviation(folds: Sequence[float]) -> str:
    return f"{100 * float(np.std(folds, ddof=1)):.1f}" if len(folds) > 1 else ""


def write_text(path: Path, text: str) -> None:
    """Writes a temporary file and renames it, so that `path` is always whole."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text if text.endswith("\n") else text + "\n", "utf-8")
    temporary.replace(path)


def copy_file(source: Path, target: Path) -> None:
    """Copies to a temporary file and renames it."""
    temporary = target.with_name(f".{target.name}.part")
    shutil.copyfile(source, temporary)
    temporary.replace(target)


def write_json(path: Path, content: Any) -> None:
    """Writes indented JSON; refuses NaN, which JSON lacks."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False))


def to_markdown(metrics: Mapping[str, Any], export_sections: Sequence[str] = ()) -> str:
    """Returns the report of one run: figures, comparison, exports."""
    low, high = metrics["test_accuracy_95"]
    sizes, members = metrics["sizes"], metrics["member_test_accuracies"]
    lines = [
        "# Sentiment of movie reviews",
        "",
        f"Test accuracy **{metrics['test_accuracy']:.4f}** (95 % interval {low:.4f} to "
        f"{high:.4f}) on fold {metrics['fold']} of {metrics['folds']}, "
        f"{sizes['test']} reviews; always answering the more frequent label gives "
        f"{metrics['majority_rate']:.4f}.",
        "",
        f"The mean of {len(members)} encoders, which singly reach "
        f"{min(members):.4f} to {max(members):.4f}. Trained from scratch on "
        f"{sizes['train']} reviews in {metrics['seconds']['train']:.0f} s; each sets a "
        f"different tenth aside for early stopping; {sizes['parameters']:,} weights, "
        f"{sizes['vocabulary']:,} wordpieces, seed {metrics['seed']}.",
        "",
        "## Compared with others",
        "",
        comparison(
            {
                "this model, trained from scratch": [metrics["test_accuracy"]],
                "multinomial naive Bayes, uni- and bigrams, same fold": [
                    metrics["naive_bayes_accuracy"]
                ],
            }
        ),
        "",
        "One fold says little: its interval is wide. `--folds 10` runs all ten.",
        "",
        "![Curves](training.png)",
        "",
        "![Attention](attention.png)",
        "",
        "## Versions",
        "",
        *(f"- {name} {version}" for name, version in metrics["versions"].items()),
    ]
    return "\n".join(lines) + "".join(f"\n\n{text}" for text in export_sections)


def draw_training(
    path: Path, histories: Sequence[Mapping[str, Sequence[float]]]
) -> None:
    """Draws loss and accuracy over the epochs, one line a member of the committee."""
    parts = (("", "training (with dropout)", "C0"), ("val_", "validation", "C1"))
    with figure(path, figsize=(9, 3.5), ncols=2) as axes:
        for axis, name in zip(axes, ("loss", "accuracy"), strict=True):
            for prefix, label, color in parts:
                for i, history in enumerate(histories):
                    curve = history[prefix + name]
                    axis.plot(
                        range(1, len(curve) + 1),
                        curve,
                        marker=".",
                        color=color,
                        alpha=0.6,
                        label=None if i else label,
                    )
            axis.set(xlabel="epoch", ylabel=name)
            axis.locator_params(axis="x", integer=True)
            axis.grid(alpha=0.3)
        axes[0].legend()


def draw_attention(path: Path, tokens: Sequence[str], scores: np.ndarray) -> None:
    """Draws which tokens of a text attend to which.

    Letters: M members of the committee, N heads, T tokens.

    Args:
        path: Where to write the picture.
        tokens: The T tokens.
        scores: Attention probabilities `(M, N, T, T)`; the last axis is attended to.
    """
    pairs = scores.mean((0, 1))
    # The attention that each token receives from the average token: by member, and in
    # all.
    received = np.concatenate([scores.mean((1, 2)), pairs.mean(0, keepdims=True)])
    members = [*(f"member {m}" for m in range(len(scores))), "mean"]
    rows = len(tokens) + len(received)
    with figure(
        path,
        figsize=(0.3 * len(tokens) + 2.5, 0.3 * rows + 3),
        nrows=2,
        gridspec_kw={"height_ratios": [len(tokens), len(received)]},
    ) as axes:
        for axis, matrix, labels in (
            (axes[0], pairs, tokens),
            (axes[1], received, members),
        ):
            axis.imshow(matrix, cmap="Blues", vmin=0, aspect="auto")
            axis.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=8)
            axis.set_yticks(range(len(labels)), labels, fontsize=8)
        axes[0].set_title("Mean of members and heads: each row attends to columns")
        axes[1].set_title("Attention that each word receives")


@contextmanager
def figure(path: Path, **options: Any) -> Iterator[Any]:
    """Yields axes, and writes their picture by way of a temporary file at the end."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise ImportError(
            "The pictures need matplotlib: pip install 'keras-mha[examples]'"
        ) from error
    mpl.use("agg")
    import matplotlib.pyplot as plt

    picture, axes = plt.subplots(layout="constrained", **options)
    try:
        yield axes
        temporary = path.with_name(f".{path.name}")
        picture.savefig(temporary, dpi=120)
        temporary.replace(path)
    finally:
        plt.close(picture)
