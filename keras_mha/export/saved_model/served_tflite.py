"""Writes `model.tflite` next to a SavedModel; TF Serving runs it instead if asked.

With `--prefer_tflite_model` the server loads that file in place of `saved_model.pb`. It
knows only builtin operations, resizes the inputs to each request's batch, and reads no
signature of the file's own table: it calls inputs and outputs by the names of their
tensors, under `serving_default`.

Source: `tflite_session.cc` and `saved_model_bundle_factory.cc` of TF Serving. The flag
is experimental there. The server itself was not run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from keras_mha.export.parity import Arrays, check_parity
from keras_mha.export.report import TensorInfo
from keras_mha.export.runtimes import tflite_schema
from keras_mha.export.runtimes.descriptor import File
from keras_mha.export.runtimes.fresh_process import run_in_fresh_process
from keras_mha.export.runtimes.litert import RUNTIME as LITERT
from keras_mha.export.saved_model.report import ServedTFLite
from keras_mha.export.tflite.file import convert

FILE = "model.tflite"
_SIGNATURE = "serving_default"


def write_served_tflite(saved_model: Path) -> None:
    """Converts the signature `serving_default`, with free sizes, into the same folder.

    Raises:
        ValueError: If it needs operations that TFLite has not built in, or TF Serving
            could not tell its inputs and outputs apart.
    """
    content = convert(saved_model, _SIGNATURE, None, ())
    (saved_model / FILE).write_bytes(named_by_signature(content))


def named_by_signature(content: bytes) -> bytes:
    """Names the tensors of a file's inputs and outputs as its signature does.

    Raises:
        ValueError: If a tensor would need two names.
    """
    model = tflite_schema.unpack(content)
    (signature,) = model.signatureDefs
    tensors = model.subgraphs[signature.subgraphIndex].tensors
    entries = [*signature.inputs, *signature.outputs]
    for entry in entries:
        tensors[entry.tensorIndex].name = entry.name
    shared = [e.name for e in entries if tensors[e.tensorIndex].name != e.name]
    if shared:
        raise ValueError(
            "`with_tflite` is for models none of whose outputs is an input or another "
            "output as it is: TF Serving tells them apart by the names of their "
            f"tensors. Received: {[name.decode() for name in shared]}"
        )
    return tflite_schema.pack(model)


def check_served_tflite(
    saved_model: Path,
    cases: Sequence[Arrays],
    wanted: Sequence[Arrays],
    inputs: tuple[TensorInfo, ...],
    outputs: tuple[TensorInfo, ...],
    *,
    rows: int,
    drawn: int,
    tolerance: float,
    timeout: float,
) -> ServedTFLite:
    """Compares the file's values with the model's, in batches of the cases' sizes.

    Args:
        saved_model: The directory that the file is in.
        cases: The inputs of each run.
        wanted: The model's answers.
        inputs: The signature's inputs; reported.
        outputs: Its outputs; reported.
        rows: The number of samples; reported.
        drawn: How many of the last runs have inputs that were no samples.
        tolerance: As in `export_saved_model`.
        timeout: As there.

    Raises:
        ParityError: If a name or a value differs.
        VerificationError: If the file does not run in the fresh process.
    """
    file = File(saved_model / FILE, "tflite", _SIGNATURE)
    answers, facts = run_in_fresh_process(LITERT, file, cases, timeout=timeout)
    parity = check_parity(
        wanted,
        answers,
        tolerance=tolerance,
        samples=rows,
        drawn=drawn,
        runtime=facts["runtime"],
        runtime_version=facts["version"],
    )
    return ServedTFLite(_SIGNATURE, inputs, outputs, parity)
