"""Export to TFLite files for LiteRT."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from keras_mha.export.device.form import Target
from keras_mha.export.files import check_overwrite, staging
from keras_mha.export.tflite.companions import write_companions
from keras_mha.export.tflite.file import LITERT, write_model_file
from keras_mha.export.tflite.inputs import FixedInputs
from keras_mha.export.tflite.mediapipe_file import write_mediapipe_file
from keras_mha.export.tflite.metadata import BertMetadata, RegexMetadata
from keras_mha.export.tflite.plan import Plan, make_plan
from keras_mha.export.tflite.quantization import Quantization
from keras_mha.export.tflite.report import TFLiteFile, TFLiteReport
from keras_mha.export.tflite.text import write_text_file


def export_tflite(
    model: keras.Model,
    directory: str | Path,
    *,
    sequence_lengths: Sequence[int] | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    batch_size: int | None = None,
    uint8_inputs: Sequence[str] = (),
    samples: Any,
    overwrite: bool | None = None,
    quantization: Quantization | None = None,
    representative_data: Any = None,
    target: Target = "cpu",
    text: bool = False,
    metadata: BertMetadata | RegexMetadata | None = None,
    tolerance: float = 1e-5,
    quantized_tolerance: float | None = None,
    signature_name: str = "serving_default",
    timeout: float = 600.0,
) -> TFLiteReport:
    """Writes `model` as `<directory>/model.tflite`, or a file for each length S.

    A file takes what the model takes and gives what it gives, under the model's own
    names in the signature `signature_name`. All its shapes are fixed and all its
    operations built in. Sizes that the model leaves free come from `shapes`, else from
    the samples. A model of ids of any length is the exception: it is written as
    `model_<S>.tflite` for each S of `sequence_lengths`, and shorter rows are padded.

    Ids are int32 `(batch_size, S)`, also where Keras calls them float32 because
    `keras.Input` was given no type. Integers of 64 bits become int32; everything that
    is not an integer, a boolean or float32 becomes float32.

    Two more kinds of file are available for models of ids. Both hold the same graph and
    weights:

    - `text_<S>.tflite`, with `text=True`, takes strings `(batch_size,)`. Its tokenizer
      is made of operations of tensorflow-text, which the interpreter must be given: in
      Python `InterpreterWithCustomOps(model_path=...,
      custom_op_registerers=tensorflow_text.tflite_registrar.SELECT_TFTEXT_OPS)`. None
      is a Flex operation. Texts too long for S lose their end, never their `[SEP]`.
    - `mediapipe_<S>.tflite`, with `metadata`, holds labels and a vocabulary, and runs
      unmodified in MediaPipe's TextClassifier, which cuts texts itself. Its tokenizer
      is not the model's: the report tells how many of the samples' texts it cuts into
      the same ids, and a warning says if these are not all.

    The directory also gets `vocab.txt` and `labels.txt` where they are known, snippets
    of Kotlin and Swift that were not run, and last `manifest.json`, with each file's
    inputs, outputs, oldest runtime and SHA-256.

    What is traced is a copy of the model in its device form
    (`keras_mha.export.device.form`), which shares the model's weights; the model itself
    stays as it is, and other threads may call it meanwhile. In that form our layers and
    stock Keras ones compute the same values in few operations, which delegates take:
    attention in its portable form (`keras_mha.attention.portable`), with one product
    for queries, keys and values. The values are the same for rows with at least one
    position that is not padding, whatever id stands for it. A layer without such a form
    is traced as it is, with a warning.

    ai-edge-litert loads each file in a fresh process that cannot import `keras_mha`,
    `keras` or `tensorflow`, and its values are compared with the model's on the
    samples, and on other rows made of their values, some of them padded; a file with
    metadata is also run by MediaPipe. Only when all are right are they renamed into
    place. After an error nothing new is left.

    Args:
        model: A Keras model on the TensorFlow backend, of numbers. With `text=True`,
            and optionally with `metadata`, a Functional or Sequential model with an
            input of strings, `(B,)` or `(B, 1)`, that calls a
            `keras_mha.text.WordpieceTokenizer` once. Layers that Keras quantized to
            int8 are dequantized, which is exact in the weights; Keras also rounds
            activations.
        directory: Where the files go; created if absent.
        sequence_lengths: The lengths S, for a model whose inputs leave their second
            axis free. Default: 128 for a model with one input of ids, `(B, T)`, with T
            free; the samples' length if the model refuses 128 ids.
        shapes: Sizes by input name, the batch's first, such as `{"ids": (1, 64)}`.
            Default: the model's own, and where it leaves them free the samples'.
        batch_size: The fixed number of rows. Default: the model's own if it has one,
            else 1.
        uint8_inputs: Names of inputs, such as images, that the file takes as uint8. The
            samples for them must be whole numbers from 0 to 255.
        samples: What one would hand to the model; see `export_saved_model`. Rows of ids
            may differ in length, and are padded. For a model of texts: texts.
        overwrite: Whether existing files of the same names are replaced, each in one
            step. Left out, they are replaced with a DeprecationWarning; a later version
            will refuse them.
        quantization: How to shrink the file. `"dynamic_int8"` keeps
            the weights of dense layers and embeddings in int8, a quarter of the size,
            and rounds what is multiplied by them row by row: the one to choose first.
            `"int8_dense"` also fixes the ranges of dense layers' inputs and outputs
            beforehand, from `representative_data`; attention stays float. `"float16"`
            halves the size, for delegates that compute in it.
        representative_data: More of what `samples` has, not longer than any S, from
            which `"int8_dense"` takes those ranges. Some hundred typical rows do.
            Default: the samples.
        target: `"cpu"`, or `"gpu"` for files that LiteRT's GPU delegate can take over
            completely: operations that it cannot take raise, and each row of an int8
            embedding keeps its scale, 12 bytes, without which the delegate answers
            wrongly.
        text: Whether to also write files that take strings; needs tensorflow-text.
        metadata: Labels, and for a model of ids the vocabulary and the samples' texts:
            a `BertMetadata`, or for a model of ids also a `RegexMetadata`; needs
            mediapipe. The files with it are for one row and one output of scores, one
            for each label.
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
            `text=True`, or mediapipe with `metadata`.
        ParityError: If a value differs by more than `tolerance`, or MediaPipe cuts no
            text into the ids of its sample.
        VerificationError: If a file does not run in the fresh process.
        TypeError: If an argument has the wrong type.
        ValueError: If the model takes strings, is quantized by Keras in another way
            than int8, computes in half precision, or needs operations that are not
            built into TFLite or that `target` cannot take; if a sample is longer than
            one of `sequence_lengths`, or an argument is out of its domain or would be
            ignored.

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
    directory = Path(directory)
    plan = make_plan(
        model,
        directory,
        sequence_lengths=sequence_lengths,
        shapes=shapes,
        batch_size=batch_size,
        uint8_inputs=uint8_inputs,
        samples=samples,
        overwrite=overwrite,
        quantization=quantization,
        representative_data=representative_data,
        target=target,
        text=text,
        metadata=metadata,
        tolerance=tolerance,
        quantized_tolerance=quantized_tolerance,
        signature_name=signature_name,
        timeout=timeout,
    )
    with staging(directory) as staged:
        files = [file for inputs in plan.files for file in _write(plan, inputs, staged)]
        companions = write_companions(
            staged,
            files,
            vocabulary=plan.vocabulary,
            labels=None if plan.metadata is None else plan.metadata.labels,
            signature_name=signature_name,
        )
        # Only now, when all are right; the manifest, with their hashes, comes last.
        written = [*(Path(file.path) for file in files), *companions]
        if overwrite is False:
            check_overwrite(
                [directory / path.relative_to(staged) for path in written],
                overwrite=overwrite,
            )
        final = [_publish(path, staged, directory) for path in written]
    files = [replace(file, path=path) for file, path in zip(files, final, strict=False)]
    _warn(plan.notes, files)
    return TFLiteReport(
        model=model.name,
        parameters=model.count_params(),
        keras=keras.__version__,
        tensorflow=tf.__version__,
        blocked=LITERT.blocked,
        signature_name=signature_name,
        quantization=quantization,
        target=target,
        notes=(*plan.endpoint.notes, *plan.notes),
        files=tuple(files),
        companions=tuple(final[len(files) :]),
    )


def _write(plan: Plan, inputs: FixedInputs, directory: Path) -> list[TFLiteFile]:
    """Writes and checks the files of one length, or the only one."""
    written = write_model_file(plan, inputs, directory / f"{inputs.name}.tflite")
    files = [written.file]
    if plan.writes_text:
        path = directory / f"text_{inputs.length}.tflite"
        files.append(write_text_file(plan, inputs, written, path))
    if plan.metadata is not None:
        path = directory / f"mediapipe_{inputs.length}.tflite"
        files.append(write_mediapipe_file(plan, inputs, written, path))
    return files


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
                f"than the samples', the first of them {check.other_ids[0]}",
                UserWarning,
                stacklevel=3,
            )
