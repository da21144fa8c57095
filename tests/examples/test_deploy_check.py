"""The verdict of `make deploy-check` on accuracies."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from keras_mha.export import RuntimeCheck
from keras_mha.export.runtimes.table import RUNTIMES

MODULES = ("data", "model", "report", "deploy_check")


@pytest.fixture(scope="module")
def deploy_check(example: dict[str, Any]) -> Any:
    return example["deploy_check"]


@pytest.fixture
def checks(deploy_check: Any) -> list[RuntimeCheck]:
    """What `verify` finds in LiteRT, its row of the model and another runtime's."""
    of_float = RuntimeCheck(
        file=f"out/{deploy_check.FLOAT}/model_128.tflite",
        runtime=deploy_check.LITERT,
        status="ok",
        samples=1000,
        accuracy=0.78,
        label_agreement=1.0,
        size_bytes=1000,
    )
    small = {"accuracy": 0.777, "label_agreement": 0.995, "size_bytes": 272}
    return [
        replace(of_float, file="", runtime="Keras", accuracy=0.1),
        of_float,
        replace(of_float, file="out/dynamic_int8_gpu/model_128.tflite", size_bytes=361),
        replace(of_float, file="out/dynamic_int8/model_128.tflite", **small),
        replace(of_float, runtime="ONNX Runtime, CPU", accuracy=0.1),
    ]


def test_near_accuracies_pass(deploy_check: Any, checks: list[RuntimeCheck]) -> None:
    text, passed = deploy_check.compare_accuracies(checks)
    assert passed
    assert text.startswith("## Accuracy of int8 on 1000 reviews of the test part: pass")
    assert "| float32 | 1000 | 1.000 | 78.00% | +0.00 | 100.00% |" in text
    assert "| dynamic_int8_gpu | 361 | 0.361 | 78.00% | +0.00 | 100.00% |" in text
    assert "| dynamic_int8 | 272 | 0.272 | 77.70% | -0.30 | 99.50% |" in text


@pytest.mark.parametrize("accuracy", [0.774, 0.786, None])
def test_accuracies_too_far_apart_or_unknown_do_not(
    deploy_check: Any, checks: list[RuntimeCheck], accuracy: float | None
) -> None:
    checks[3] = replace(checks[3], accuracy=accuracy)
    text, passed = deploy_check.compare_accuracies(checks)
    assert not passed
    assert ": not passed\n" in text


@pytest.mark.parametrize("absent", [1, 2, 3])
def test_a_file_that_was_not_run_does_not_pass(
    deploy_check: Any, checks: list[RuntimeCheck], absent: int
) -> None:
    del checks[absent]
    assert not deploy_check.compare_accuracies(checks)[1]


def test_the_runtime_is_one_of_verify_s(deploy_check: Any) -> None:
    assert RUNTIMES["litert"].label == deploy_check.LITERT
