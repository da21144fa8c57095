"""Classifies texts on a TF Serving server over REST.

    python export/serving/rest_client.py "a fine film" --url http://localhost:8501

Needs only Python, neither keras_mha nor tensorflow.
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence

from answers import Answer, add_arguments, choose, show


class ServerError(RuntimeError):
    """The server is unreachable, or its answer is unusable."""


def predict_url(
    base: str, model: str, version: int | None = None, label: str | None = None
) -> str:
    """Returns the address of a model's predict method.

    Raises:
        ValueError: If `base` is not an http or https address.

    Example:

    >>> predict_url("http://localhost:8501", "sentiment", label="stable")
    'http://localhost:8501/v1/models/sentiment/labels/stable:predict'
    """
    if urllib.parse.urlsplit(base).scheme not in {"http", "https"}:
        raise ValueError(
            f"`base` must begin with http:// or https://. Received: {base!r}"
        )
    path = f"/v1/models/{urllib.parse.quote(model, safe='')}"
    if version is not None:
        path += f"/versions/{version}"
    elif label is not None:
        path += f"/labels/{urllib.parse.quote(label, safe='')}"
    return f"{base.rstrip('/')}{path}:predict"


def post(url: str, body: dict[str, object], timeout: float) -> object:
    """Sends `body` as JSON and returns the JSON that comes back.

    Raises:
        ServerError: If no answer comes in time, or it is an error or not JSON.
    """
    request = urllib.request.Request(
        url,
        data=json.dumps(body).encode("utf-8"),
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            answer = response.read()
    except urllib.error.HTTPError as error:
        raise ServerError(f"{url}: {error.code}: {error_text(error)}") from error
    except (OSError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise ServerError(f"{url}: no answer: {reason}") from error
    try:
        return json.loads(answer)
    except ValueError as error:
        raise ServerError(f"{url}: the answer is not JSON: {error}") from error


def error_text(error: urllib.error.HTTPError) -> str:
    """Returns TF Serving's message, or the status line if it sends none."""
    with error:
        try:
            return str(json.loads(error.read())["error"])
        except (ValueError, KeyError, TypeError, OSError):
            return error.reason


def classify(
    url: str,
    texts: Sequence[str],
    labels: Sequence[str],
    *,
    output: str = "probabilities",
    timeout: float = 10.0,
) -> list[Answer]:
    """Classifies `texts` in one request.

    Args:
        url: The address of the predict method; see `predict_url`.
        texts: The texts, one string for each row.
        labels: The labels, in the model's order.
        output: The name of the output with the probabilities. The server names outputs
            only if a model has several.
        timeout: Seconds to wait for the server.

    Returns:
        One answer for each text.

    Raises:
        ServerError: If the server gives no usable answer.
    """
    answer = post(url, {"instances": list(texts)}, timeout)
    rows = answer.get("predictions") if isinstance(answer, dict) else None
    if not isinstance(rows, list) or len(rows) != len(texts):
        raise ServerError(
            f"{url}: expected `predictions` with {len(texts)} rows, one for each "
            f"text. Received: {answer!r}"
        )
    rows = [row.get(output) if isinstance(row, dict) else row for row in rows]
    try:
        return choose(rows, labels)
    except ValueError as error:
        raise ServerError(f"{url}: {error}") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(description="Classify texts over REST.")
    add_arguments(parser)
    parser.add_argument(
        "--url", default="http://localhost:8501", help="default: %(default)s"
    )
    options = parser.parse_args(arguments)
    try:
        url = predict_url(options.url, options.model, options.version, options.label)
    except ValueError as error:
        parser.error(f"--url: {error}")
    try:
        answers = classify(url, options.texts, options.labels, timeout=options.timeout)
    except ServerError as error:
        print(error, file=sys.stderr)
        return 1
    print(show(answers, options.texts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
