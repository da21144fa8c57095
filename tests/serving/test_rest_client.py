"""The REST client against a stand-in for the server."""

from __future__ import annotations

import doctest
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import rest_client

from tests.support.stand_ins import SLOW, StandInRest, probabilities, stand_in_rest

LABELS = ("negative", "positive")
TEXTS = ["a fine film", "so dull that it hurts, from the first scene to the last", "é"]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInRest]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with stand_in_rest() as running:
        yield running


@pytest.fixture
def url(server: StandInRest) -> str:
    return rest_client.predict_url(server.url, "sentiment")


def expected(version: int) -> list[tuple[str, float]]:
    answers = []
    for text in TEXTS:
        negative, positive = probabilities(text, version)
        best = max(negative, positive)
        answers.append((LABELS[int(positive > negative)], best))
    return answers


def test_the_texts_get_both_labels() -> None:
    # Or a client that swaps the labels would pass the tests below.
    assert {label for label, _ in expected(1)} == set(LABELS)
    assert expected(1) != expected(2)


@pytest.mark.parametrize(
    ("choice", "version"),
    [
        ({}, 2),
        ({"version": 1}, 1),
        ({"version": 2}, 2),
        ({"label": "stable"}, 1),
        ({"label": "canary"}, 2),
    ],
)
def test_answers(server: StandInRest, choice: dict[str, Any], version: int) -> None:
    url = rest_client.predict_url(f"{server.url}/", "sentiment", **choice)
    assert rest_client.classify(url, TEXTS, LABELS) == expected(version)


def test_rows_with_output_names(server: StandInRest, url: str) -> None:
    # The form of a model with several outputs.
    row = {"probabilities": [0.25, 0.75], "attention": [[1.0]]}
    server.canned = {"predictions": [row]}
    assert rest_client.classify(url, ["x"], LABELS) == [("positive", 0.75)]


def test_unknown_model(server: StandInRest) -> None:
    url = rest_client.predict_url(server.url, "no/such")
    message = r"404: Servable not found for request: /v1/models/no%2Fsuch:predict"
    with pytest.raises(rest_client.ServerError, match=message):
        rest_client.classify(url, TEXTS, LABELS)


def test_refused_request(url: str) -> None:
    with pytest.raises(rest_client.ServerError, match="400: instances must be strings"):
        rest_client.post(url, {"instances": [1]}, timeout=10)


@pytest.mark.parametrize(
    ("canned", "message"),
    [
        (b"<html>", "the answer is not JSON"),
        ([], r"expected `predictions` with 1 rows.*Received: \[\]"),
        ({"outputs": [[0.5, 0.5]]}, "expected `predictions`"),
        ({"predictions": [[0.5, 0.5]] * 2}, "with 1 rows, one for each text"),
        ({"predictions": [[0.5, 0.25, 0.25]]}, "must hold 2 finite numbers"),
        ({"predictions": [0.5]}, r"must hold 2 finite.*Received: 0\.5"),
        ({"predictions": [[0.5, float("nan")]]}, r"Received: \[0\.5, nan\]"),
        ({"predictions": [{"logits": [0.5, 0.5]}]}, "Received: None"),
    ],
)
def test_unusable_answer(
    server: StandInRest, url: str, canned: Any, message: str
) -> None:
    server.canned = canned
    with pytest.raises(rest_client.ServerError, match=message):
        rest_client.classify(url, ["x"], LABELS)


def test_time_out(url: str) -> None:
    with pytest.raises(rest_client.ServerError, match="no answer: timed out"):
        rest_client.classify(url, [SLOW], LABELS, timeout=0.2)


def test_no_server() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(rest_client.ServerError, match="no answer: .*refused"):
            rest_client.post(url, {}, timeout=10)


def test_address_of_another_scheme() -> None:
    with pytest.raises(ValueError, match="`base` must begin with http://.*file:///x"):
        rest_client.predict_url("file:///x", "sentiment")


def test_docstring_example() -> None:
    result = doctest.testmod(rest_client)
    assert result.attempted
    assert not result.failed


def test_command(server: StandInRest, tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("bad\ngood\n", encoding="utf-8")
    # -S: no site-packages, so it needs nothing but Python.
    run = subprocess.run(
        [
            *(sys.executable, "-S", rest_client.__file__, *TEXTS),
            *("--url", server.url, "--label", "stable", "--labels", str(labels)),
        ],
        check=True,
        capture_output=True,
        encoding="utf-8",
    )
    assert run.stdout.splitlines() == [
        f"{'good' if label == 'positive' else 'bad ':}  {probability:.4f}  {text}"
        for (label, probability), text in zip(expected(1), TEXTS, strict=True)
    ]


def test_command_reports_an_error(
    server: StandInRest, capsys: pytest.CaptureFixture[str]
) -> None:
    status = rest_client.main(["x", "--url", server.url, "--version", "7"])
    assert status == 1
    assert "404: Servable not found" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x", "--url", "localhost:8501"], "`base` must begin with http://"),
        (["x", "--timeout", "0"], "must be a positive number of seconds"),
        (["x", "--timeout", "soon"], "received 'soon'"),
        (["x", "--labels", "no-such-file"], "cannot read labels"),
        (["x", "--version", "1", "--label", "stable"], "not allowed with"),
        ([], "TEXT"),
    ],
)
def test_command_refuses_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        rest_client.main(arguments)
    assert message in capsys.readouterr().err


def test_command_refuses_a_single_label(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("positive\n", encoding="utf-8")
    with pytest.raises(SystemExit):
        rest_client.main(["x", "--labels", str(labels)])
    assert "must hold at least two labels" in capsys.readouterr().err
