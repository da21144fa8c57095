"""Reads what a SavedModel's runtimes need to know of it, without running it."""

from __future__ import annotations

from pathlib import Path

from google.protobuf.message import DecodeError
from tensorflow.core.protobuf import meta_graph_pb2, saved_model_pb2

from keras_mha.export.cases import Opened, Samples
from keras_mha.export.files import highest_version
from keras_mha.export.runtimes.descriptor import File


def open_file(
    path: Path, samples: Samples, *, signature_name: str, timeout: float
) -> Opened:
    """Reads a SavedModel, or the highest version in a directory of them.

    Args:
        path: The directory.
        samples: The model and its samples.
        signature_name: The signature to run.
        timeout: Not needed: reading is quick.

    Raises:
        ValueError: If it cannot be read, or its inputs are not the model's.
    """
    del timeout
    if not (path / "saved_model.pb").is_file():
        path /= str(highest_version(path))
    try:
        file = describe_file(path, read_meta_graph(path), signature_name)
    except (OSError, DecodeError, IndexError) as error:
        raise ValueError(f"{path} cannot be read as a SavedModel: {error}") from error
    if set(file.inputs) != set(samples.arrays):
        raise ValueError(
            f"the signature {signature_name!r} of {path} must have the model's inputs "
            f"{sorted(samples.arrays)}, and has {sorted(file.inputs)}"
        )
    return Opened(file, samples.in_batches)


def read_meta_graph(path: Path) -> meta_graph_pb2.MetaGraphDef:
    """Parses the SavedModel at `path`."""
    content = (path / "saved_model.pb").read_bytes()
    return saved_model_pb2.SavedModel.FromString(content).meta_graphs[0]


def describe_file(
    path: Path,
    meta_graph: meta_graph_pb2.MetaGraphDef,
    signature_name: str = "serving_default",
) -> File:
    """Describes a signature to the runtimes; one that is absent has no inputs."""
    graph = meta_graph.graph_def
    functions = {function.signature.name for function in graph.library.function}
    nodes = [*graph.node, *(n for f in graph.library.function for n in f.node_def)]
    signature = meta_graph.signature_def[signature_name]
    return File(
        path,
        "saved_model",
        signature_name,
        inputs={name: info.name for name, info in signature.inputs.items()},
        outputs={name: info.name for name, info in signature.outputs.items()},
        operations=sorted({node.op for node in nodes} - functions),
    )
