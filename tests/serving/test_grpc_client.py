"""The gRPC client against a stand-in for the server."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc_client
import pytest
import tensorflow as tf

from tests.support.stand_ins import SLOW, StandInGrpc, probabilities, stand_in_grpc

LABELS = ("negative", "positive")
TEXTS = ["a fine film", "so dull that it hurts, from the first scene to the last", "é"]


@pytest.fixture
def server() -> Iterator[StandInGrpc]:
    with stand_in_grpc() as running:
        yield running


def classify(server: StandInGrpc, texts: list[str], **arguments: Any) -> Any:
    spec = grpc_client.model_spec("sentiment")
    return grpc_client.classify(server.address, spec, texts, LABELS, **arguments)


@pytest.mark.parametrize(
    ("choice", "version"),
    [
        ({}, 2),
        ({"version": 1}, 1),
        ({"label": "stable"}, 1),
        ({"label": "canary"}, 2),
    ],
)
def test_answers(server: StandInGrpc, choice: dict[str, Any], version: int) -> None:
    spec = grpc_client.model_spec("sentiment", **choice)
    answers = grpc_client.classify(server.address, spec, TEXTS, LABELS)
    rows = [probabilities(text, version) for text in TEXTS]
    assert {answer.label for answer in answers} == set(LABELS)
    assert [answer.probability for answer in answers] == [max(row) for row in rows]
    assert [LABELS.index(answer.label) for answer in answers] == [
        row.index(max(row)) for row in rows
    ]


def test_the_input_may_have_any_name(server: StandInGrpc) -> None:
    spec = grpc_client.model_spec("sentiment")
    server.inputs = {"reviews": tf.string}
    with grpc_client.grpc.insecure_channel(server.address) as channel:
        stub = grpc_client.prediction_service_pb2_grpc.PredictionServiceStub(channel)
        assert grpc_client.only_input(stub, spec, timeout=10) == "reviews"


@pytest.mark.parametrize(
    ("inputs", "received"),
    [
        ({"ids": tf.int32}, r"\{'ids': 'int32'\}"),
        ({"a": tf.string, "b": tf.string}, "'b': 'string'"),
        ({}, r"\{\}"),
    ],
)
def test_signature_of_another_kind(
    server: StandInGrpc, inputs: dict[str, Any], received: str
) -> None:
    server.inputs = inputs
    message = f"'serving_default' must have one input, of strings.*{received}"
    with pytest.raises(grpc_client.ServerError, match=message):
        classify(server, TEXTS)


def test_missing_output(server: StandInGrpc) -> None:
    message = r"no output 'logits'. It has: \[\]"
    with pytest.raises(grpc_client.ServerError, match=message):
        classify(server, TEXTS, output="logits")


def test_output_of_another_shape(server: StandInGrpc) -> None:
    server.columns = 1
    message = r"must have the shape \(3, 2\).*Received: \(3, 1\)"
    with pytest.raises(grpc_client.ServerError, match=message):
        classify(server, TEXTS)


def test_time_out(server: StandInGrpc) -> None:
    # The wait for the connection counts too, hence not the shortest of times.
    with pytest.raises(grpc_client.ServerError, match="DEADLINE_EXCEEDED"):
        classify(server, [SLOW], timeout=2)


def test_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        assert grpc_client.main(["x", "--server", address]) == 1
    assert f"{address}: UNAVAILABLE" in capsys.readouterr().err


def test_command(server: StandInGrpc, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [TEXTS[0], "--server", server.address, "--label", "canary"]
    assert grpc_client.main(arguments) == 0
    negative, positive = probabilities(TEXTS[0], 2)
    assert negative > positive
    assert capsys.readouterr().out == f"negative  {negative:.4f}  {TEXTS[0]}\n"


def test_command_reports_an_error(
    server: StandInGrpc, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["x", "--server", server.address, "--version", "7"]
    assert grpc_client.main(arguments) == 1
    assert "NOT_FOUND: Servable not found" in capsys.readouterr().err


def test_without_its_packages_it_names_the_extra() -> None:
    program = "import sys; sys.modules['tensorflow_serving'] = None; import grpc_client"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(grpc_client.__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("pip install 'keras-mha[serving]'")
