"""Lets the fine-tuned model teach a small one, of fewer blocks and fewer words.

The student is the first blocks of the same checkpoint, over the words of its training
data. It learns the teacher's probabilities and features; the features are the mean of
the tokens, which the teacher's last layer turns into probabilities.

Sources: Hinton et al. 2015, "Distilling the knowledge in a neural network"; Romero et
al. 2015, "FitNets" (features too); Sanh et al. 2019, "DistilBERT" (starts from blocks
of the pretrained model); Abdaoui et al. 2020, "Load what you need" (drops words that
are not needed).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
from finetune import FineTuning, make_optimizer, steps_of, verbosity
from rows import Batches, Rows

from keras_mha.models import BertEncoder


@dataclass(frozen=True)
class Distillation:
    """Everything that the student depends on, except data, models and seed."""

    blocks: int = 3
    # Weight of the squared distance of the features; that of the probabilities is 1.
    feature_weight: float = 1.0
    training: FineTuning = field(default_factory=FineTuning)


def needed_tokens(vocabulary: Sequence[str], rows: Rows) -> np.ndarray:
    """Returns the ascending ids of the tokens that these rows and other texts need.

    The tokenizer cuts texts into the longest pieces it has, so it still cuts these rows
    as before. It may cut other words smaller: at worst into the single characters of
    these rows' words.
    """
    needed = {vocabulary[i] for row in rows.ids for i in row}
    characters = set().union(*needed)
    needed |= {"[PAD]", "[UNK]", *characters, *(f"##{each}" for each in characters)}
    return np.flatnonzero([token in needed for token in vocabulary])


def first_blocks(
    encoder: BertEncoder, blocks: int, tokens: np.ndarray | None = None
) -> BertEncoder:
    """Makes an encoder of the first blocks of another, with its weights.

    Args:
        encoder: The other encoder, without a pooler.
        blocks: How many blocks to take.
        tokens: The ids of the tokens to take, in their new order. Defaults to all.

    Raises:
        ValueError: If the other encoder has fewer blocks.
    """
    if not 1 <= blocks <= encoder.num_layers:
        raise ValueError(
            f"`blocks` must be from 1 to {encoder.num_layers}. Received: {blocks}"
        )
    if tokens is None:
        tokens = np.arange(encoder.vocabulary_size)
    heads = encoder.num_heads
    smaller = BertEncoder.from_config(
        {
            **encoder.get_config(),
            "vocabulary_size": len(tokens),
            "num_layers": blocks,
            "num_heads": heads if isinstance(heads, int) else heads[:blocks],
        }
    )
    smaller.build(None)
    mine: Any = smaller.embedding
    theirs: Any = encoder.embedding
    table = np.asarray(theirs.token_embedding.embeddings)
    mine.token_embedding.embeddings.assign(table[tokens])
    mine.position_embedding.assign(theirs.position_embedding)
    for target, source in (
        (smaller.token_type_embedding, encoder.token_type_embedding),
        (smaller.embedding_norm, encoder.embedding_norm),
        *zip(smaller.blocks, encoder.blocks[:blocks], strict=True),
    ):
        target.set_weights(source.get_weights())
    return smaller


def with_features(classifier: keras.Model) -> keras.Model:
    """Gives the classifier a second output, features `(B, D)`, after `(B, 2)`."""
    features: Any = classifier.get_layer("mean")
    return keras.Model(classifier.inputs, [*classifier.outputs, features.output])


class TaughtBatches(Batches):
    """Batches whose targets are a teacher's answers instead of the labels.

    Args:
        answers: The teacher's probabilities `(n, 2)` and features `(n, D)`.
        *args: Arguments of `Batches`.
        **kwargs: Arguments of `Batches`.
    """

    def __init__(
        self, answers: Sequence[np.ndarray], *args: Any, **kwargs: Any
    ) -> None:
        self._answers = answers
        super().__init__(*args, **kwargs)

    def targets(self, where: np.ndarray) -> Any:
        """Returns the teacher's answers for the rows at `where`."""
        return tuple(answer[where] for answer in self._answers)


def teach(
    student: keras.Model,
    encoder: BertEncoder,
    answers: Sequence[np.ndarray],
    rows: Rows,
    recipe: Distillation,
    lengths: Sequence[int],
    *,
    seed: int,
) -> None:
    """Trains a student, which `build_classifier` built around `encoder`.

    Args:
        student: The student. Training changes its weights and leaves it uncompiled.
        encoder: The student's encoder.
        answers: The outputs of the teacher `with_features` for the rows.
        rows: The rows, in the student's ids.
        recipe: How to train.
        lengths: The lengths that batches may have.
        seed: Seed of the order.
    """
    training = recipe.training
    steps = steps_of(len(rows), training)
    model = with_features(student)
    model.compile(
        make_optimizer(model, encoder, training, steps),
        loss=["kl_divergence", "mean_squared_error"],
        loss_weights=[1.0, recipe.feature_weight],
    )
    batches = TaughtBatches(answers, rows, training.batch_size, lengths, seed)
    model.fit(
        batches,
        epochs=training.epochs,
        shuffle=False,  # `Batches` shuffles the rows.
        verbose=verbosity(),
    )
