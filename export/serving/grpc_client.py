"""Classifies texts on a TF Serving server over gRPC.

    python export/serving/grpc_client.py "a fine film" --server localhost:8500

Needs tensorflow-serving-api: pip install "keras-mha[serving]".
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from answers import Answer, add_arguments, choose, show

try:
    import grpc
    import numpy as np
    import tensorflow as tf
    from tensorflow_serving.apis import (
        get_model_metadata_pb2,
        model_pb2,
        predict_pb2,
        prediction_service_pb2_grpc,
    )
except ImportError as error:
    sys.exit(f"{error}: pip install 'keras-mha[serving]'")

SIGNATURE = "serving_default"


class ServerError(RuntimeError):
    """The server is unreachable, or its answer is unusable."""


def model_spec(model: str, version: int | None = None, label: str | None = None) -> Any:
    """Names the model, and its version by number or label."""
    spec = model_pb2.ModelSpec(name=model, signature_name=SIGNATURE)
    if version is not None:
        spec.version.value = version
    elif label is not None:
        spec.version_label = label
    return spec


def only_input(stub: Any, spec: Any, timeout: float) -> str:
    """Asks the server for the name of the signature's only input, which takes text."""
    answer = stub.GetModelMetadata(
        get_model_metadata_pb2.GetModelMetadataRequest(
            model_spec=spec, metadata_field=["signature_def"]
        ),
        timeout=timeout,
    )
    signatures = get_model_metadata_pb2.SignatureDefMap()
    answer.metadata["signature_def"].Unpack(signatures)
    inputs = signatures.signature_def[SIGNATURE].inputs
    dtypes = {name: tf.as_dtype(info.dtype).name for name, info in inputs.items()}
    if list(dtypes.values()) != ["string"]:
        raise ServerError(
            f"The signature {SIGNATURE!r} must have one input, of strings. "
            f"The server's has: {dtypes}"
        )
    return next(iter(dtypes))


def classify(
    server: str,
    spec: Any,
    texts: Sequence[str],
    labels: Sequence[str],
    *,
    output: str = "probabilities",
    timeout: float = 10.0,
) -> list[Answer]:
    """Classifies `texts` in one request.

    Args:
        server: `host:port` of the server's gRPC endpoint.
        spec: The model; see `model_spec`.
        texts: The texts, one string for each row.
        labels: The labels, in the model's order.
        output: The name of the output with the probabilities.
        timeout: Seconds to wait for each of the two answers.

    Returns:
        One answer for each text.

    Raises:
        ServerError: If the server gives no usable answer.
    """
    with grpc.insecure_channel(server) as channel:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        try:
            name = only_input(stub, spec, timeout)
            request = predict_pb2.PredictRequest(
                model_spec=spec, output_filter=[output]
            )
            request.inputs[name].CopyFrom(tf.make_tensor_proto(list(texts), tf.string))
            answer = stub.Predict(request, timeout=timeout)
        except grpc.RpcError as error:
            raise ServerError(f"{server}: {describe(error)}") from error
    if output not in answer.outputs:
        raise ServerError(
            f"{server}: the answer has no output {output!r}. "
            f"It has: {sorted(answer.outputs)}"
        )
    rows = np.asarray(tf.make_ndarray(answer.outputs[output]))
    if rows.shape != (len(texts), len(labels)):
        raise ServerError(
            f"{server}: {output!r} must have the shape {(len(texts), len(labels))}, "
            f"a row for each text and a column for each label. Received: {rows.shape}"
        )
    try:
        return choose(rows.tolist(), labels)
    except ValueError as error:
        raise ServerError(f"{server}: {error}") from error


def describe(error: grpc.RpcError) -> str:
    """Returns the status code of a failed call, and the server's message."""
    if isinstance(error, grpc.Call):
        return f"{error.code().name}: {error.details()}"
    return str(error)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(description="Classify texts over gRPC.")
    add_arguments(parser)
    parser.add_argument(
        "--server", default="localhost:8500", help="host:port; default: %(default)s"
    )
    options = parser.parse_args(arguments)
    spec = model_spec(options.model, options.version, options.label)
    try:
        answers = classify(
            options.server, spec, options.texts, options.labels, timeout=options.timeout
        )
    except ServerError as error:
        print(error, file=sys.stderr)
        return 1
    print(show(answers, options.texts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
