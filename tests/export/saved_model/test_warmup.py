from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from tensorflow_serving.apis import prediction_log_pb2

from keras_mha.export import export_saved_model
from keras_mha.export.saved_model.warmup import (
    WARMUP_FILE,
    decode_request,
    encode_request,
)
from tests.support import small_models


def real_request(record: bytes) -> Any:
    """The record as tensorflow-serving-api reads it."""
    log = prediction_log_pb2.PredictionLog.FromString(record)
    assert log.WhichOneof("log_type") == "predict_log"
    # Nothing that the real messages do not know.
    assert log.SerializeToString(deterministic=True) == _known(record)
    return log.predict_log.request


def _known(record: bytes) -> bytes:
    log = prediction_log_pb2.PredictionLog.FromString(record)
    log.DiscardUnknownFields()
    return log.SerializeToString(deterministic=True)


ARRAYS = {
    "ids": np.arange(6, dtype="int32").reshape(2, 3),
    "weights": np.linspace(-1, 1, 200, dtype="float32").reshape(2, 100),
    "text": np.array([b"a\0b", "\u00fc".encode()], object),
}


def test_the_real_messages_read_our_bytes() -> None:
    request = real_request(encode_request(ARRAYS))
    assert request.model_spec.signature_name == "serving_default"
    assert set(request.inputs) == set(ARRAYS)
    for name, array in ARRAYS.items():
        decoded = tf.make_ndarray(request.inputs[name])
        assert decoded.dtype == array.dtype
        np.testing.assert_array_equal(decoded, array)


def test_we_read_the_bytes_of_the_real_messages() -> None:
    log = prediction_log_pb2.PredictionLog()
    for name, array in ARRAYS.items():
        log.predict_log.request.inputs[name].CopyFrom(tf.make_tensor_proto(array))
    decoded = decode_request(log.SerializeToString())
    assert set(decoded) == set(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(decoded[name], array)


@pytest.mark.parametrize(("warmup", "records"), [(3, 3), (1000, 5)])
def test_the_first_samples_become_requests(
    tmp_path: Path, warmup: int, records: int
) -> None:
    model, texts = small_models.text_model(), small_models.TEXTS
    report = export_saved_model(model, tmp_path, samples=texts, warmup=warmup)
    assert report.warmup_records == records
    data: Any = tf.data.TFRecordDataset(str(Path(report.path, WARMUP_FILE)))
    requests = [real_request(record) for record in data.as_numpy_iterator()]
    assert [tf.make_ndarray(r.inputs["text"]).tolist() for r in requests] == [
        [text.encode()] for text in texts[:records]
    ]
    # They were replayed: one row each, beside all rows at once.
    assert report.parity.batch_sizes == (1, 5)
