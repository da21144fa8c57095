"""Stand-ins for TF Serving, which is not available here: small servers on loopback.

They check a request as the documentation of TF Serving's REST API and the messages of
its gRPC API state, and answer with probabilities that follow from the text, so that a
client that mixes up rows or columns is caught. They are not the server: what they show
is that the clients speak the documented protocol.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from concurrent import futures
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
import tensorflow as tf
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    predict_pb2,
    prediction_service_pb2_grpc,
)

VERSIONS = (1, 2)
VERSION_LABELS: Mapping[str, int] = {"stable": 1, "canary": 2}
SLOW = "wait for it"
"""A text that is never answered."""


def probabilities(text: str, version: int) -> list[float]:
    """Another pair for each text and version; dyadic, so exact in float32."""
    positive = (len(text) % 61 + version) / 64
    return [1 - positive, positive]


def find_version(path: str) -> int | None:
    """The version that a REST path asks for, None where nothing is served."""
    newest = max(VERSIONS)
    paths = {"/v1/models/sentiment:predict": newest}
    for version in VERSIONS:
        paths[f"/v1/models/sentiment/versions/{version}:predict"] = version
    for label, version in VERSION_LABELS.items():
        paths[f"/v1/models/sentiment/labels/{label}:predict"] = version
    return paths.get(path)


class _RestHandler(BaseHTTPRequestHandler):
    server: StandInRest  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_POST(self) -> None:
        version = find_version(self.path)
        if version is None:
            message = f"Servable not found for request: {self.path}"
            return self.answer(404, {"error": message})
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        texts = body.get("instances") if isinstance(body, dict) else None
        if not texts or not all(isinstance(text, str) for text in texts):
            return self.answer(400, {"error": "instances must be strings"})
        if SLOW in texts:
            self.server.released.wait()
            return None
        if self.server.canned is not None:
            return self.answer(200, self.server.canned)
        rows = [probabilities(text, version) for text in texts]
        return self.answer(200, {"predictions": rows})

    def answer(self, status: int, body: Any) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's.
        """Says nothing: the name and arguments are http.server's."""


class StandInRest(ThreadingHTTPServer):
    """Answers POST /v1/models/sentiment[/versions/N|/labels/L]:predict."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _RestHandler)
        self.canned: Any = None
        self.released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def stand_in_rest() -> Iterator[StandInRest]:
    """Runs a StandInRest for the time of a `with` block."""
    with StandInRest() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown()
            thread.join()


class StandInGrpc(prediction_service_pb2_grpc.PredictionServiceServicer):
    """Answers Predict and GetModelMetadata for the model `sentiment`."""

    def __init__(self) -> None:
        self.address = ""
        self.inputs = {"text": tf.string}
        self.columns = 2
        self.released = threading.Event()

    def version(self, spec: Any, context: grpc.ServicerContext) -> int:
        """The version that is asked for; ends the call where nothing is served."""
        if spec.signature_name not in {"", "serving_default"}:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no such signature")
        choice = spec.WhichOneof("version_choice")
        if choice == "version":
            found = spec.version.value
        elif choice == "version_label":
            found = VERSION_LABELS.get(spec.version_label, 0)
        else:
            found = max(VERSIONS)
        if spec.name != "sentiment" or found not in VERSIONS:
            context.abort(grpc.StatusCode.NOT_FOUND, "Servable not found for request")
        return found

    def GetModelMetadata(  # noqa: N802 - the name is the service's.
        self, request: Any, context: grpc.ServicerContext
    ) -> Any:
        self.version(request.model_spec, context)
        if list(request.metadata_field) != ["signature_def"]:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "unknown metadata_field")
        signatures = get_model_metadata_pb2.SignatureDefMap()
        signature = signatures.signature_def["serving_default"]
        for name, dtype in self.inputs.items():
            signature.inputs[name].dtype = dtype.as_datatype_enum
        response = get_model_metadata_pb2.GetModelMetadataResponse()
        response.metadata["signature_def"].Pack(signatures)
        return response

    def Predict(  # noqa: N802 - the name is the service's.
        self, request: Any, context: grpc.ServicerContext
    ) -> Any:
        version = self.version(request.model_spec, context)
        if set(request.inputs) != set(self.inputs):
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "inputs do not match")
        strings = tf.make_ndarray(request.inputs["text"])
        texts = [value.decode("utf-8") for value in strings]
        if SLOW in texts:
            self.released.wait()
        rows = [probabilities(text, version)[: self.columns] for text in texts]
        response = predict_pb2.PredictResponse()
        for name in {"probabilities"} & set(request.output_filter):
            response.outputs[name].CopyFrom(tf.make_tensor_proto(rows, tf.float32))
        return response


@contextmanager
def stand_in_grpc() -> Iterator[StandInGrpc]:
    """Runs a StandInGrpc for the time of a `with` block."""
    service = StandInGrpc()
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=2))
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    service.address = f"127.0.0.1:{port}"
    server.start()
    try:
        yield service
    finally:
        service.released.set()
        server.stop(grace=None).wait()
