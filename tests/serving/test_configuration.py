"""The files in export/serving/ parse as the messages the server reads them as."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from tensorflow_serving.config import model_server_config_pb2

from keras_mha_cli import main
from tests.support.protos import BatchingParameters, MonitoringConfig

SERVING = Path(__file__).resolve().parents[2] / "export" / "serving"


def parse(name: str, message: Any) -> Any:
    text = (SERVING / name).read_text(encoding="utf-8")
    return text_format.Parse(text, message)


def write(model: Path, out: Path, *options: str, name: str = "sentiment") -> int:
    arguments = [str(model), "--name", name, "--out", str(out), *options]
    return main(["serve-config", *arguments])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory with a version, as the exporter leaves it, and what is none."""
    for name in ("1", "drafts"):
        (tmp_path / "model" / name).mkdir(parents=True)
        (tmp_path / "model" / name / "saved_model.pb").touch()
    (tmp_path / "model" / "7").mkdir()
    return tmp_path / "model"


def test_the_command_writes_the_files_of_this_folder(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "config"
    assert write(model, out) == 0
    written = {path.name: path for path in (*out.iterdir(), *model.glob("1/*.pbtxt"))}
    examples = [*SERVING.glob("*.config"), *SERVING.glob("*.pbtxt")]
    assert set(written) == {path.name for path in examples}
    for example in examples:
        assert written[example.name].read_text() == example.read_text()
    assert not list(model.glob("[7d]*/*.pbtxt"))
    # It says how to start the server, as the README does.
    line = capsys.readouterr().out.replace(f"{model}:", "MODEL:").split()
    readme = (SERVING / "README.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"^docker run .*?(?=^```)", readme, re.DOTALL | re.MULTILINE)
    flags = [part for part in shown.split() if part.startswith("--")]
    assert [part for part in line if part.startswith("--")] == flags
    assert '"MODEL:/models/sentiment:ro"' in line
    assert f'"{out}:/config:ro"' in line


def test_the_command_takes_several_versions_and_other_sizes(
    model: Path, tmp_path: Path
) -> None:
    (model / "7" / "saved_model.pb").touch()
    options = ("--max-batch-size", "24", "--threads", "5", "--pad-with-zeros")
    assert write(model, tmp_path, *options, "--base-path", "/m", name="a-b_c.d") == 0
    text = (tmp_path / "models.config").read_text()
    config = text_format.Parse(text, model_server_config_pb2.ModelServerConfig())
    (served,) = config.model_config_list.config
    assert (served.name, served.base_path) == ("a-b_c.d", "/m")
    assert list(served.model_version_policy.specific.versions) == [1, 7]
    assert dict(served.version_labels) == {"stable": 7}
    of_server = text_format.Parse(
        (tmp_path / "server_batching.pbtxt").read_text(), BatchingParameters()
    )
    assert of_server.num_batch_threads.value == 5
    for version in ("1", "7"):
        text = (model / version / "batching_params.pbtxt").read_text()
        batching = text_format.Parse(text, BatchingParameters())
        check_batch_sizes(batching)
        assert list(batching.allowed_batch_sizes) == [1, 2, 4, 8, 16, 24]
        assert batching.pad_variable_length_inputs
        assert of_server.max_batch_size == batching.max_batch_size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--name", 'a"b'], "--name must be of letters"),
        (["--base-path", "/a b"], "--base-path must have no spaces"),
        (["--max-batch-size", "0"], "must be at least 1, not 0"),
        ([], "config exists: pass --overwrite to replace it"),
    ],
)
def test_wrong_usage_of_the_command(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    (tmp_path / "monitoring.config").write_text("mine")
    with pytest.raises(SystemExit, match="2"):
        write(model, tmp_path, *options)
    first, second = capsys.readouterr().err.splitlines()
    assert message in first
    assert second == "Try 'keras-mha serve-config --help'."
    assert (tmp_path / "monitoring.config").read_text() == "mine"
    assert not list(model.glob("1/*.pbtxt"))
    assert write(model, tmp_path, "--overwrite") == 0
    assert (tmp_path / "monitoring.config").read_text() != "mine"


def test_a_directory_without_a_version_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        write(tmp_path, tmp_path)
    assert "holds no version: a folder whose name is a" in capsys.readouterr().err


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
