"""Warm-up requests that TF Serving replays when it loads a version.

The file is `assets.extra/tf_serving_warmup_requests`, a TFRecord of `PredictionLog`
messages. Few of their fields are needed, so that the wire format is written by hand
and tensorflow-serving-api is not a dependency.

Source: tensorflow_serving/apis/prediction_log.proto, predict.proto, model.proto;
https://www.tensorflow.org/tfx/serving/saved_model_warmup.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import tensor_pb2

WARMUP_FILE = "assets.extra/tf_serving_warmup_requests"
MAX_RECORDS = 1000  # TF Serving refuses a file with more

# Field numbers of the messages named before the dots.
_PREDICTION_LOG_PREDICT_LOG = 6
_PREDICT_LOG_REQUEST = 1
_PREDICT_REQUEST_MODEL_SPEC = 1
_PREDICT_REQUEST_INPUTS = 2
_MODEL_SPEC_SIGNATURE_NAME = 3
_MAP_KEY, _MAP_VALUE = 1, 2
_LENGTH_DELIMITED = 2


def write_warmup(saved_model: Path, rows: Sequence[Mapping[str, np.ndarray]]) -> None:
    """Writes one request for each of `rows` into the SavedModel at `saved_model`.

    Args:
        saved_model: The SavedModel's directory.
        rows: Arrays by input name, with a batch dimension.
    """
    path = saved_model / WARMUP_FILE
    path.parent.mkdir()
    with tf.io.TFRecordWriter(str(path)) as writer:
        for row in rows:
            writer.write(encode_request(row))


def read_warmup(saved_model: Path) -> list[dict[str, np.ndarray]]:
    """Reads what `write_warmup` wrote."""
    records: Any = tf.data.TFRecordDataset(str(saved_model / WARMUP_FILE))
    return [decode_request(record) for record in records.as_numpy_iterator()]


def encode_request(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Returns a `PredictionLog` that asks `serving_default` for an answer to `arrays`.

    Example:

    >>> import numpy as np
    >>> from keras_mha.export.saved_model.warmup import decode_request, encode_request
    >>> request = encode_request({"x": np.array([[1, 2]], "int32")})
    >>> decode_request(request)["x"].tolist()
    [[1, 2]]
    """
    inputs = b"".join(
        _field(
            _PREDICT_REQUEST_INPUTS,
            _field(_MAP_KEY, name.encode())
            + _field(_MAP_VALUE, tf.make_tensor_proto(array).SerializeToString()),
        )
        for name, array in arrays.items()
    )
    model_spec = _field(_MODEL_SPEC_SIGNATURE_NAME, b"serving_default")
    request = _field(_PREDICT_REQUEST_MODEL_SPEC, model_spec) + inputs
    return _field(_PREDICTION_LOG_PREDICT_LOG, _field(_PREDICT_LOG_REQUEST, request))


def decode_request(record: bytes) -> dict[str, np.ndarray]:
    """Returns the arrays of a record that `encode_request` wrote."""
    predict_log = dict(_fields(record))[_PREDICTION_LOG_PREDICT_LOG]
    request = dict(_fields(predict_log))[_PREDICT_LOG_REQUEST]
    arrays = {}
    for number, payload in _fields(request):
        if number == _PREDICT_REQUEST_INPUTS:
            entry = dict(_fields(payload))
            tensor: Any = tensor_pb2  # its stub lacks the message
            proto = tensor.TensorProto.FromString(entry[_MAP_VALUE])
            arrays[entry[_MAP_KEY].decode()] = tf.make_ndarray(proto)
    return arrays


def _field(number: int, payload: bytes) -> bytes:
    return _varint(number << 3 | _LENGTH_DELIMITED) + _varint(len(payload)) + payload


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    position = 0
    while position < len(message):
        key, position = _read_varint(message, position)
        length, position = _read_varint(message, position)
        yield key >> 3, message[position : position + length]
        position += length


def _varint(value: int) -> bytes:
    groups = []
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])


def _read_varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, position
