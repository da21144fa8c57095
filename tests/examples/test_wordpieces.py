"""The tokenizer in the graph beside the checkpoint's own, on all texts there are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from keras_mha.text import WordpieceTokenizer

MODULES = ("checkpoint", "data", "domains", "download")
LONGEST = 512


@pytest.mark.slow
def test_the_same_ids_as_the_checkpoints_tokenizer(example: dict[str, Any]) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="needs `transformers`")
    directory = example["checkpoint"].load_checkpoint()
    theirs = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    theirs.no_padding()
    theirs.enable_truncation(LONGEST)
    ours = WordpieceTokenizer(directory / "vocab.txt", LONGEST)
    texts = example["data"].load_reviews().texts.tolist()
    for rated in example["domains"].load_domains().values():
        texts += rated.texts.tolist()
    assert len(texts) == 23_703

    differing = []
    for start in range(0, len(texts), 1000):
        some = texts[start : start + 1000]
        expected = [encoding.ids for encoding in theirs.encode_batch(some)]
        rows = ours(np.array(some, object)).numpy()
        found = [row[row != 0].tolist() for row in rows]
        differing += [
            text for text, a, b in zip(some, found, expected, strict=True) if a != b
        ]
    # tensorflow-text folds letters by Unicode's NFKC_Casefold, which makes three
    # characters of "½"; BERT lowers letters, and decomposes them by NFD alone.
    assert len(differing) == 2
    assert all("9 ½ Weeks" in text for text in differing)


def test_what_tensorflow_text_folds_and_bert_does_not() -> None:
    pieces = ["1", "##\N{FRACTION SLASH}", "##2", "2", "\N{GREEK SMALL LETTER SIGMA}"]
    tokenizer = WordpieceTokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *pieces], 8)
    final_sigma = "\N{GREEK SMALL LETTER FINAL SIGMA}"
    found = tokenizer(np.array(["½", "²", final_sigma], object)).numpy()
    assert found[:, 1:-1].tolist() == [[4, 5, 6], [7, 3, 0], [8, 3, 0]]
