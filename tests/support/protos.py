"""The two messages of TF Serving's configuration that no package ships for Python.

tensorflow-serving-api has `ModelServerConfig`, but not `BatchingParameters` (in
`servables/tensorflow/session_bundle_config.proto`) nor `MonitoringConfig` (in
`config/monitoring_config.proto`). Both are written down here with the names, numbers
and types of those files, in a descriptor pool of their own. Of `BatchingParameters` it
is the fields that TF Serving's batching guide describes; a text that uses another one
is refused here, though the server may know it.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import (
    descriptor_pb2,
    descriptor_pool,
    message_factory,
    wrappers_pb2,
)

_Field = descriptor_pb2.FieldDescriptorProto
_PACKAGE = "tensorflow.serving"
_INT64 = "google.protobuf.Int64Value"
_STRING = "google.protobuf.StringValue"

# message: {field: (number, type), ...}; a repeated scalar is a list of its type.
_MESSAGES: dict[str, dict[str, tuple[int, Any]]] = {
    "BatchingParameters": {
        "max_batch_size": (1, _INT64),
        "batch_timeout_micros": (2, _INT64),
        "max_enqueued_batches": (3, _INT64),
        "num_batch_threads": (4, _INT64),
        "thread_pool_name": (5, _STRING),
        "allowed_batch_sizes": (6, [_Field.TYPE_INT64]),
        "pad_variable_length_inputs": (7, _Field.TYPE_BOOL),
    },
    "PrometheusConfig": {
        "enable": (1, _Field.TYPE_BOOL),
        "path": (2, _Field.TYPE_STRING),
    },
    "MonitoringConfig": {
        "prometheus_config": (1, f"{_PACKAGE}.PrometheusConfig"),
    },
}


def _message_classes() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(
        name="keras_mha_tests/serving_config.proto",
        package=_PACKAGE,
        syntax="proto3",
        dependency=["google/protobuf/wrappers.proto"],
    )
    for message_name, fields in _MESSAGES.items():
        message = file.message_type.add(name=message_name)
        for name, (number, kind) in fields.items():
            field = message.field.add(name=name, number=number)
            field.label = _Field.LABEL_OPTIONAL
            if isinstance(kind, str):
                field.type = _Field.TYPE_MESSAGE
                field.type_name = f".{kind}"
            elif isinstance(kind, list):
                field.label = _Field.LABEL_REPEATED
                (field.type,) = kind
            else:
                field.type = kind
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(wrappers_pb2.DESCRIPTOR.serialized_pb)
    pool.AddSerializedFile(file.SerializeToString())
    return {
        name: message_factory.GetMessageClass(
            pool.FindMessageTypeByName(f"{_PACKAGE}.{name}")
        )
        for name in _MESSAGES
    }


_CLASSES = _message_classes()
BatchingParameters = _CLASSES["BatchingParameters"]
MonitoringConfig = _CLASSES["MonitoringConfig"]
