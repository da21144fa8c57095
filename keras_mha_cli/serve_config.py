"""`keras-mha serve-config`: TensorFlow Serving's configuration files for a model."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from keras_mha_cli.console import INTERRUPTED_TEXT, Console
from keras_mha_cli.declared import whole

_DESCRIPTION = """\
Writes the files that TensorFlow Serving reads for an exported model: its versions and
their labels, batching, and metrics. Prints the command that starts the server with
them. Nothing is loaded or run.

  OUT/models.config                          --model_config_file
  OUT/server_batching.pbtxt                  --batching_parameters_file
  OUT/monitoring.config                      --monitoring_config_file
  MODEL_DIR/VERSION/batching_params.pbtxt    --enable_per_model_batching_parameters
"""

_EPILOG = f"""\
examples:
  What `keras-mha export model.keras --to saved_model --out dist` wrote:
    keras-mha serve-config dist/saved_model --name reviews --out config

  A model of ids whose padding is 0, in batches of up to 64 rows:
    keras-mha serve-config dist/saved_model --name reviews --out config \\
        --max-batch-size 64 --pad-with-zeros

exit codes:
  0  the files were written
  1  a file could not be written
  2  wrong usage, no version in the directory, or a file exists and there is no
     --overwrite
  {INTERRUPTED_TEXT}
"""

_MODELS = """\
# --model_config_file: a ModelServerConfig in text form.
model_config_list {{
  config {{
    name: "{name}"
    # The folder that holds the version folders (1, 2, ...), as seen by the server.
    base_path: "{base_path}"
    model_platform: "tensorflow"
    # Versions are named one by one, so that a label never points to an unloaded one.
    # For a canary: add its version here, and a label "canary" below.
    model_version_policy {{
      specific {{
{versions}
      }}
    }}
    version_labels {{
      key: "stable"
      value: {newest}
    }}
  }}
}}
"""

_MONITORING = """\
# --monitoring_config_file: a MonitoringConfig in text form. Metrics are served on the
# REST port.
prometheus_config {
  enable: true
  path: "/monitoring/prometheus/metrics"
}
"""

_SERVER_BATCHING = """\
# --batching_parameters_file: BatchingParameters for the whole server. The batch threads
# are shared by all models; about one for each core. What a model can choose for itself
# stands in its own batching_params.pbtxt, a name that the server fixes.
num_batch_threads {{ value: {threads} }}
thread_pool_name {{ value: "batch_threads" }}
max_batch_size {{ value: {size} }}
batch_timeout_micros {{ value: 2000 }}
max_enqueued_batches {{ value: 64 }}
"""

_BATCHING = """\
# BatchingParameters of one model version, read from next to its saved_model.pb if the
# server is started with --enable_per_model_batching_parameters. Thread settings are
# read only from the server's own file.
max_batch_size {{ value: {size} }}
# How long the first request of a batch waits for others: 2 ms.
batch_timeout_micros {{ value: 2000 }}
# Beyond this many waiting batches, requests are refused instead of waiting longer.
max_enqueued_batches {{ value: 64 }}
# A batch is padded to the next of these; the last must be max_batch_size.
allowed_batch_sizes: [{sizes}]
# Whether shorter inputs are filled up with zeros, so that requests of unequal lengths
# share a batch: right only where zero is the model's padding, as in ids. Otherwise the
# server refuses to batch them. A model of texts takes one string a row and pads inside.
pad_variable_length_inputs: {pads}
"""

_COMMAND = """\
docker run --rm -p 8500:8500 -p 8501:8501 \\
    -v "{model}:{base_path}:ro" \\
    -v "{out}:/config:ro" \\
    tensorflow/serving \\
    --model_config_file=/config/models.config \\
    --allow_version_labels_for_unavailable_models=true \\
    --enable_batching=true \\
    --batching_parameters_file=/config/server_batching.pbtxt \\
    --enable_per_model_batching_parameters=true \\
    --monitoring_config_file=/config/monitoring.config
"""


def add_serve_config(commands: Any) -> None:
    """Adds the command to the parser's `commands`."""
    parser = commands.add_parser(
        "serve-config",
        help="write TensorFlow Serving's configuration for an exported model",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model",
        metavar="MODEL_DIR",
        type=Path,
        help="the directory that holds the versions (1, 2, ...) of a SavedModel",
    )
    parser.add_argument(
        "--name", required=True, help="the model's name, which clients send"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="OUT", help="created if absent"
    )
    parser.add_argument(
        "--base-path",
        metavar="PATH",
        help="MODEL_DIR as the server sees it (default: /models/NAME)",
    )
    parser.add_argument(
        "--max-batch-size",
        type=whole(1),
        default=32,
        metavar="ROWS",
        help="how many rows one batch may have (default: 32)",
    )
    parser.add_argument(
        "--threads",
        type=whole(1),
        default=2,
        help="batch threads, about one for each core of the server (default: 2)",
    )
    parser.add_argument(
        "--pad-with-zeros",
        action="store_true",
        help="let requests of unequal lengths share a batch, filled up with zeros; "
        "right where zero is the model's padding",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace files that exist"
    )
    parser.set_defaults(run=lambda parsed: _run(parser, parsed))


def _run(parser: argparse.ArgumentParser, parsed: argparse.Namespace) -> int:
    path = parsed.base_path or f"/models/{parsed.name}"
    if not re.fullmatch(r"[\w.-]+", parsed.name, re.ASCII):
        parser.error(
            f"--name must be of letters, digits, '.', '_' and '-', not {parsed.name!r}"
        )
    if not re.fullmatch(r"[^\"\\\s]+", path):
        parser.error(
            f"--base-path must have no spaces, quotes or backslashes, not {path!r}"
        )
    versions = _versions(parsed.model)
    if not versions:
        parser.error(
            f"{parsed.model} holds no version: a folder whose name is a number, with a "
            "saved_model.pb in it, as `keras-mha export --to saved_model` writes it"
        )
    files = _files(parsed, path, versions)
    exist = [str(file) for file in files if file.exists()]
    if exist and not parsed.overwrite:
        parser.error(f"{', '.join(exist)} exists: pass --overwrite to replace it")
    console = Console()
    return console.run(lambda: _write(console, parsed, path, files))


def _versions(model: Path) -> list[int]:
    """The numbers of the versions in a directory, ascending."""
    return sorted(
        int(found.parent.name)
        for found in model.glob("*/saved_model.pb")
        if found.parent.name.isdecimal()
    )


def _files(
    parsed: argparse.Namespace, base_path: str, versions: list[int]
) -> dict[Path, str]:
    """The files to write, with their contents."""
    size = parsed.max_batch_size
    models = _MODELS.format(
        name=parsed.name,
        base_path=base_path,
        versions="\n".join(f"        versions: {version}" for version in versions),
        newest=versions[-1],
    )
    batching = _BATCHING.format(
        size=size,
        sizes=", ".join(map(str, _batch_sizes(size))),
        pads=str(parsed.pad_with_zeros).lower(),
    )
    return {
        parsed.out / "models.config": models,
        parsed.out / "server_batching.pbtxt": _SERVER_BATCHING.format(
            threads=parsed.threads, size=size
        ),
        parsed.out / "monitoring.config": _MONITORING,
        **{
            parsed.model / str(version) / "batching_params.pbtxt": batching
            for version in versions
        },
    }


def _batch_sizes(largest: int) -> list[int]:
    """The powers of two below the largest size, and that.

    Example:

    >>> _batch_sizes(24)
    [1, 2, 4, 8, 16, 24]
    """
    powers = [2**power for power in range(largest.bit_length()) if 2**power < largest]
    return [*powers, largest]


def _write(
    console: Console, parsed: argparse.Namespace, base_path: str, files: dict[Path, str]
) -> int:
    """Writes the files, and prints how to start the server; returns the exit code."""
    for path, content in files.items():
        with console.step(f"write {path}", (OSError,)):
            path.parent.mkdir(parents=True, exist_ok=True)
            # Renamed when whole: a server may be reading.
            new = path.with_name(f".{path.name}.new")
            new.write_text(content, encoding="utf-8")
            new.replace(path)
    places = {"model": parsed.model.resolve(), "out": parsed.out.resolve()}
    print(_COMMAND.format(**places, base_path=base_path), end="")
    return 0
