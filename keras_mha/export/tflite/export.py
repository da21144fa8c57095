"""Export to TFLite files for LiteRT, one for each sequence length."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from keras_mha.export.files import check_overwrite, staging
from keras_mha.export.parity import check_timeout, check_tolerance
from keras_mha.export.tflite.arguments import (
    check_precision,
    check_size,
    check_sizes,
    check_target,
    pad,
    tolerance_of_rounded,
)
from keras_mha.export.tflite.companions import write_companions
from keras_mha.export.tflite.file import LITERT, Settings, write_ids_file
from keras_mha.export.tflite.mediapipe_file import complete, write_mediapipe_file
from keras_mha.export.tflite.metadata import BertMetadata, Metadata, RegexMetadata
from keras_mha.export.tflite.quantization import check_quantization
from keras_mha.export.tflite.report import TFLiteFile, TFLiteReport
from keras_mha.export.tflite.source import TextModel, read_source
from keras_mha.export.tflite.text import check_text, write_text_file
from keras_mha.layers.arguments import check_flag


def export_tflite(
    model: keras.Model,
    directory: str | Path,
    *,
    sequence_lengths: Sequence[int] = (128,),
    batch_size: int = 1,
    samples: Any,
    overwrite: bool | None = None,
    quantization: str | None = None,
    representative_data: Any = None,
    target: str = "cpu",
    text: bool = False,
    metadata: BertMetadata | RegexMetadata | None = None,
    tolerance: float = 1e-5,
    quantized_tolerance: float | None = None,
    signature_name: str = "serving_default",
    timeout: float = 600.0,
) -> TFLiteReport:
    """Writes `model` as `<directory>/model_<S>.tflite` for each length S.

    A file takes int32 ids `(batch_size, S)` and gives the model's outputs, both under
    the model's own names in the signature `signature_name`. All its shapes are fixed
    and all its operations built in. Shorter texts are padded with 0.

    Two more kinds of files can be had besides. Both have the same graph in them, and
    the same weights:

    - `text_<S>.tflite`, with `text=True`, takes strings `(batch_size,)`. Its tokenizer
      is made of operations of tensorflow-text, which are to be given to the
      interpreter: in Python `InterpreterWithCustomOps(model_path=...,
      custom_op_registerers=tensorflow_text.tflite_registrar.SELECT_TFTEXT_OPS)`. None
      is a Flex operation. Texts too long for S lose their end, never their `[SEP]`.
    - `mediapipe_<S>.tflite`, with `metadata`, has labels and a vocabulary in it, and
      runs unmodified in MediaPipe's TextClassifier, which cuts texts itself. Its
      tokenizer is not the model's: the report tells how many of the samples' texts it
      cuts into the same ids, and a warning that it does not so cut all of them.

    Beside them stand `vocab.txt` and `labels.txt` where they are known; snippets of
    Kotlin and Swift that were not run; and `manifest.json`, written as the last, with
    each file's inputs, outputs, oldest runtime and SHA-256.

    The model is traced in its device form (`keras_mha.export.device.form`), in which
    our layers and stock Keras ones compute the same values in few operations, which
    delegates take: attention in its portable form (`keras_mha.attention.portable`),
    with one product for queries, keys and values. The values are the same for rows
    with at least one id that is not padding. Layers that are not known to have such a
    form are traced as they are, with a warning; outputs that are pooled by mask let
    attention skip what it gives to padding.

    Each file is loaded by ai-edge-litert in a fresh process that can import none of
    `keras_mha`, `keras` and `tensorflow`, and its values are compared with the model's
    on the padded samples; one with metadata also by MediaPipe, where that is installed.
    Only when all are right are they renamed into place. After an error nothing new is
    left.

    Args:
        model: A built Keras model on the TensorFlow backend with one integer input
            `(B, T)`, the ids. With `text=True`, and perhaps with `metadata`, one with
            an input of strings, `(B,)` or `(B, 1)`, Functional or Sequential, that
            calls a `keras_mha.text.WordpieceTokenizer` once. Layers that Keras
            quantized to int8 are dequantized, which is exact in the weights; Keras
            also rounds activations.
        directory: Where the files go; made if absent.
        sequence_lengths: The lengths S.
        batch_size: The fixed number of rows.
        samples: Ids: an array `(n, T)`, or a list of rows that may differ in length.
            For a model of texts: texts.
        overwrite: Whether existing files of the same names are replaced, each in one
            step. Left out, they are replaced with a DeprecationWarning; a later version
            will refuse them.
        quantization: How the file's numbers are made smaller. `"dynamic_int8"` keeps
            the weights of dense layers and embeddings in int8, a quarter of the size,
            and rounds what is multiplied by them row by row: the one to choose first.
            `"int8_dense"` also fixes the ranges of dense layers' inputs and outputs
            beforehand, from `representative_data`; attention stays float. `"float16"`
            halves the size, for delegates that compute in it.
        representative_data: More of what `samples` has, not longer than any S, from
            which `"int8_dense"` takes those ranges. Some hundred typical rows do.
        target: `"cpu"`, or `"gpu"` for files that LiteRT's GPU delegate is to take
            over whole: layers that stay as they are then raise instead of warning, and
            each row of an int8 embedding keeps a scale of its own, 12 bytes, without
            which the delegate answers wrongly.
        text: Whether to write files that take strings besides; needs tensorflow-text.
        metadata: Labels, and for a model of ids the vocabulary and the samples' texts:
            a `BertMetadata`, or for a model of ids perhaps a `RegexMetadata`. The files
            with it are for one row and one output of scores, one for each label.
        tolerance: Largest absolute difference allowed in any output of a float file.
            The default suits probabilities (measured: under 1e-6).
        quantized_tolerance: The same for quantized files, and for models that Keras
            quantized. Defaults, for probabilities, to 0.002 for `"float16"` and to
            0.05 otherwise.
        signature_name: Name of the signature.
        timeout: Seconds that the check of one file may take.

    Returns:
        What was written, and how far its values are from the model's.

    Raises:
        FileExistsError: If a file exists and `overwrite` is False.
        ImportError: If ai-edge-litert is not installed, or tensorflow-text with
            `text=True`.
        ParityError: If a value differs by more than `tolerance`, or MediaPipe cuts no
            text into the ids of its sample.
        VerificationError: If a file does not run in the fresh process.
        TypeError: If an argument has the wrong type.
        ValueError: If the model is no such model, is quantized by Keras in another
            way than int8, computes in half precision, needs operations that TFLite
            has not built in, or has a layer that `target` cannot take; if a sample is
            longer than one of `sequence_lengths`, or an argument is out of its domain
            or would be ignored.

    Warns:
        UserWarning: For each layer that was exported as it is, and each file of which
            MediaPipe cuts some texts into other ids.

    Example:

    >>> import tempfile
    >>> import keras
    >>> from keras_mha.export import export_tflite
    >>> ids = keras.Input((None,), dtype="int32", name="ids")
    >>> vectors = keras.layers.Embedding(11, 5)(ids)
    >>> pooled = keras.layers.GlobalAveragePooling1D()(vectors)
    >>> head = keras.layers.Dense(2, activation="softmax", name="probabilities")
    >>> model = keras.Model(ids, head(pooled))
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     report = export_tflite(
    ...         model, directory, sequence_lengths=(7,), samples=[[3, 1, 4], [1, 5]]
    ...     )
    >>> file = report.files[0]
    >>> file.inputs[0].name, file.inputs[0].shape, file.outputs[0].name
    ('ids', (1, 7), 'probabilities')
    >>> file.parity.max_absolute_difference < 1e-5
    True
    """
    if importlib.util.find_spec("ai_edge_litert") is None:
        raise ImportError(
            "`export_tflite` needs ai-edge-litert: pip install 'keras-mha[tflite]'"
        )
    lengths = check_sizes("sequence_lengths", sequence_lengths)
    batch_size = check_size("batch_size", batch_size)
    check_tolerance(tolerance)
    check_timeout(timeout)
    if overwrite is not None:
        overwrite = check_flag(overwrite, "overwrite")
    directory = Path(directory)
    names = [f"model_{length}.tflite" for length in lengths]
    names += [f"text_{length}.tflite" for length in lengths if text]
    if metadata is not None:
        names += [f"mediapipe_{length}.tflite" for length in lengths]
    check_overwrite(
        [directory / name for name in [*names, "manifest.json"]], overwrite=overwrite
    )
    check_quantization(quantization, representative_data)
    if check_flag(text, "text"):
        check_text(target)
    source = read_source(
        model,
        samples,
        representative_data,
        text=text or _is_of_texts(model, metadata),
    )
    if metadata is not None:
        metadata = complete(metadata, source, batch_size=batch_size, length=lengths[0])
    rounded = check_precision(source.model)
    settings = Settings(
        batch_size=batch_size,
        quantization=quantization,
        target=target,
        signature_name=signature_name,
        tolerance=tolerance,
        rounded_tolerance=tolerance_of_rounded(
            quantized_tolerance, quantization, rounded
        ),
        timeout=timeout,
        notes=check_target(source.model, target, quantization),
    )
    with staging(directory) as staged:
        files = []
        for length in lengths:
            endpoint, ids = source.describe(pad(source.rows, length, "samples"))
            ranges = (
                None
                if source.ranges is None
                else pad(source.ranges, length, "representative_data")
            )
            of_ids = write_ids_file(
                endpoint, ids, ranges, staged / f"model_{length}.tflite", settings
            )
            files.append(of_ids)
            if text and source.whole is not None:
                path = staged / f"text_{length}.tflite"
                files.append(write_text_file(source.whole, of_ids, path, settings))
            if metadata is not None:
                path = staged / f"mediapipe_{length}.tflite"
                files.append(
                    write_mediapipe_file(
                        endpoint, ids, metadata, of_ids, path, settings
                    )
                )
        beside = write_companions(
            staged,
            files,
            vocabulary=_vocabulary(source.whole, metadata),
            labels=None if metadata is None else metadata.labels,
            signature_name=signature_name,
        )
        # Only now, when all are right; the manifest, with their hashes, comes last.
        written = [Path(path) for path in [*(file.path for file in files), *beside]]
        if overwrite is False:
            check_overwrite(
                [directory / path.relative_to(staged) for path in written],
                overwrite=overwrite,
            )
        final = [_publish(path, staged, directory) for path in written]
    files = [replace(file, path=path) for file, path in zip(files, final, strict=False)]
    _warn(settings.notes, files)
    return TFLiteReport(
        model=model.name,
        parameters=model.count_params(),
        keras=keras.__version__,
        tensorflow=tf.__version__,
        blocked=LITERT.blocked,
        signature_name=signature_name,
        quantization=quantization,
        target=target,
        notes=settings.notes,
        files=tuple(files),
        companions=tuple(final[len(files) :]),
    )


def _is_of_texts(model: keras.Model, metadata: Any) -> bool:
    """Whether a model of texts is to become files without a tokenizer in the graph."""
    inputs = getattr(model, "inputs", None) or ()
    return metadata is not None and any(x.dtype == "string" for x in inputs)


def _vocabulary(
    whole: TextModel | None, metadata: Metadata | None
) -> Sequence[str] | None:
    if whole is not None:
        return whole.tokenizer.get_vocabulary()
    return None if metadata is None else metadata.vocabulary


def _publish(path: Path, staged: Path, directory: Path) -> str:
    final = directory / path.relative_to(staged)
    final.parent.mkdir(exist_ok=True)
    path.replace(final)
    return str(final)


def _warn(notes: Sequence[str], files: Sequence[TFLiteFile]) -> None:
    for note in notes:
        warnings.warn(f"`export_tflite`: {note}", UserWarning, stacklevel=3)
    for file in files:
        check = file.mediapipe
        if check is not None and check.other_ids:
            warnings.warn(
                f"`export_tflite`: in {Path(file.path).name}, MediaPipe cuts "
                f"{check.texts - check.same_ids} of {check.texts} texts into other ids "
                f"than the samples' own, the first of them {check.other_ids[0]}",
                UserWarning,
                stacklevel=3,
            )
