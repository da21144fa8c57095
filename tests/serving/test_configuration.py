"""The files in export/serving/ parse as the messages the server reads them as."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from tensorflow_serving.config import model_server_config_pb2

from tests.support.protos import BatchingParameters, MonitoringConfig

SERVING = Path(__file__).resolve().parents[2] / "export" / "serving"


def parse(name: str, message: Any) -> Any:
    text = (SERVING / name).read_text(encoding="utf-8")
    return text_format.Parse(text, message)


def check_batch_sizes(parameters: Any) -> None:
    """The rules that TF Serving's batching sessions state for the sizes."""
    sizes = list(parameters.allowed_batch_sizes)
    assert sizes == sorted(set(sizes))
    assert not sizes or sizes[-1] == parameters.max_batch_size.value


def test_models_config() -> None:
    config = parse("models.config", model_server_config_pb2.ModelServerConfig())
    (model,) = config.model_config_list.config
    assert model.name == "sentiment"
    assert model.base_path == "/models/sentiment"
    assert model.model_platform == "tensorflow"
    assert dict(model.version_labels) == {"stable": 1}
    # A label may only point to a version that is served.
    served = set(model.model_version_policy.specific.versions)
    assert set(model.version_labels.values()) <= served


def test_batching_parameters_of_the_server() -> None:
    parameters = parse("server_batching.pbtxt", BatchingParameters())
    assert parameters.num_batch_threads.value >= 1
    assert parameters.thread_pool_name.value
    assert parameters.max_batch_size.value == 32
    check_batch_sizes(parameters)


def test_batching_parameters_of_a_model() -> None:
    parameters = parse("batching_params.pbtxt", BatchingParameters())
    assert list(parameters.allowed_batch_sizes) == [1, 2, 4, 8, 16, 32]
    assert parameters.batch_timeout_micros.value == 2000
    assert parameters.max_enqueued_batches.value == 64
    check_batch_sizes(parameters)
    # The thread pool is shared: the server reads it from its own file alone.
    assert not parameters.HasField("num_batch_threads")
    assert not parameters.HasField("thread_pool_name")


def test_monitoring_config() -> None:
    config = parse("monitoring.config", MonitoringConfig())
    assert config.prometheus_config.enable
    assert config.prometheus_config.path == "/monitoring/prometheus/metrics"


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (BatchingParameters, "max_batch_size: 32"),
        (BatchingParameters, "max_batch_sizes { value: 32 }"),
        (MonitoringConfig, "prometheus { enable: true }"),
        (model_server_config_pb2.ModelServerConfig, "config { name: 'sentiment' }"),
    ],
)
def test_a_wrong_file_does_not_parse(message: Any, text: str) -> None:
    with pytest.raises(text_format.ParseError):
        text_format.Parse(text, message())


def test_batch_sizes_that_break_the_rules_are_seen() -> None:
    text = "max_batch_size { value: 32 } allowed_batch_sizes: [1, 16]"
    with pytest.raises(AssertionError):
        check_batch_sizes(text_format.Parse(text, BatchingParameters()))


def test_the_docker_line_names_files_that_exist() -> None:
    readme = (SERVING / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"=/config/(\S+)", readme)
    assert sorted(named) == [
        "models.config",
        "monitoring.config",
        "server_batching.pbtxt",
    ]
    assert all((SERVING / name).is_file() for name in named)
    config = parse("models.config", model_server_config_pb2.ModelServerConfig())
    (model,) = config.model_config_list.config
    assert f":{model.base_path}:ro" in readme
