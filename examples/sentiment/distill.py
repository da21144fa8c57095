"""A small model taught by the fine-tuned one: fewer blocks, and fewer words.

The student is the first blocks of the same checkpoint, over the words that it is
trained on. It learns the teacher's probabilities, and its features: the mean of the
tokens that the teacher's last layer reads the probabilities off.

Sources: Hinton et al. 2015, "Distilling the knowledge in a neural network"; Romero et
al. 2015, "FitNets" (features as well); Sanh et al. 2019, "DistilBERT" (starts as blocks
of what was pretrained); Abdaoui et al. 2020, "Load what you need" (words not needed
are left out).
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
    """The ids, ascending, of the tokens in rows, and of those that other texts need.

    Texts are cut into the longest pieces that there are, so these rows are cut as
    before. Other words may be cut smaller: into the single characters, at worst, of
    which these rows' words are made.
    """
    found = {vocabulary[i] for row in rows.ids for i in row}
    characters = set().union(*found)
    found |= {"[PAD]", "[UNK]", *characters, *(f"##{each}" for each in characters)}
    return np.flatnonzero([token in found for token in vocabulary])


def first_blocks(
    encoder: BertEncoder, blocks: int, tokens: np.ndarray | None = None
) -> BertEncoder:
    """A new encoder of the first blocks of another, and with its weights.

    Args:
        encoder: The other, without a pooler.
        blocks: How many there are to be.
        tokens: The ids of the tokens it is to have, in their new order. Defaults to
            all.

    Raises:
        ValueError: If the other has not as many blocks.
    """
    if not 1 <= blocks <= encoder.num_layers:
        raise ValueError(
            f"`blocks` must be from 1 to {encoder.num_layers}. Received: {blocks}"
        )
    if tokens is None:
        tokens = np.arange(encoder.vocabulary_size)
    heads = encoder.num_heads
    made = BertEncoder.from_config(
        {
            **encoder.get_config(),
            "vocabulary_size": len(tokens),
            "num_layers": blocks,
            "num_heads": heads if isinstance(heads, int) else heads[:blocks],
        }
    )
    made.build(None)
    mine: Any = made.embedding
    theirs: Any = encoder.embedding
    table = np.asarray(theirs.token_embedding.embeddings)
    mine.token_embedding.embeddings.assign(table[tokens])
    mine.position_embedding.assign(theirs.position_embedding)
    for own, other in (
        (made.token_type_embedding, encoder.token_type_embedding),
        (made.embedding_norm, encoder.embedding_norm),
        *zip(made.blocks, encoder.blocks[:blocks], strict=True),
    ):
        own.set_weights(other.get_weights())
    return made


def with_features(classifier: keras.Model) -> keras.Model:
    """The classifier with two outputs: probabilities `(B, 2)` and features `(B, D)`."""
    features: Any = classifier.get_layer("mean")
    return keras.Model(classifier.inputs, [*classifier.outputs, features.output])


class TaughtBatches(Batches):
    """Batches of which a teacher's answers are learned, not the labels.

    Args:
        answers: The teacher's probabilities `(n, 2)` and features `(n, D)`.
        *args: As those of `Batches`.
        **kwargs: Likewise.
    """

    def __init__(
        self, answers: Sequence[np.ndarray], *args: Any, **kwargs: Any
    ) -> None:
        self._answers = answers
        super().__init__(*args, **kwargs)

    def targets(self, where: np.ndarray) -> Any:
        """The teacher's answers for the rows at `where`."""
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
    """Trains a student, which `build_classifier` made of `encoder`.

    Args:
        student: It. Its weights are changed; it is not compiled.
        encoder: Part of it.
        answers: What the teacher `with_features` says of the rows.
        rows: The rows as the student has them.
        recipe: How.
        lengths: The lengths that batches may have.
        seed: Of the order.
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
        shuffle=False,  # The batches shuffle themselves.
        verbose=verbosity(),
    )
